"""The experts of a file that is larger than the memory they may take."""

from __future__ import annotations

from collections.abc import Callable

from moesaic import _core
from moesaic._errors import error_of
from moesaic.torch.experts import Experts

#: How fast the past of an expert fades, per forward.
_DECAY = 0.97


def pooled_experts(
    file: _core.GgufFile, memory: int
) -> Callable[[type[Experts], int, _core.Activation], Experts]:
    """What makes modules of the blocks of a file, all of which stay below ``memory`` bytes.

    Each block gets the same number of slots. Raises ConfigError where not even one fits.
    """
    store = _core.MoeExpertStore.from_gguf(file, memory_limit=memory)
    held = store.memory()["staging"] or 0
    one, two = (_slot_bytes(file, budget) for budget in (1, 2))
    slot = max(two - one, 1)
    if held + one > memory:
        raise error_of(
            _core.ConfigError, "MoesaicConfig", "memory",
            f"at least {held + one} bytes, for one expert of each block and those on their way",
            str(memory),
        )  # fmt: skip
    budget = 1 + (memory - held - one) // slot
    pools = {
        view.layer_index: _core.ExpertPool(view.stack.num_experts, budget, decay=_DECAY)
        for view in store.layers
    }

    def experts(kind: type[Experts], block: int, activation: _core.Activation) -> Experts:
        if block not in pools:
            raise error_of(
                _core.FormatError, "MoesaicConfig", f"block {block} of {file.path}",
                f"one with experts: {', '.join(map(str, pools))}", "none",
            )  # fmt: skip
        return kind.from_store(store, block, pools[block], activation=activation)

    return experts


def _slot_bytes(file: _core.GgufFile, budget: int) -> int:
    """What so many slots of each block take, beside those that experts only pass through.

    A store without a limit counts the same slots, and memory is touched when experts are loaded.
    """
    store = _core.MoeExpertStore.from_gguf(file)
    modules = [
        Experts.from_store(
            store, view.layer_index, _core.ExpertPool(view.stack.num_experts, budget)
        )
        for view in store.layers
    ]
    total = store.memory()["slots"] or 0
    del modules
    return total

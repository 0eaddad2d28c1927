"""The experts of a file that is larger than the memory they may take."""

from __future__ import annotations

from collections.abc import Callable

from moesaic import _core
from moesaic._errors import error_of
from moesaic._offload_store import pools_of
from moesaic.torch.experts import Experts


def pooled_experts(
    file: _core.GgufFile, memory: int
) -> Callable[[type[Experts], int, _core.Activation], Experts]:
    """What makes modules of the blocks of a file, all of which stay below ``memory`` bytes.

    Blocks get equally many slots. Raises ConfigError where not even one of each fits.
    """
    store = _core.MoeExpertStore.from_gguf(file, memory_limit=memory)
    budgets = store.fitting_budgets()
    if min(budgets) < 1:
        raise error_of(
            _core.ConfigError, "MoesaicConfig", "memory",
            "room for an expert of each block, beside the buffers that they are read into",
            str(memory),
        )  # fmt: skip
    blocks = [view.layer_index for view in store.layers]
    pools = dict(zip(blocks, pools_of(store, budgets), strict=True))

    def experts(kind: type[Experts], block: int, activation: _core.Activation) -> Experts:
        if block not in pools:
            raise error_of(
                _core.FormatError, "MoesaicConfig", f"block {block} of {file.path}",
                f"one with experts: {', '.join(map(str, pools))}", "none",
            )  # fmt: skip
        return kind.from_store(store, block, pools[block], activation=activation)

    return experts

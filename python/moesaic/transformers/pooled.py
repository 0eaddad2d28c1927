"""The experts of a model that is larger than the memory they may take."""

from __future__ import annotations

from collections.abc import Callable

from moesaic import _core
from moesaic._errors import error_of
from moesaic._offload_store import Source, pools_of, stored_experts
from moesaic.torch.experts import Experts


def pooled_experts(
    source: Source, memory: int
) -> Callable[[type[Experts], int, _core.Activation], Experts]:
    """What makes modules of the blocks of a model, all of which stay below ``memory`` bytes.

    Blocks get equally many slots. Raises ConfigError where not even one of each fits.
    """
    store, budgets, _ = stored_experts("MoesaicConfig", source, memory, None)
    blocks = [view.layer_index for view in store.layers]
    pools = dict(zip(blocks, pools_of(store, budgets), strict=True))

    def experts(kind: type[Experts], block: int, activation: _core.Activation) -> Experts:
        if block not in pools:
            name = source.path if isinstance(source, _core.GgufFile) else source.name
            raise error_of(
                _core.FormatError, "MoesaicConfig", f"block {block} of {name}",
                f"one with experts: {', '.join(map(str, pools))}", "none",
            )  # fmt: skip
        return kind.from_store(store, block, pools[block], activation=activation)

    return experts

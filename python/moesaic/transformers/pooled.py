"""The experts of a model that is larger than the memory they may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moesaic import _core
from moesaic._errors import error_of
from moesaic._offload_store import Source, pools_of, stored_experts
from moesaic.torch.experts import Experts
from moesaic.torch.frozen import PooledExperts


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


@dataclass(frozen=True)
class Reads:
    """What a model did whose experts are not all in memory."""

    fewest: int  #: experts of a layer that have room in memory
    most: int
    num_experts: int  #: of a layer, the most of all
    hit_rate: float  #: token-expert pairs whose expert was in memory
    read_bytes: int  #: from the disk


def reads_of(model: nn.Module) -> Reads | None:
    """What the pooled experts of a model read so far; None for a model without."""
    weights = [one._weights for one in model.modules() if isinstance(one, Experts)]
    pooled = [one for one in weights if isinstance(one, PooledExperts)]
    if not pooled:
        return None
    budgets = [one.pool.budget for one in pooled]
    stats = [one.pool.stats for one in pooled]
    hits = sum(one.hit_pairs for one in stats)
    pairs = hits + sum(one.miss_pairs for one in stats)
    stores = {id(one.store): one.store for one in pooled}
    return Reads(
        min(budgets),
        max(budgets),
        max(one.pool.num_experts for one in pooled),
        hits / pairs if pairs else 1.0,
        sum(store.io_stats()["bytes"] for store in stores.values()),
    )

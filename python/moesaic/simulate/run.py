"""A trace against a policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .policies import OnMiss, Policy
from .traces import Trace


@dataclass(frozen=True)
class Outcome:
    """Counts over all layers of a trace; an expert of a step counts once, however many tokens."""

    steps: int
    layers: int
    tokens: int  #: per step
    on_miss: OnMiss
    hits: int  #: experts that were resident when they were needed
    misses: int
    loads: int  #: experts brought: by refreshes, and for misses when staging
    placed: int  #: those of them that got a slot
    admitted: int  #: those of these that a call missed, and computed in their slot
    hit_pairs: int
    pairs: int

    @property
    def hit_rate(self) -> float:
        """Pairs on residents."""
        return self.hit_pairs / max(self.pairs, 1)


def simulate(
    trace: Trace,
    policy: Policy,
    budget: int,
    *,
    on_miss: OnMiss = "stage",
    warm: Trace | None = None,
) -> Outcome:
    """Play ``trace`` on the pools of ``policy``, one per layer; they start with the experts that
    ``warm`` used most, or with the first ones. A fresh start moves nothing that is counted.
    """
    pools = [policy.pool(trace.num_experts, budget) for _ in range(trace.layers)]
    if warm is not None:
        for pool, counts in zip(pools, warm.counts(), strict=True):
            pool.warm(counts.astype(np.float64).tolist())
    hits = misses = loads = placed = admitted = hit_pairs = pairs = 0
    for step, layers in enumerate(trace.ids):
        for pool, ids in zip(pools, layers, strict=True):
            used, counts = np.unique(ids[ids >= 0], return_counts=True)
            resident = pool.resident_mask[used]
            missing = int((~resident).sum())
            hits += int(resident.sum())
            misses += missing
            hit_pairs += int(counts[resident].sum())
            pairs += int(counts.sum())
            if on_miss == "stage":
                loads += missing
                slots = len(pool.stage(ids))
                placed += slots
                admitted += slots
            else:
                pool.observe(ids)
            if policy.refresh_every and pool.should_refresh(step):
                promoted = len(pool.refresh().promotions)
                loads += promoted
                placed += promoted
    return Outcome(
        trace.steps, trace.layers, trace.tokens, on_miss, hits, misses, loads, placed, admitted,
        hit_pairs, pairs,
    )  # fmt: skip

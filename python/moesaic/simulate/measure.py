"""Predictions beside layers that really run.

One layer is calibrated with everything resident, everything cold, and everything copied into slots;
then each policy plays the same trace on it and in the simulation.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import _core, testing
from .cost import Costs, tokens_per_second
from .policies import OnMiss, Policy
from .run import simulate
from .traces import Trace

HEADER = (
    "budget", "policy", "hit rate", "(measured)", "experts loaded", "(measured)",
    "tokens/s", "(measured)",
)  # fmt: skip


class Bench:
    """A small file with one layer, opened as a store; routings come from traces."""

    def __init__(self, folder: Path, trace: Trace, hidden: int, intermediate: int) -> None:
        path = folder / "measure.gguf"
        testing.write_moe_gguf(
            path, num_experts=trace.num_experts, top_k=trace.ids.shape[-1],
            hidden=hidden, intermediate=intermediate, layers=1,
        )  # fmt: skip
        self.file = _core.GgufFile(path)
        self.trace = trace
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((trace.tokens, hidden), np.float32)

    def play(
        self,
        pool: _core.ExpertPool,
        on_miss: OnMiss,
        ids: npt.NDArray[np.int32],
        policy: Policy | None = None,
    ) -> tuple[float, int, _core.PoolStats]:
        """Return seconds per step, experts loaded, and the pool's stats."""
        store = _core.MoeExpertStore.from_gguf(self.file)
        store.apply([pool])
        pool.reset_stats()
        weights = np.full(ids.shape[1:], 1 / ids.shape[2], np.float32)
        out = np.empty_like(self.x)
        with _core.MoeLayer.from_store(store, 0, pool, on_miss) as layer:
            routings = [_core.Routing(step, weights) for step in ids]
            layer(self.x, routing=_core.Routing(np.full_like(ids[0], -1), weights), out=out)
            pool.reset_stats()
            begin = time.perf_counter()
            for step, routing in enumerate(routings):
                layer(self.x, routing=routing, out=out)
                if policy is not None and policy.refresh_every and pool.should_refresh(step):
                    if on_miss == "compute":  # a layer that stages has observed them
                        pool.observe(ids[step])
                    pool.refresh()
                    store.apply([pool])
            took = time.perf_counter() - begin
        stats = pool.stats
        return took / len(ids), stats.bytes // store.layers[0].expert_bytes, stats

    def costs(self) -> Costs:
        """Measure every term of the cost model, each by one kind of run."""
        ids = self.trace.ids[: min(self.trace.steps, 60), 0]
        experts = self.trace.num_experts
        needed = float(np.mean([len(np.unique(step)) for step in ids]))
        expert_bytes = float(_core.MoeExpertStore.from_gguf(self.file).layers[0].expert_bytes)
        skipped = np.full_like(ids, -1)
        fixed = self.play(_core.ExpertPool.all_resident(experts), "compute", skipped)[0]
        fast = self.play(_core.ExpertPool.all_resident(experts), "compute", ids)[0] - fixed
        slow = self.play(_core.ExpertPool(experts, 0), "compute", ids)[0] - fixed
        read = needed * expert_bytes
        copied = 0.0
        for _ in range(2):  # the second time, all threads are there
            store = _core.MoeExpertStore.from_gguf(self.file)
            begin = time.perf_counter()
            store.apply([_core.ExpertPool.all_resident(experts)])
            copied = time.perf_counter() - begin
        return Costs(
            expert_bytes,
            read / max(fast, 1e-9),
            read / max(slow, 1e-9),
            experts * expert_bytes / max(copied, 1e-9),
            max(fixed, 0.0),
        )


def compare(
    trace: Trace,
    policies: Sequence[tuple[str, Policy]],
    budgets: Sequence[int],
    *,
    warm: float = 0.1,
    on_miss: OnMiss = "stage",
    hidden: int = 1024,
    intermediate: int = 512,
) -> list[list[str]]:
    """Return rows of HEADER for the first layer of ``trace``."""
    warming, rest = Trace(trace.ids[:, :1], trace.num_experts).split(warm)
    start = warming if warming.steps else None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), rest, hidden, intermediate)
        costs = bench.costs()
        for budget in budgets:
            for name, policy in policies:
                outcome = simulate(rest, policy, budget, on_miss=on_miss, warm=start)
                pool = policy.pool(rest.num_experts, budget)
                if start is not None:
                    pool.warm(start.counts()[0].astype(np.float64).tolist())
                took, loaded, stats = bench.play(pool, on_miss, rest.ids[:, 0], policy)
                rows.append(
                    [
                        str(budget),
                        name,
                        f"{outcome.hit_rate:.1%}",
                        f"{stats.hit_rate:.1%}",
                        str(outcome.loads),
                        str(loaded),
                        f"{tokens_per_second(outcome, costs):.0f}",
                        f"{rest.tokens / took:.0f}",
                    ]
                )
    return rows

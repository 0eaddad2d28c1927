"""Layers of a store that really run: what their kernels cost, and predictions beside them."""

from __future__ import annotations

import time

import numpy as np

from .. import _core
from .._offload_store import OffloadStore, Source
from .disk import Disk, DiskCosts, DiskOutcome
from .places import places_of
from .traces import Trace


def measure_costs(source: Source, disk: Disk) -> DiskCosts:
    """Measure the first layer of a model on this machine: a few experts, a token a call.

    Experts of a checkpoint are read through the page cache, and decoded, when they are cold: what a
    miss costs beside the disk.
    """
    store, few = _store_of(source)
    view = store.layers[0]
    block, num_experts = view.layer_index, view.up.num_experts
    nothing = _core.ExpertPool(num_experts, 0)
    with _core.MoeLayer.from_store(store, block, nothing) as cold:
        calls = _Calls(cold.config, few)
        calls.median(cold)  # the second time, the experts are in the page cache
        slow = calls.median(cold)
    copied = 0.0
    for _ in range(2):  # the second time, all threads are there
        store, _ = _store_of(source)
        counts = [one.up.num_experts for one in store.layers]
        residents = [
            _core.ExpertPool(count, few if i == 0 else 0) for i, count in enumerate(counts)
        ]
        begin = time.perf_counter()
        store.apply(residents)
        copied = time.perf_counter() - begin
    with _core.MoeLayer.from_store(store, block, residents[0]) as whole:
        fixed = calls.median(whole, skipped=True)
        fast = calls.median(whole)
    size = float(view.expert_bytes)
    read = calls.top_k * size
    return DiskCosts(
        size,
        disk,
        read / max(fast - fixed, 1e-9),
        read / max(slow - fixed, 1e-9),
        few * size / max(copied, 1e-9),
        fixed,
        stored_bytes=places_of(source).expert_bytes,
    )


def _store_of(source: Source) -> tuple[_core.MoeExpertStore, int]:
    """A store that has its experts in the page cache, and how many of a layer to measure with."""
    if isinstance(source, _core.GgufFile):
        store = _core.MoeExpertStore.from_gguf(source)
        config = _core.MoeConfig.from_gguf(source, source.moe_layers[0])
        return store, min(max(16, config.top_k), config.num_experts)
    first = source.layers[0]
    top_k = source.layer_arguments(first["block"], None, None)["config"].top_k
    # A call finds none of its experts in the buffers, which have those of the last one.
    store = _core.MoeExpertStore.from_safetensors(
        source, memory_limit=1 << 62, staging=max(2, top_k), read_ahead=0, direct_io=False
    )
    return store, min(max(16, 3 * top_k), first["shape"][0])


class _Calls:
    """Routings of a token on a few experts of a layer."""

    def __init__(self, config: _core.MoeConfig, few: int) -> None:
        rng = np.random.default_rng(0)
        self.top_k = config.top_k
        self._x = rng.standard_normal((1, config.hidden_size), np.float32)
        self._weights = np.full((1, config.top_k), 1 / config.top_k, np.float32)
        self._out = np.empty_like(self._x)
        # In turn, so that one comes again after all the others.
        order, count = rng.permutation(few).astype(np.int32), config.top_k
        self._ids = [
            np.take(order, np.arange(count) + i * count, mode="wrap")[None] for i in range(40)
        ]

    def median(self, layer: _core.MoeLayer, skipped: bool = False) -> float:
        """Return the seconds of a call; of one without experts where they are ``skipped``."""
        times = []
        for ids in self._ids:
            routing = _core.Routing(np.full_like(ids, -1) if skipped else ids, self._weights)
            begin = time.perf_counter()
            layer(self._x, routing=routing, out=self._out)
            times.append(time.perf_counter() - begin)
        return float(np.median(times[5:]))


def measure_store(store: OffloadStore, trace: Trace, warm: int) -> DiskOutcome:
    """Run the layers of a store on a trace, and return what ``simulate_disk`` predicts."""
    layers = [store.layer(block) for block in store.blocks[: trace.layers]]
    x = np.random.default_rng(0).standard_normal(
        (trace.tokens, layers[0].config.hidden_size), np.float32
    )
    weights = np.full(trace.ids.shape[2:], 1 / trace.ids.shape[3], np.float32)
    out = np.empty_like(x)
    begin = time.perf_counter()
    for step, ids in enumerate(trace.ids):
        if step == warm:
            for pool in store.pools:
                pool.reset_stats()
            begin = time.perf_counter()
        for layer, one in zip(layers, ids, strict=True):
            layer(x, routing=_core.Routing(one, weights), out=out)
    took = time.perf_counter() - begin
    steps = max(trace.steps - warm, 1)
    missed = sum(pool.stats.miss_experts for pool in store.pools)
    read = missed * places_of(store._origin[0]).expert_bytes / steps
    return DiskOutcome(steps * trace.tokens / took, store.hit_rate(), read, 0.0)

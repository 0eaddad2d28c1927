"""Layers of a store that really run: what their kernels cost, and predictions beside them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from .. import _core
from .._offload_store import OffloadStore, Source, disk_store
from .disk import Disk, DiskCosts, DiskOutcome
from .places import places_of
from .traces import Trace

#: Layers that latencies are measured on, at most.
_LAYERS = 8
#: Experts on their way from the disk, as in a store.
_BUFFERS = 16


def measure_costs(source: Source, disk: Disk) -> DiskCosts:
    """Measure the first layer of a model on this machine: a few experts, a token a call.

    Experts of a checkpoint that have to be decoded are read through the page cache when they are
    cold, and decoded: what a miss costs beside the disk.
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
    few = min(max(16, 3 * top_k), first["shape"][0])
    # Experts that are used as read stay in buffers. Others are decoded time and again, as in use:
    # a call finds none of its experts in the buffers, which have those of the last one.
    as_read = all(role["form"] == "rows" for role in first["roles"].values())
    store = _core.MoeExpertStore.from_safetensors(
        source, memory_limit=1 << 62, staging=max(2, few if as_read else top_k), read_ahead=0,
        direct_io=False,
    )  # fmt: skip
    return store, few


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


def measure_latency(
    source: Source, costs: DiskCosts, experts: Iterable[tuple[int, int]], calls: int = 40
) -> DiskCosts:
    """Return costs whose latency is what calls with misses took beside the rest of the model.

    A disk is not at its full bandwidth at the first of a call's reads, nor at the last, and threads
    have to wake up. Calls of a few layers miss ``experts``, half of what a token needs in each; an
    expert is the place of its layer in a store and its number there.
    """
    most = len(places_of(source).layers)
    chosen = set(range(0, most, -(-most // _LAYERS)))
    store = disk_store(source, memory_limit=1 << 62, staging=_BUFFERS, read_ahead=0)
    layers: dict[int, _core.MoeLayer] = {}
    waiting: dict[int, list[int]] = {}
    latencies: list[float] = []
    for place, expert in experts:
        if place not in chosen:
            continue
        if place not in layers:
            view = store.layers[place]
            nothing = _core.ExpertPool(view.up.num_experts, 0)
            layers[place] = _core.MoeLayer.from_store(store, view.layer_index, nothing)
        layer, ids = layers[place], waiting.setdefault(place, [])
        if expert not in ids:
            ids.append(expert)
        misses = max(1, layer.config.top_k // 2)
        if len(ids) < misses:
            continue
        del waiting[place]
        x = np.ones((1, layer.config.hidden_size), np.float32)
        routing = _core.Routing(np.array([ids], np.int32), np.ones((1, misses), np.float32))
        begin = time.perf_counter()
        layer(x, routing=routing)
        took = time.perf_counter() - begin
        known = replace(costs, disk=replace(costs.disk, latency=0.0), predicted=0.0)
        latencies.append(took - known.seconds(0, misses, 0))
        if len(latencies) == calls:
            break
    if not latencies:
        return costs
    latency = max(0.0, float(np.median(latencies)))
    return replace(costs, disk=replace(costs.disk, latency=latency))


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

"""From counts to time where experts are read from a disk: what ``open_store`` would do.

A layer asks for all of its misses at once and computes its residents meanwhile. Cold experts are
computed as they arrive, in slots where they got one; the last one has to wait until the disk is
done. With m misses, c of which get slots, a call of a layer takes

    disk  = latency + m * expert_bytes * amplification / bandwidth      (0 without misses)
    cold  = (m - c) * expert_bytes / slow + c * expert_bytes * (1 / move + 1 / fast)
    tail  = fixed + cold / m
    time  = tail + max(disk, hits * expert_bytes / fast + cold - cold / m) - ahead

where ``ahead`` is what a prediction saves: the share ``predicted`` of the disk's time falls into
the tail of the layer before, at most all of that.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import _core
from .._errors import error_of
from .._offload_store import OffloadStore
from .policies import POLICIES, OnMiss
from .traces import Trace

_BLOCK = 4096
_PIECE = 1 << 20


@dataclass(frozen=True)
class Disk:
    """What reads cost; ``measure_disk`` fills this in for the disk of a file."""

    bandwidth: float  #: bytes per second, with 16 requests of 1 MiB in flight
    latency: float = 1e-4  #: seconds until the first bytes of a request
    amplification: float = 1.0  #: bytes read over bytes asked for: whole blocks, and reads in vain


@dataclass(frozen=True)
class DiskCosts:
    """Of one machine and one model; bandwidths in bytes per second."""

    expert_bytes: float
    disk: Disk
    fast: float  #: kernels reading residents
    slow: float  #: kernels reading experts where they were read
    move: float  #: from there into slots
    fixed: float = 0.0  #: seconds per layer and step
    predicted: float = 0.0  #: share of the misses that a caller asks for a layer ahead, 0 to 1

    def seconds(self, hits: int, misses: int, placed: int) -> float:
        """Return the time of one call of a layer."""
        resident = hits * self.expert_bytes / self.fast
        if misses == 0:
            return self.fixed + resident
        read = misses * self.expert_bytes * self.disk.amplification
        disk = self.disk.latency + read / self.disk.bandwidth
        in_slots = placed * (1 / self.move + 1 / self.fast)
        cold = self.expert_bytes * ((misses - placed) / self.slow + in_slots)
        tail = self.fixed + cold / misses
        saved = min(self.predicted * disk, tail)
        return tail + max(disk, resident + cold - cold / misses) - saved


@dataclass(frozen=True)
class DiskOutcome:
    """Of a trace on the pools of a store."""

    tokens_per_second: float
    hit_rate: float  #: pairs on experts that were in memory
    missed_bytes: float  #: per step, all layers
    floor: float  #: tokens per second if only the disk took time


def simulate_disk(
    trace: Trace,
    budgets: Sequence[int],
    costs: DiskCosts,
    *,
    on_miss: OnMiss = "stage",
    warm: int = 0,
) -> DiskOutcome:
    """Play ``trace`` on pools as ``open_store`` makes them, one budget per layer of the trace.

    As there, slots start empty. The first ``warm`` steps are played and not counted.
    """
    if len(budgets) != trace.layers:
        raise error_of(
            _core.ShapeError, "simulate_disk", "budgets", f"{trace.layers}, one a layer",
            str(len(budgets)),
        )  # fmt: skip
    pools = [POLICIES["pool"].pool(trace.num_experts, budget) for budget in budgets]
    present = np.zeros((trace.layers, trace.num_experts), np.bool_)
    seconds = 0.0
    hits = pairs = missed = 0
    for step, layers in enumerate(trace.ids):
        for pool, there, ids in zip(pools, present, layers, strict=True):
            used, counts = np.unique(ids[ids >= 0], return_counts=True)
            resident = there[used]
            if on_miss == "stage":
                pool.stage(ids)
                there[used] = True
                there &= pool.resident_mask
            placed = int(there[used[~resident]].sum())
            if step < warm:
                continue
            misses = int((~resident).sum())
            hits += int(counts[resident].sum())
            pairs += int(counts.sum())
            missed += misses
            seconds += costs.seconds(int(resident.sum()), misses, placed)
    steps = max(trace.steps - warm, 1)
    read = missed * costs.expert_bytes
    tokens = steps * trace.tokens
    return DiskOutcome(
        tokens / max(seconds, 1e-30),
        hits / max(pairs, 1),
        read / steps,
        tokens * costs.disk.bandwidth / read if read else float("inf"),
    )


def measure_disk(file: _core.GgufFile, *, megabytes: int = 300, seed: int = 0) -> Disk:
    """Read random experts of a file past the page cache: 16 requests of up to 1 MiB in flight.

    Raises UnsupportedError where the file system has no such reads, OSError where a read fails.
    """
    if not hasattr(os, "O_DIRECT"):
        raise error_of(
            _core.UnsupportedError, "measure_disk", "system", "O_DIRECT", "none",
            "give the bandwidth instead",
        )  # fmt: skip
    tensors = [
        (tensor.shard, tensor.offset, tensor.nbytes, tensor.shape[0])
        for name, tensor in file.tensors.items()
        if name.endswith(("_exps.weight",))
    ]
    if not tensors:
        raise error_of(
            _core.UnsupportedError, "measure_disk", file.shard_paths[0], "experts in one tensor",
            "none",
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    wanted = asked = 0
    pieces: list[tuple[int, int, int]] = []
    while wanted < megabytes * 10**6:
        shard, offset, nbytes, count = tensors[rng.integers(len(tensors))]
        size = nbytes // count
        begin = offset + int(rng.integers(count)) * size
        first, end = begin // _BLOCK * _BLOCK, -(-(begin + size) // _BLOCK) * _BLOCK
        pieces += [(shard, at, min(_PIECE, end - at)) for at in range(first, end, _PIECE)]
        wanted += size
        asked += end - first
    try:
        descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in file.shard_paths]
    except OSError as error:
        raise error_of(
            _core.UnsupportedError, "measure_disk", file.shard_paths[0],
            "a file system with O_DIRECT", str(error), "give the bandwidth instead",
        ) from error  # fmt: skip
    try:
        latency = _latency(descriptors, pieces[:20])
        seconds = _read_all(descriptors, pieces, 16)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return Disk(asked / seconds, latency, asked / wanted)


def _latency(descriptors: list[int], pieces: list[tuple[int, int, int]]) -> float:
    """Return the median of single reads of a block."""
    times = []
    with mmap.mmap(-1, _BLOCK) as buffer:
        for shard, offset, _ in pieces:
            begin = time.perf_counter()
            os.preadv(descriptors[shard], [buffer], offset)
            times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _read_all(descriptors: list[int], pieces: list[tuple[int, int, int]], threads: int) -> float:
    """Return the seconds that all pieces take."""
    queue, lock = iter(pieces), threading.Lock()
    errors: list[OSError] = []

    def work() -> None:
        buffer = mmap.mmap(-1, _PIECE)
        while not errors:
            with lock:
                piece = next(queue, None)
            if piece is None:
                return
            try:
                os.preadv(descriptors[piece[0]], [memoryview(buffer)[: piece[2]]], piece[1])
            except OSError as error:
                errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - begin


def measure_costs(file: _core.GgufFile, disk: Disk) -> DiskCosts:
    """Measure the first layer of a file on this machine: a few experts, a token a call."""
    store = _core.MoeExpertStore.from_gguf(file)
    view = store.layers[0]
    config = _core.MoeConfig.from_gguf(file, view.layer_index)
    few = min(max(16, config.top_k), config.num_experts)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, config.hidden_size), np.float32)
    weights = np.full((1, config.top_k), 1 / config.top_k, np.float32)
    out = np.empty_like(x)
    routings = [rng.permutation(few)[None, : config.top_k].astype(np.int32) for _ in range(40)]
    skipped = [np.full_like(routings[0], -1)] * 40

    def median(layer: _core.MoeLayer, all_ids: list[npt.NDArray[np.int32]]) -> float:
        times = []
        for ids in all_ids:
            begin = time.perf_counter()
            layer(x, routing=_core.Routing(ids, weights), out=out)
            times.append(time.perf_counter() - begin)
        return float(np.median(times[5:]))

    def pools() -> list[_core.ExpertPool]:
        budgets = [few if i == 0 else 0 for i in range(store.num_layers)]
        counts = [one.up.num_experts for one in store.layers]
        return [_core.ExpertPool(*sizes) for sizes in zip(counts, budgets, strict=True)]

    nothing = _core.ExpertPool(config.num_experts, 0)
    with _core.MoeLayer.from_store(store, view.layer_index, nothing) as cold:
        median(cold, routings)  # the second time, the experts are in the page cache
        slow = median(cold, routings)
    copied = 0.0
    for _ in range(2):  # the second time, all threads are there
        store = _core.MoeExpertStore.from_gguf(file)
        residents = pools()
        begin = time.perf_counter()
        store.apply(residents)
        copied = time.perf_counter() - begin
    with _core.MoeLayer.from_store(store, view.layer_index, residents[0]) as whole:
        fixed = median(whole, skipped)
        fast = median(whole, routings)
    read = config.top_k * float(view.expert_bytes)
    return DiskCosts(
        float(view.expert_bytes),
        disk,
        read / max(fast - fixed, 1e-9),
        read / max(slow - fixed, 1e-9),
        few * float(view.expert_bytes) / max(copied, 1e-9),
        fixed,
    )


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
    read = missed * store.experts.layers[0].expert_bytes / steps
    return DiskOutcome(steps * trace.tokens / took, store.hit_rate(), read, 0.0)

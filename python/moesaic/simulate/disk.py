"""From counts to time where experts are read from a disk: what ``open_store`` would do.

A layer asks for all of its misses at once and computes its residents meanwhile. Cold experts are
computed as they arrive, in slots where they got one; the last one has to wait until the disk is
done. With m misses, c of which get slots, a call of a layer takes

    disk  = latency + m * stored_bytes * amplification / bandwidth      (0 without misses)
    cold  = (m - c) * expert_bytes / slow + c * expert_bytes * (1 / move + 1 / fast)
    tail  = fixed + cold / m
    time  = tail + max(disk, hits * expert_bytes / fast + cold - cold / m) - ahead

where ``ahead`` is what a prediction saves: the share ``predicted`` of the disk's time falls into
the tail of the layer before, at most all of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .. import _core
from .._errors import error_of
from .policies import POLICIES, OnMiss
from .traces import Trace


@dataclass(frozen=True)
class Disk:
    """What reads cost.

    ``measure_disk`` fills this in for the disk of a model, with the time until the first bytes of a
    request as its latency; ``measure_latency`` has all that calls of layers wait for.
    """

    bandwidth: float  #: bytes per second, with 16 requests of 1 MiB in flight
    latency: float = 1e-4  #: seconds that the reads of a call take beside their bytes
    amplification: float = 1.0  #: bytes read over bytes asked for: whole blocks, and reads in vain


@dataclass(frozen=True)
class DiskCosts:
    """Of one machine and one model; bandwidths in bytes per second."""

    expert_bytes: float  #: of an expert as kernels read it
    disk: Disk
    fast: float  #: kernels reading residents
    slow: float  #: kernels reading experts where they were read
    move: float  #: from there into slots
    fixed: float = 0.0  #: seconds per layer and step
    predicted: float = 0.0  #: share of the misses that a caller asks for a layer ahead, 0 to 1
    stored_bytes: float | None = None  #: of an expert in the file; None: as many as kernels read

    @property
    def bytes_of_miss(self) -> float:
        """What a miss asks the disk for."""
        return self.expert_bytes if self.stored_bytes is None else self.stored_bytes

    def seconds(self, hits: int, misses: int, placed: int) -> float:
        """Return the time of one call of a layer."""
        resident = hits * self.expert_bytes / self.fast
        if misses == 0:
            return self.fixed + resident
        read = misses * self.bytes_of_miss * self.disk.amplification
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
    read = missed * costs.bytes_of_miss
    tokens = steps * trace.tokens
    return DiskOutcome(
        tokens / max(seconds, 1e-30),
        hits / max(pairs, 1),
        read / steps,
        tokens * costs.disk.bandwidth / read if read else float("inf"),
    )

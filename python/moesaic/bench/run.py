"""Measures every engine at every point, in alternation, beside the machine's limits."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

import moesaic as mo
from moesaic import _core

from .engines import Moesaic
from .peers import PEERS, Peer, PeerUnavailable
from .shapes import BenchShape
from .weights import BenchLayer, answer_f64, make_layers

CACHE_BYTES = 256 << 20
ROUTINGS = 32
BUSY_TOKENS = (1, 16)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    ``seconds`` is the time per engine and point over all rounds; ``busy`` adds rows beside a
    process that never sleeps. No point is begun after ``deadline`` (time.monotonic()). ``device``
    ("cpu" or "metal") is where our layers run; on Metal each time is that of a whole call, waits
    included.
    """

    tokens: tuple[int, ...]
    threads: tuple[int, ...]
    peers: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("auto",)
    rounds: int = 7
    seconds: float = 1.0
    busy: bool = False
    seed: int = 1
    deadline: float | None = None
    device: str = "cpu"


@dataclass
class Point:
    """One engine at one number of tokens and threads."""

    engine: str
    tokens: int
    threads: int
    us: float
    spread: float  # (third quartile - first) / median, over rounds
    gb_per_s: float
    gop_per_s: float
    floor_us: float
    floor_kind: str
    rel_l2: float
    busy: bool = False
    floor_spread: float = 0.0  # of floor_us, as spread; 0 in results from before it was kept


@dataclass
class BenchResult:
    """Everything needed to print, plot and compare a run."""

    shape: dict[str, Any]
    machine: dict[str, Any]
    date: str
    command: str
    points: list[Point] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def out_of_time(self, deadline: float | None, left: str) -> bool:
        """Whether the deadline has passed; then ``left`` is what was not measured for it."""
        if deadline is None or time.monotonic() < deadline:
            return False
        self.absent["time limit"] = left
        return True


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            model = next(l.split(":", 1)[1].strip() for l in info if l.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cpu = next(b for b in mo.backends() if b.name == "cpu")
    gpu = [b.detail for b in mo.backends() if b.available and b.name == device != "cpu"]
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": cpu.detail,
        "system": platform.platform(),
        "python": platform.python_version(),
        "moesaic": mo.__version__,
    } | ({"gpu": gpu[0]} if gpu else {})


@contextmanager
def _busy_process(on: bool) -> Iterator[None]:
    """A competing process that never sleeps."""
    if not on:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def _routings(
    shape: BenchShape, tokens: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Uniform routings, so that the touched bytes are what the model's balance loss aims at."""
    out: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(ROUTINGS):
        ids = np.argsort(rng.random((tokens, shape.num_experts)), axis=1)[:, : shape.top_k]
        weights = rng.random((tokens, shape.top_k), dtype=np.float32) + 0.1
        weights /= weights.sum(axis=1, keepdims=True)
        out.append((np.ascontiguousarray(ids, np.int32), weights))
    return out


def _time(call: Callable[[int], object], seconds: float, at_least: int) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    index = 0
    while len(times) < at_least or time.perf_counter() < end:
        begin = time.perf_counter()
        call(index)
        times.append(time.perf_counter() - begin)
        index += 1
    return times


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Return the median, and the distance between the quartiles over it."""
    median = statistics.median(values)
    if len(values) < 2:
        return median, 0.0
    quartiles = statistics.quantiles(values, n=4)
    return median, (quartiles[2] - quartiles[0]) / median


def _relative(y: np.ndarray, answer: np.ndarray) -> float:
    return float(np.linalg.norm(y[: len(answer)] - answer) / np.linalg.norm(answer))


def _measure(
    layers: list[BenchLayer],
    engines: list[Peer],
    tokens: int,
    threads: int,
    busy: bool,
    options: BenchOptions,
) -> list[Point]:
    shape = layers[0].shape
    rng = np.random.default_rng(options.seed + tokens)
    x = rng.standard_normal((tokens, shape.hidden), dtype=np.float32)
    routings = _routings(shape, tokens, rng)
    touched = statistics.mean(len(np.unique(ids)) for ids, _ in routings)
    layer_bytes = touched * layers[0].expert_bytes
    gop = 2e-9 * shape.macs_per_pair * tokens * shape.top_k

    def call(engine: Peer, offset: int) -> Callable[[int], np.ndarray]:
        def one(index: int) -> np.ndarray:
            which = (offset + index) % ROUTINGS
            ids, weights = routings[which]
            return engine.run(which % len(layers), x, ids, weights)

        return one

    answer = answer_f64(layers[0], x, *routings[0])
    ready, errors = [], {}
    for engine in engines:
        try:
            engine.prepare(tokens, threads)
        except PeerUnavailable:
            continue
        errors[engine.name] = _relative(call(engine, 0)(0), answer)
        ready.append(engine)

    rounds: dict[str, list[float]] = {engine.name: [] for engine in ready}
    floors: list[tuple[float, str]] = []
    with _busy_process(busy):
        for r in range(options.rounds):
            if not busy:
                bandwidth = _core.measure_bandwidth(threads)
                floor = (layer_bytes / bandwidth * 1e-3, "memory")
                if options.device == "cpu":  # what a GPU could compute is not known here
                    peak = _core.measure_dot_peak(threads)
                    floor = max(floor, (gop / peak * 1e6, "compute"))
                floors.append(floor)
            for i in range(len(ready)):
                engine = ready[(i + r) % len(ready)]
                times = _time(call(engine, 5 * r), options.seconds / options.rounds, 2)
                rounds[engine.name].append(statistics.median(times) * 1e6)

    floor_us, floor_spread = median_and_spread([f for f, _ in floors]) if floors else (nan, 0.0)
    floor_kind = floors[0][1] if floors else "none"
    points = []
    for engine in ready:
        us, spread = median_and_spread(rounds[engine.name])
        points.append(
            Point(
                engine.name,
                tokens,
                threads,
                us,
                spread,
                layer_bytes / us * 1e-3,
                gop / us * 1e6,
                floor_us,
                floor_kind,
                errors[engine.name],
                busy,
                floor_spread,
            )
        )
    return points


def run(
    shape: BenchShape,
    options: BenchOptions,
    on_point: Callable[[list[Point], BenchResult], None] | None = None,
) -> BenchResult:
    """Measures one shape.

    ``on_point`` is called with the engines of each finished point, and the result so far.
    """
    command = " ".join(["moesaic", *sys.argv[1:]])
    today = datetime.date.today().isoformat()
    result = BenchResult(asdict(shape), machine(options.device), today, command)
    one = make_layers(shape, 1, options.seed)
    layer_bytes = shape.num_experts * one[0].expert_bytes
    layers = make_layers(shape, max(2, int(np.ceil(CACHE_BYTES / layer_bytes))), options.seed)

    engines: list[Peer] = []
    ours = [Moesaic(p, options.device) for p in options.precisions]
    for entry in ours:
        if entry is ours[0]:
            entry.load(layers)
        else:
            entry.share(ours[0])
        engines.append(entry)
    for name in options.peers:
        try:
            peer = PEERS[name]()
            peer.load(layers)
        except PeerUnavailable as error:
            result.absent[name] = str(error)
            continue
        engines.append(peer)
    try:
        plan = [
            (threads, tokens, False) for threads in options.threads for tokens in options.tokens
        ]
        if options.busy:
            plan += [(max(options.threads), tokens, True) for tokens in BUSY_TOKENS]
        for i, (threads, tokens, busy) in enumerate(plan):
            left = f"from {tokens} tokens, {threads} threads on: {len(plan) - i} points"
            if result.out_of_time(options.deadline, left):
                break
            points = _measure(layers, engines, tokens, threads, busy, options)
            result.points += points
            if on_point:
                on_point(points, result)
    finally:
        for engine in engines:
            engine.close()
    return result

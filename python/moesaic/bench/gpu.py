"""The bench on a GPU: CUDA graphs of many layers, so that no weight is still in the L2 cache.

One graph holds a whole layer (route to combine) of each of several stacks, whose touched weights
exceed the cache several times over. Engines replay their graphs in alternation; the times are those
of CUDA events around a replay, divided by its layers. Needs torch.
"""

from __future__ import annotations

import datetime
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import moesaic as mo
from moesaic._errors import error_of

from .engines import load_stacks
from .peers import PeerUnavailable
from .peers.humming_gpu import HummingPeer
from .peers.torch_gpu import GpuPeer, TorchGroupedPeer
from .run import BenchResult, machine
from .shapes import BenchShape
from .weights import BenchLayer, answer_f64, make_layers

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
REPLAYS = 20
CACHES = 4  # the touched weights of a graph, in L2 sizes
MAX_LAYERS = 48
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class GpuOptions:
    """What to measure on which device; ``peers`` are names of :data:`PEERS`.

    No point is begun after ``deadline`` (time.monotonic()).
    """

    device: str
    tokens: tuple[int, ...]
    peers: tuple[str, ...] = ()
    rounds: int = 5
    seed: int = 1
    deadline: float | None = None


@dataclass
class GpuPoint:
    """One engine at one number of tokens; ``us`` is the median per layer over all replays."""

    engine: str
    tokens: int
    layers: int
    experts_touched: float
    us: float
    p10: float
    p90: float
    floor_us: float
    floor_kind: str
    gb_per_s: float
    tflop_per_s: float
    rel_l2: float


class _Ours:
    """The layer with given logits; routing, plan, products and sum are all in the graph."""

    name = "moesaic"

    def __init__(self, torch: Any, device: str, layer: BenchLayer, count: int) -> None:
        self._torch = torch
        self._stacks = [load_stacks([layer], device)[0] for _ in range(count)]
        self._top_k = layer.shape.top_k

    def prepare(self, xs: list[Any], logits: list[Any]) -> Callable[[int], Any]:
        tokens = xs[0].shape[0]
        workspace = mo.Workspace.for_stack(self._stacks[0], self._top_k, tokens)
        outs = [self._torch.empty_like(x) for x in xs]

        def call(i: int) -> Any:
            return mo.moe_forward(
                xs[i],
                logits[i],
                self._stacks[i],
                top_k=self._top_k,
                out=outs[i],
                workspace=workspace,
            )

        return call


#: Name on the command line -> maker(torch, device, layer, count).
PEERS: dict[str, type[GpuPeer]] = {
    "torch-grouped": TorchGroupedPeer,
    "humming-int4": HummingPeer,
}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise error_of(
            mo.UnsupportedError, "bench", "device", "torch", "none", "pip install torch"
        ) from error
    if not torch.cuda.is_available():
        raise error_of(mo.DeviceError, "bench", "device", "a GPU that torch sees", "none")
    return torch


def _event_us(torch: Any, work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _limits(torch: Any, device: str) -> tuple[float, float]:
    """Bytes per us of a large copy (read and written), bf16 flop per us of a large product."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = [_event_us(torch, lambda: target.copy_(source)) for _ in range(10)]
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    products = [_event_us(torch, lambda: a @ b) for _ in range(10)]
    return 2 * source.numel() / statistics.median(copies), 2 * n**3 / statistics.median(products)


def _capture(torch: Any, call: Callable[[int], Any], count: int) -> Any:
    """A graph of ``count`` calls, after a warm-up outside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(count):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    return graph


def _layers_needed(shape: BenchShape, tokens: int, expert_bytes: float, l2: int) -> int:
    missed = (1 - min(1.0, shape.top_k / shape.num_experts)) ** tokens
    touched = shape.num_experts * (1 - missed) * expert_bytes
    return max(2, min(MAX_LAYERS, int(np.ceil(CACHES * l2 / touched))))


def _measure(
    torch: Any, engines: list[Any], layer: BenchLayer, tokens: int, count: int,
    options: GpuOptions, limits: tuple[float, float],
) -> tuple[list[GpuPoint], dict[str, str]]:  # fmt: skip
    shape = layer.shape
    rng = np.random.default_rng(options.seed + tokens)
    host = rng.standard_normal((count, tokens, shape.hidden), dtype=np.float32)
    scores = rng.standard_normal((count, tokens, shape.num_experts), dtype=np.float32)
    xs = [torch.from_numpy(x).to(options.device, torch.bfloat16) for x in host]
    logits = [torch.from_numpy(s).to(options.device) for s in scores]
    routings = [mo.route(s, top_k=shape.top_k) for s in scores]
    touched = statistics.mean(len(np.unique(r.topk_ids)) for r in routings)
    layer_bytes = touched * layer.expert_bytes
    flop = 2 * shape.macs_per_pair * tokens * shape.top_k
    first = xs[0][:CHECKED_TOKENS].float().cpu().numpy()
    answer = answer_f64(
        layer,
        first,
        routings[0].topk_ids[:CHECKED_TOKENS],
        routings[0].topk_weights[:CHECKED_TOKENS],
    )

    ready: list[tuple[str, Any, float]] = []
    failed: dict[str, str] = {}
    for engine in engines:
        try:
            call = engine.prepare(xs, logits)
            y = call(0)[:CHECKED_TOKENS].float().cpu().numpy()
            error = float(np.linalg.norm(y - answer) / np.linalg.norm(answer))
            ready.append((engine.name, _capture(torch, call, count), error))
        except PeerUnavailable as reason:
            failed[engine.name] = str(reason)
    times: dict[str, list[float]] = {name: [] for name, _, _ in ready}
    for r in range(options.rounds):
        for i in range(len(ready)):
            name, graph, _ = ready[(i + r) % len(ready)]
            graph.replay()
            times[name] += [_event_us(torch, graph.replay) / count for _ in range(REPLAYS)]

    bandwidth, peak = limits
    floor = max((layer_bytes / bandwidth, "memory"), (flop / peak, "compute"))
    points = []
    for name, _, error in ready:
        deciles = statistics.quantiles(times[name], n=10)
        us = statistics.median(times[name])
        points.append(
            GpuPoint(
                name, tokens, count, touched, us, deciles[0], deciles[-1], *floor,
                layer_bytes / us * 1e-3, flop / us * 1e-6, error,
            )
        )  # fmt: skip
    return points, failed


def run(
    shape: BenchShape,
    options: GpuOptions,
    on_point: Callable[[list[GpuPoint], BenchResult], None] | None = None,
) -> BenchResult:
    """Measures one shape on ``options.device``. Raises UnsupportedError, DeviceError.

    ``on_point`` is called with the engines of each finished point, and the result so far.
    """
    backend = next((b for b in mo.backends() if b.available and options.device in b.devices), None)
    if backend is None:
        reasons = "; ".join(f"{b.name}: {b.reason}" for b in mo.backends() if not b.available)
        expected = "an available one"
        raise error_of(mo.DeviceError, "bench", "device", expected, options.device, reasons)
    torch = _torch()
    with torch.cuda.device(options.device), torch.inference_mode():
        properties = torch.cuda.get_device_properties(options.device)
        limits = _limits(torch, options.device)
        facts = machine() | {
            "gpu": backend.detail,
            "torch": torch.__version__,
            "copy_gb_per_s": limits[0] * 1e-3,
            "bf16_tflop_per_s": limits[1] * 1e-6,
        }
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        result = BenchResult(asdict(shape), facts, datetime.date.today().isoformat(), command)
        layer = make_layers(shape, 1, options.seed)[0]
        l2 = int(properties.L2_cache_size)
        counts = {t: _layers_needed(shape, t, layer.expert_bytes, l2) for t in options.tokens}
        engines: list[Any] = [_Ours(torch, options.device, layer, max(counts.values()))]
        for name in options.peers:
            try:
                engines.append(PEERS[name](torch, options.device, layer, max(counts.values())))
            except (PeerUnavailable, torch.OutOfMemoryError) as reason:
                result.absent[name] = str(reason)
        for i, tokens in enumerate(options.tokens):
            left = ", ".join(map(str, options.tokens[i:])) + " tokens"
            if result.out_of_time(options.deadline, left):
                break
            points, failed = _measure(
                torch, engines, layer, tokens, counts[tokens], options, limits
            )
            result.points += points  # type: ignore[arg-type]
            result.absent |= failed
            if on_point:
                on_point(points, result)
    return result


_HEAD = (
    "engine", "tokens", "experts", "limit us", "us/layer", "p10", "p90", "time/limit", "GB/s",
    "TFLOP/s", "error",
)  # fmt: skip

LEGEND = """\
experts: how many the tokens used, on average. us/layer: median; p10, p90: deciles over replays.
limit us: the least time that the memory bandwidth or the bf16 compute rate allow, as measured here;
time/limit: 1 is as fast as this GPU can be. error: relative L2, against f64 on decoded weights."""


def lines(points: Iterable[GpuPoint], head: bool = True) -> str:
    """Aligned text rows."""
    rows = [_HEAD] if head else []
    for p in points:
        rows.append(
            (
                p.engine, str(p.tokens), f"{p.experts_touched:.1f}",
                f"{p.floor_us:.1f} {p.floor_kind}", f"{p.us:.1f}", f"{p.p10:.1f}",
                f"{p.p90:.1f}", f"{p.us / p.floor_us:.2f}", f"{p.gb_per_s:.0f}",
                f"{p.tflop_per_s:.1f}", f"{p.rel_l2:.1e}",
            )
        )  # fmt: skip
    widths = (16, 8, 9, 16, 10, 10, 10, 12, 8, 9, 10)
    return "\n".join(
        "".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    )


def markdown(result: dict[str, Any]) -> str:
    """One table per shape: a row per number of tokens, a column per engine."""
    points = [GpuPoint(**p) for p in result["points"]]
    engines = list(dict.fromkeys(p.engine for p in points))
    shape, facts = result["shape"], result["machine"]
    out = [
        f"{shape['name']}: H {shape['hidden']}, I {shape['intermediate']}, "
        f"{shape['num_experts']} experts, top-{shape['top_k']}, {shape['gate_up_type']} gate/up, "
        f"{shape['down_type']} down, bf16 x. {facts['gpu']}; "
        f"copy {facts['copy_gb_per_s']:.0f} GB/s, bf16 {facts['bf16_tflop_per_s']:.0f} TFLOP/s; "
        f"{result['date']}; `{result['command']}`.",
        "",
        "| tokens | experts used | limit us | "
        + " | ".join(f"{e} us (error)" for e in engines)
        + " |",
        "|--:|--:|--:|" + "--:|" * len(engines),
    ]
    for tokens in dict.fromkeys(p.tokens for p in points):
        at = {p.engine: p for p in points if p.tokens == tokens}
        any_point = next(iter(at.values()))
        cells = [f"{at[e].us:.1f} ({at[e].rel_l2:.0e})" if e in at else "" for e in engines]
        out.append(
            f"| {tokens} | {any_point.experts_touched:.0f} | {any_point.floor_us:.1f} | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    if result["absent"]:
        out += [
            "",
            "Not measured: " + "; ".join(f"{k} ({v})" for k, v in result["absent"].items()) + ".",
        ]
    return "\n".join(out)

"""``moesaic demo [FILE]``: every path of a layer, timed and checked with the reference."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import moesaic as mo

from .inputs import other_inputs, rows
from .models import choose_layer, config_facts, open_model
from .options import add_json, add_layer, add_model
from .table import size, table

F32 = npt.NDArray[np.float32]

# The largest relative L2 error against the reference that counts as correct.
BOUND_ONE_TOKEN = 2e-3
BOUND = 2e-2


@dataclass(frozen=True)
class More:
    """What a layer is called with whose routing takes more than x."""

    inputs: dict[str, Any]  # of MoeLayer.__call__
    routing: mo.Routing | None  # that they lead to, for functions which do not take them


NOTHING_MORE = More({}, None)


@dataclass(frozen=True)
class Way:
    """One way to run the layer, as named in the table."""

    name: str
    call: Callable[..., Any]  # (x, layer, out, workspace), and a More where there is one
    settings: dict[str, Any]  # of mo.tuning, under which explain() describes this way
    bound: float = BOUND


def any_path(
    x: F32, layer: mo.MoeLayer, out: F32, workspace: mo.Workspace, more: More = NOTHING_MORE
) -> None:
    layer(x, out=out, workspace=workspace, **more.inputs)


def token_by_token(
    x: F32, layer: mo.MoeLayer, out: F32, workspace: mo.Workspace, more: More = NOTHING_MORE
) -> None:
    for t in range(x.shape[0]):
        layer(x[t : t + 1], out=out[t : t + 1], workspace=workspace, **rows(more.inputs, t, t + 1))


def planned(
    gemm: Literal["bucketed", "aligned"], row_space: Literal["token_pairs", "packed_rows"]
) -> Way:
    def call(
        x: F32, layer: mo.MoeLayer, out: F32, workspace: mo.Workspace, more: More = NOTHING_MORE
    ) -> None:
        mo.moe_forward_bucketed(
            x,
            None,
            layer,
            routing=more.routing,
            gemm=gemm,
            row_space=row_space,
            out=out,
            workspace=workspace,
        )

    return Way(f"{gemm}, {row_space}", call, {"gemm": gemm, "row_space": row_space})


WAYS = (
    Way("one token at a time", token_by_token, {}, BOUND_ONE_TOKEN),
    Way("moe_forward", any_path, {}),
    planned("bucketed", "token_pairs"),
    planned("bucketed", "packed_rows"),
    planned("aligned", "token_pairs"),
    planned("aligned", "packed_rows"),
)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    way: str
    tokens: int
    seconds: float
    weight_bytes: float
    error: float
    bound: float
    kernel: str

    @property
    def good(self) -> bool:
        return self.error <= self.bound  # false for NaN

    def cells(self) -> list[str]:
        error = f"{self.error:.1e}" if self.bound else "-"  # the reference has nothing to be off
        error += "" if self.good else f" > {self.bound:.0e}"
        rate = f"{self.weight_bytes / self.seconds / 1e9:.1f}"
        return [self.way, str(self.tokens), f"{self.seconds * 1e6:.0f}", rate, error, self.kernel]

    def facts(self) -> dict[str, Any]:
        """The JSON form; the reference has no error."""
        rate = self.weight_bytes / self.seconds
        error = {"rel_l2": self.error, "bound": self.bound} if self.bound else {}
        head = {"path": self.way, "tokens": self.tokens, "seconds": self.seconds}
        return {**head, "bytes_per_second": rate, **error, "good": self.good, "kernel": self.kernel}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, optional=True)
    add_layer(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    name = options.file or "a file made for this demo"
    results: list[Result] = []
    precisions: list[str] = []
    with source(options.file) as path, open_model(path) as model:
        index = choose_layer(model, options.layer)
        with model.open(index) as layer:
            if not options.json:
                print(describe(layer, name, index))
            for tokens in (1, 64):
                x = inputs(tokens, layer.config.hidden_size)
                other = other_inputs(layer, tokens, seed=7)
                _, routing = layer(x, return_routing=True, **other)
                results += measure(layer, x, routing, other)
                precisions.append(precision(layer, tokens))
            bars = histogram(routing, layer.config.num_experts)
            sizes = config_facts(layer.config)
    bad = [r for r in results if not r.good]
    if options.json:
        found = {"path": name, **sizes, "results": [r.facts() for r in results]}
        print(json.dumps(found, indent=2))
        return 1 if bad else 0
    header = ("path", "tokens", "us/layer", "GB/s", "rel. error", "kernel (gate, up, down)")
    print(table(header, [r.cells() for r in results], left=(header[-1],)))
    print("GB/s: bytes of the experts used, over time. rel. error: L2, against the reference.")
    print("A pair is a token and one of its experts.")
    print("\n".join(precisions))
    print("\n" + bars)
    print(f"\n{len(results) - len(bad)} of {len(results)} results within their bound")
    return 1 if bad else 0


@contextlib.contextmanager
def source(file: str | None) -> Iterator[str]:
    """Yield `file`, or the path of a temporary Qwen3-MoE shaped one."""
    if file is not None:
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="moesaic-demo-") as folder:
        path = Path(folder) / "demo.gguf"
        mo.testing.write_moe_gguf(
            path,
            num_experts=32,
            top_k=8,
            hidden=2048,
            intermediate=512,
            gate_type="Q4_K",
            up_type="Q4_K",
            down_type="Q6_K",
            seed=1,
        )
        yield str(path)


def describe(layer: mo.MoeLayer, name: str, index: int) -> str:
    """Return the head: where the layer comes from, its sizes and types, what runs it."""
    c = layer.config
    types = ", ".join(f"{r.role} {r.kept}" for r in layer.report.roles)
    cpu = next((b for b in mo.backends() if b.name == "cpu"), None)
    return (
        f"{name}: {c.architecture}, layer {index}\n"
        f"H {c.hidden_size}, I {c.intermediate_size}, E {c.num_experts}, top_k {c.top_k}; {types}; "
        f"{size(layer.stack.nbytes)}\n"
        f"cpu: {cpu.detail if cpu else 'absent'}\n"
    )


def inputs(tokens: int, hidden: int) -> F32:
    return np.random.default_rng(7).standard_normal((tokens, hidden), dtype=np.float32)


def measure(
    layer: mo.MoeLayer, x: F32, routing: mo.Routing, other: dict[str, Any] | None = None
) -> list[Result]:
    """Run every way on `x`; the reference comes first and is what the others are compared with."""
    tokens = x.shape[0]
    expert_bytes = layer.stack.bytes_per_expert
    touched = len(np.unique(routing.topk_ids)) * expert_bytes
    started = time.perf_counter()
    reference = mo.moe_forward_cpu(x, routing, layer)
    took = time.perf_counter() - started
    results = [Result("reference", tokens, took, touched, 0.0, 0.0, "scalar f32")]
    workspace = mo.Workspace.for_layer(layer, max_tokens=tokens)
    more = (More(other, routing),) if other else ()
    for way in WAYS:
        if way.call is token_by_token and tokens == 1:
            continue  # moe_forward is the same
        out = np.full_like(x, np.nan)
        seconds = median_seconds(partial(way.call, x, layer, out, workspace, *more))
        single = way.call is token_by_token
        bound = BOUND_ONE_TOKEN if tokens == 1 and way.call is any_path else way.bound
        with mo.tuning(**way.settings):
            facts = mo.explain(layer, num_tokens=1 if single else tokens)
        name = f"{way.name} ({facts['path']})" if not way.settings else way.name
        used = routing.topk_ids.size * expert_bytes if single else touched
        error = relative_error(out, reference)
        results.append(Result(name, tokens, seconds, used, error, bound, kernels(facts)))
    return results


def median_seconds(call: Callable[[], None], budget: float = 0.25) -> float:
    """Return the median time of a call after one warm-up, over at least 3 calls."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 50):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def relative_error(y: F32, reference: F32) -> float:
    want = reference.astype(np.float64)
    return float(np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want))


def kernels(facts: dict[str, str]) -> str:
    """Return the distinct kernel names of an explanation, in its order."""
    names = [value for fact, value in facts.items() if "kernel" in fact]
    return ", ".join(dict.fromkeys(names))


def precision(layer: mo.MoeLayer, tokens: int) -> str:
    """Return one line: which precision so many tokens run with, and why."""
    facts = mo.explain(layer, num_tokens=tokens)
    noun = "token" if tokens == 1 else "tokens"
    return f"{tokens} {noun}: precision {facts['precision']}, {facts['precision reason']}."


def histogram(routing: mo.Routing, num_experts: int, lines: int = 16) -> str:
    """Return tokens per expert as bars; experts share a line when there are more than `lines`."""
    counts = np.bincount(routing.topk_ids[routing.topk_ids >= 0], minlength=num_experts)
    step = -(-num_experts // lines)
    sums = [int(counts[i : i + step].sum()) for i in range(0, num_experts, step)]
    scale = 40 / max(*sums, 40)
    noun = "token" if routing.num_tokens == 1 else "tokens"
    head = f"Pairs per expert, {routing.num_tokens} {noun} x top_k {routing.top_k}"
    if step > 1:
        head += f", {step} experts a line"
    bars = [f"{i * step:5d} {n:5d} {'#' * round(n * scale)}".rstrip() for i, n in enumerate(sums)]
    return "\n".join([head, *bars])

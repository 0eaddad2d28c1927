"""``moesaic simulate-offload``: hit rate and tokens per second of pools, before buying the memory.

With a file, its sizes and a disk are simulated (``simulate_file``). With ``--measure`` the same
policies also run on real layers of this machine, beside the prediction.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import moesaic as mo
from moesaic._errors import error_of

from .options import add_json, integer, memories, number, rate, words
from .table import filled, table

if TYPE_CHECKING:
    from ..simulate import Costs, Outcome, Trace

OPERATION = "simulate-offload"
MADE = ("zipf", "drift")  # traces that are made here
HEADER = ("budget", "policy", "hit rate", "experts loaded", "MiB/step", "tokens/s")
LEGEND = """\
budget: experts of a layer in fast memory. hit rate: pairs (token and expert) whose expert was
there. loaded: brought to fast memory, over all steps and layers. tokens/s: by the layers alone,
without attention and the rest of a model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..simulate import POLICIES

    parser.add_argument("file", nargs="?", help="a GGUF file or a folder, read from a disk")
    parser.add_argument(
        "--memory", type=memories, metavar="SIZE,SIZE",
        help="of a file: such as 12GiB,24GiB, as in open_store",
    )  # fmt: skip
    parser.add_argument(
        "--disk", type=rate, metavar="RATE", help="of a file: such as 3GB/s (default: measured)"
    )
    parser.add_argument(
        "--latency-us", type=number(0), help="of a file: a call's reads beside bytes (measured)"
    )
    parser.add_argument(
        "--predicted", type=number(0, 1), default=0.0,
        help="of a file: share of the misses that is prefetched a layer ahead (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=integer(1), default=512, help="of a file: of a call (default: 512)"
    )
    parser.add_argument(
        "--trace", default="zipf", help="zipf (default), drift, or a file by `trace --save-trace`"
    )
    parser.add_argument("--experts", type=integer(1), default=128, help="E (default: 128)")
    parser.add_argument("--top-k", type=integer(1), default=8, help="default: 8")
    parser.add_argument(
        "--layers", type=integer(1), default=1, help="layers of a made trace (default: 1)"
    )
    parser.add_argument("--steps", type=integer(1), default=400, help="forwards (default: 400)")
    parser.add_argument(
        "--tokens", type=integer(1), default=1, help="tokens a forward (default: 1)"
    )
    parser.add_argument(
        "--seeds", type=integer(1), default=5, help="made traces, median (default: 5)"
    )
    parser.add_argument(
        "--warm",
        type=number(0, 0.99),
        default=0.1,
        help="share of the steps that warms pools (default: 0.1)",
    )
    parser.add_argument(
        "--budgets", default="1/8,1/4,1/2", help="experts, or shares (default: 1/8,1/4,1/2)"
    )
    parser.add_argument(
        "--policies",
        type=words(list(POLICIES)),
        default=list(POLICIES),
        help=f"default: all of {', '.join(POLICIES)}",
    )
    parser.add_argument(
        "--on-miss", choices=["compute", "stage"], default="stage", help="default: stage"
    )
    parser.add_argument(
        "--expert-mib", type=number(0, above=True), default=2.7, help="one expert (default: 2.7)"
    )
    parser.add_argument(
        "--fast", type=number(0, above=True), default=40.0, help="GB/s from fast memory (40)"
    )
    parser.add_argument(
        "--slow", type=number(0, above=True), default=10.0, help="GB/s where experts lie (10)"
    )
    parser.add_argument(
        "--move", type=number(0, above=True), default=5.0, help="GB/s into fast memory (5)"
    )
    parser.add_argument("--fixed-us", type=number(0), default=20.0, help="us a layer and step (20)")
    parser.add_argument(
        "--measure", action="store_true", help="calibrate on this machine and run real layers too"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a markdown table")
    add_json(form)


def run(options: argparse.Namespace) -> int:
    from ..simulate import POLICIES, Costs

    if (options.file is None) != (options.memory is None):
        missing = "FILE" if options.file is None else "--memory"
        raise error_of(mo.ConfigError, OPERATION, missing, "beside the other one", "none")
    if options.file is not None:
        from . import simulate_file

        return simulate_file.run(options)
    if options.top_k > options.experts and options.trace in MADE:
        expected, got = f"at most --experts, {options.experts}", str(options.top_k)
        raise error_of(mo.ConfigError, OPERATION, "--top-k", expected, got)
    costs = Costs(
        options.expert_mib * (1 << 20),
        options.fast * 1e9,
        options.slow * 1e9,
        options.move * 1e9,
        options.fixed_us * 1e-6,
    )
    traces = make_traces(options)
    header: tuple[str, ...] = HEADER
    if options.measure:
        from ..simulate import measure

        header = measure.HEADER
        rows = measure.compare(
            traces[0], [(p, POLICIES[p]) for p in options.policies], budgets(options, traces[0]),
            warm=options.warm, on_miss=options.on_miss,
        )  # fmt: skip
    else:
        rows = [
            [
                str(budget),
                name,
                *figures([simulate_one(t, name, budget, options) for t in traces], costs),
            ]
            for budget in budgets(options, traces[0])
            for name in options.policies
        ]
    if options.json:
        cells = [dict(zip(header, map(plain, row), strict=True)) for row in rows]
        print(json.dumps(cells, indent=2))
        return 0
    print((markdown if options.markdown else table)(header, rows))
    print("\n" + filled(LEGEND))
    return 0


def make_traces(options: argparse.Namespace) -> list[Trace]:
    from ..simulate import Trace, drifting, zipf

    kinds: dict[str, Callable[..., Trace]] = {"zipf": zipf, "drift": drifting}
    if options.trace not in kinds:
        return [Trace.load(options.trace)]
    return [
        kinds[options.trace](
            steps=options.steps,
            num_experts=options.experts,
            top_k=options.top_k,
            layers=options.layers,
            tokens=options.tokens,
            seed=seed,
        )
        for seed in range(options.seeds)
    ]


def budgets(options: argparse.Namespace, trace: Trace) -> list[int]:
    """Parse "1/8,32": shares of E, or experts."""
    result = []
    for part in options.budgets.split(","):
        try:
            top, _, bottom = part.partition("/")
            result.append(trace.num_experts * int(top) // int(bottom) if bottom else int(top))
        except (ValueError, ZeroDivisionError):
            result.append(-1)
        if not 0 <= result[-1] <= trace.num_experts:
            expected = f"0 to {trace.num_experts} experts or shares, such as 1/8,32"
            raise error_of(mo.ConfigError, OPERATION, "--budgets", expected, repr(part))
    return result


def simulate_one(trace: Trace, policy: str, budget: int, options: argparse.Namespace) -> Outcome:
    from ..simulate import POLICIES, simulate

    warm, rest = trace.split(options.warm)
    return simulate(
        rest, POLICIES[policy], budget, on_miss=options.on_miss, warm=warm if warm.steps else None
    )


def figures(outcomes: list[Outcome], costs: Costs) -> list[str]:
    """Return the medians over traces as table cells."""
    from ..simulate import tokens_per_second

    loads = statistics.median(o.loads for o in outcomes)
    step = statistics.median(o.loads / o.steps for o in outcomes) * costs.expert_bytes / (1 << 20)
    rate = statistics.median(tokens_per_second(o, costs) for o in outcomes)
    hit_rate = statistics.median(o.hit_rate for o in outcomes)
    return [f"{hit_rate:.1%}", f"{loads:.0f}", f"{step:.1f}", f"{rate:.1f}"]


def plain(cell: str) -> str | int | float:
    """Return a cell of the table for JSON: a number, a share as a fraction, or a name."""
    if cell.endswith("%"):
        return round(float(cell[:-1]) / 100, 6)
    for number_of in (int, float):
        try:
            return number_of(cell)
        except ValueError:
            continue
    return cell


def markdown(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """Return a markdown table, numbers to the right."""
    rule = ["---:"] * len(header)
    lines = [list(header), rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

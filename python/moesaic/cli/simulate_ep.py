"""``moesaic simulate-ep``: loads, bytes, memory and time of a layer on up to 1,000 ranks."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

import moesaic as mo
from moesaic._errors import error_of

from .options import add_json, integer, integers, network, number
from .table import size, table

HEADER = (
    "ranks", "slots", "busiest rank", "ranks a token", "experts read", "sent", "memory",
    "dispatch", "experts", "combine", "sum",
)  # fmt: skip
LEGEND = """\
slots: experts of a rank. busiest rank: its pairs over those of the average one. experts read: by
the rank that touches most. sent: bytes out of the rank that sends most. memory: experts of a rank,
all layers. The times are those of one layer and step in ms, by a model of latency and bandwidth."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", default="zipf", help="zipf (default) or a file by `trace --save-trace`"
    )
    parser.add_argument("--experts", type=integer(1), default=256, help="E (default: 256)")
    parser.add_argument("--top-k", type=integer(1), default=8, help="default: 8")
    parser.add_argument("--exponent", type=number(0), default=0.7, help="of zipf (default: 0.7)")
    parser.add_argument("--ranks", type=integers(1), default=[4, 16, 64], help="such as 4,16,1000")
    parser.add_argument(
        "--spare", type=number(0), default=0.25, help="slots for copies, over E (default: 0.25)"
    )
    parser.add_argument("--tokens", type=integer(1), default=32, help="of a rank (default: 32)")
    parser.add_argument("--steps", type=integer(1), default=8, help="default: 8")
    parser.add_argument("--layers", type=integer(1), default=58, help="of the model (default: 58)")
    parser.add_argument("--hidden", type=integer(1), default=7168, help="H (default: 7168)")
    parser.add_argument(
        "--expert-mib", type=number(0, above=True), default=25.2, help="one expert (default: 25.2)"
    )
    parser.add_argument(
        "--x-bytes", type=integer(1, 4), default=2, help="of an element of x (default: 2)"
    )
    parser.add_argument(
        "--combine", choices=["exact", "partial"], default="exact", help="default: exact"
    )
    parser.add_argument(
        "--net", type=network, metavar="LATENCY,BYTES_PER_S", help="default: 50e-6,1.1e9"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of the trace")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..distributed import Shape, estimate, plan_experts

    shape = Shape(options.hidden, int(options.expert_mib * (1 << 20)), options.x_bytes)
    rows = []
    for ranks in options.ranks:
        ids, experts = trace_of(options, ranks)
        counts = np.bincount(ids[ids >= 0], minlength=experts)
        slots = -(-int(experts * (1 + options.spare)) // ranks)
        placement = plan_experts(counts, ranks, max(slots, 1))
        found = estimate(ids, placement, shape, options.net, combine=options.combine)
        rows.append({"slots": slots, **asdict(found), "seconds": found.seconds})
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(table(HEADER, [cells(row, options.layers) for row in rows]))
    print()
    print(LEGEND)
    return 0


def trace_of(options: argparse.Namespace, ranks: int) -> tuple[npt.NDArray[np.int32], int]:
    """Ids [steps, tokens of all ranks, top_k] and E."""
    tokens = options.tokens * ranks
    if options.trace == "zipf":
        if options.top_k > options.experts:
            expected, got = f"at most {options.experts}", str(options.top_k)
            raise error_of(mo.ConfigError, "simulate-ep", "--top-k", expected, got)
        rng = np.random.default_rng(options.seed)
        logits = -options.exponent * np.log(rng.permutation(np.arange(1, options.experts + 1)))
        steps = []
        for _ in range(options.steps):
            noisy = logits + rng.gumbel(size=(tokens, options.experts))
            top = np.argpartition(-noisy, options.top_k - 1, axis=1)[:, : options.top_k]
            steps.append(top.astype(np.int32))
        return np.stack(steps), options.experts
    from ..simulate import Trace

    trace = Trace.load(options.trace)
    flat = trace.ids[:, 0].reshape(-1, trace.ids.shape[3])
    if not len(flat):
        expected, got = "a trace with tokens", "one without"
        raise error_of(mo.ShapeError, "simulate-ep", options.trace, expected, got)
    # What was recorded comes again where there are more tokens than it has.
    need = options.steps * tokens
    again = np.resize(np.arange(len(flat)), need)
    return flat[again].reshape(options.steps, tokens, -1), trace.num_experts


def cells(row: dict[str, float], layers: int) -> list[str]:
    times = [row[name] * 1e3 for name in ("dispatch_s", "experts_s", "combine_s", "seconds")]
    return [
        str(row["ranks"]),
        str(row["slots"]),
        f"{row['imbalance']:.2f}",
        f"{row['ranks_per_token']:.1f}",
        f"{row['touched']:.1f}",
        size(int(row["sent_bytes"])),
        size(int(row["memory_bytes"]) * layers),
        *(f"{ms:.2f}" for ms in times),
    ]

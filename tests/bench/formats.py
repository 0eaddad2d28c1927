"""Every weight format at the Qwen3-30B-A3B shape, each beside ggml, and beside Q4_K of its minute.

`python tests/bench/formats.py` writes formats/<date>.json; readme_tables.py shows the last one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from pathlib import Path

import moesaic as mo
from moesaic.bench import SHAPES, BenchOptions, run
from moesaic.bench.run import BenchResult

RESULTS = Path(__file__).parent / "formats"
SHAPE = SHAPES["qwen3-30b-a3b"]
BASE = "Q4_K"
TOKENS = (1, 512)


def measure(quant: str) -> BenchResult:
    shape = dataclasses.replace(SHAPE, gate_up_type=quant, down_type=quant)
    threads = len(os.sched_getaffinity(0))
    peers = () if quant == BASE else ("ggml",)
    return run(shape, BenchOptions(TOKENS, (threads,), peers, rounds=5, seconds=0.5))


def main() -> None:
    cpu = next(backend for backend in mo.backends() if backend.name == "cpu")
    types = dict.fromkeys(kernel.type for kernel in cpu.kernels)
    rows = []
    before = measure(BASE)
    for quant in (t for t in types if t not in (BASE, "INT4")):
        own, after = measure(quant), measure(BASE)
        ggml = {p.tokens: p for p in own.points if p.engine.startswith("ggml")}
        for i, point in enumerate(p for p in own.points if p.engine == "moesaic"):
            speed = "gb_per_s" if point.tokens == 1 else "gop_per_s"
            base = statistics.mean(getattr(r.points[i], speed) for r in (before, after))
            peer = ggml.get(point.tokens)
            rows.append(
                {
                    "type": quant,
                    "tokens": point.tokens,
                    "threads": point.threads,
                    "us": point.us,
                    "spread": point.spread,
                    "speed": getattr(point, speed),
                    "of_base": getattr(point, speed) / base,
                    "rel_l2": point.rel_l2,
                    "ggml_us": peer and peer.us,
                    "ggml_rel_l2": peer and peer.rel_l2,
                }
            )
            print(rows[-1], flush=True)
        before = after
    facts = {"shape": SHAPE.name, "base": BASE, "machine": own.machine, "date": own.date}
    text = json.dumps({**facts, "rows": rows}, indent=1) + "\n"
    (RESULTS / f"{own.date}.json").write_text(text)


if __name__ == "__main__":
    main()

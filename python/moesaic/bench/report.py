"""A bench result as text, as Markdown, and against a baseline."""

from __future__ import annotations

import math
from typing import Any

from .run import BenchResult, Point

_HEAD = (
    "engine", "threads", "tokens", "us/layer", "spread", "GB/s", "GOP/s", "time/limit", "error",
)  # fmt: skip

LEGEND = """\
us/layer: median over rounds; spread: distance between the quartiles, over the median.
GB/s: bytes of the experts that were used, over the time; GOP/s: two operations per multiply-add.
time/limit: the time over the least that the memory bandwidth and the dot-product rate measured in
the same rounds allow; 1 is as fast as this machine can be.
error: relative L2, against f64 on the decoded weights."""


def _row(point: Point) -> tuple[str, ...]:
    ratio = "" if point.floor_us != point.floor_us else f"{point.us / point.floor_us:.2f}"
    return (
        point.engine + (" (busy)" if point.busy else ""),
        str(point.threads),
        str(point.tokens),
        f"{point.us:,.0f}",
        f"{100 * point.spread:.0f} %",
        f"{point.gb_per_s:.1f}",
        f"{point.gop_per_s:.0f}",
        ratio,
        f"{point.rel_l2:.1e}",
    )


def lines(points: list[Point], head: bool = True) -> str:
    """Aligned text rows."""
    rows = ([_HEAD] if head else []) + [_row(p) for p in points]
    widths = (22, 8, 7, 11, 8, 7, 7, 11, 9)
    return "\n".join(
        "".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    )


def markdown(result: dict[str, Any]) -> str:
    """Return a table: a row per threads and tokens, a column per engine (us, spread, error)."""
    points = [Point(**p) for p in result["points"]]
    engines = list(dict.fromkeys(p.engine for p in points if not p.busy))
    shape, machine = result["shape"], result["machine"]
    out = [
        f"{shape['name']}: H {shape['hidden']}, I {shape['intermediate']}, "
        f"{shape['num_experts']} experts, top-{shape['top_k']}, "
        f"{shape['gate_up_type']} gate/up, {shape['down_type']} down. "
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['isa']}; {result['date']}; "
        f"`{result['command']}`.",
        "",
        "Microseconds per layer: median over rounds, ± the distance between their quartiles "
        "(relative L2 error against f64 on the decoded weights). The limit is the least time that "
        "the machine allows, by what the same rounds measured: bytes of the experts used over "
        "streaming bandwidth, or operations over the integer dot-product peak.",
        "",
        "| " + " | ".join(["threads", "tokens", "limit", *engines, "time / limit"]) + " |",
        "|--:|--:|--:|" + "--:|" * (len(engines) + 1),
    ]
    keys = dict.fromkeys((p.threads, p.tokens, p.busy) for p in points)
    for threads, tokens, busy in keys:
        at = {
            p.engine: p for p in points if (p.threads, p.tokens, p.busy) == (threads, tokens, busy)
        }
        best = min(p.us for p in at.values())
        cells = []
        for engine in engines:
            p = at.get(engine)
            text = "" if p is None else f"{p.us:,.0f} ±{100 * p.spread:.0f} % ({p.rel_l2:.0e})"
            cells.append(f"**{text}**" if p is not None and p.us == best else text)
        ours = at.get("moesaic")
        known = ours is not None and ours.floor_us == ours.floor_us
        limit = f"{ours.floor_us:,.0f}" if known and ours else ""
        ratio = f"{ours.us / ours.floor_us:.2f}" if known and ours else ""
        label = f"{tokens} (one busy process)" if busy else str(tokens)
        out.append(f"| {threads} | {label} | {limit} | " + " | ".join(cells) + f" | {ratio} |")
    if result["absent"]:
        out += [
            "",
            "Not installed: " + "; ".join(f"{k} ({v})" for k, v in result["absent"].items()) + ".",
        ]
    return "\n".join(out)


def compare(result: BenchResult, baseline: dict[str, Any], tolerance: float = 0.10) -> list[str]:
    """Return points slower than the baseline, by more than ``tolerance`` and all spreads together.

    A time is judged over the limit of its own run, since a slower machine hour is no regression.
    But the limit is measured too, so that its spread counts as that of the times does; and what
    took no longer than before is never slower.
    """
    before = {(p["engine"], p["tokens"], p["threads"], p["busy"]): p for p in baseline["points"]}
    slower = []
    for p in result.points:
        old = before.get((p.engine, p.tokens, p.threads, p.busy))
        if old is None or not p.engine.startswith("moesaic"):
            continue
        scale = old["floor_us"] / p.floor_us if p.floor_us == p.floor_us else 1.0
        ratio = p.us * scale / old["us"]
        spreads = (p.spread, old["spread"], p.floor_spread, old.get("floor_spread", 0.0))
        allowed = max(tolerance, math.sqrt(sum(spread**2 for spread in spreads)))
        if p.us > old["us"] and ratio > 1 + allowed:
            slower.append(
                f"{p.engine}, {p.tokens} tokens, {p.threads} threads: {old['us']:,.0f} -> "
                f"{p.us:,.0f} us ({ratio:.2f}x at equal limits)"
            )
    return slower

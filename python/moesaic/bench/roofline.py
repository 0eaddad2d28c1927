"""The roofline picture of a result."""

from __future__ import annotations

from typing import Any

from moesaic._plots import new_figure


def plot(result: dict[str, Any], path: str) -> None:
    """Write us per layer over tokens, with the machine's limit, as PNG.

    Raises UnsupportedError without matplotlib (the extra ``plot``).
    """
    points = [p for p in result["points"] if not p["busy"]]
    threads = sorted({p["threads"] for p in points})
    figure = new_figure("bench", (6 * len(threads), 4.5), "tight")
    axes = figure.subplots(1, len(threads), squeeze=False)
    for axis, count in zip(axes[0], threads, strict=True):
        here = [p for p in points if p["threads"] == count]
        for engine in dict.fromkeys(p["engine"] for p in here):
            rows = sorted((p["tokens"], p["us"]) for p in here if p["engine"] == engine)
            axis.plot(*zip(*rows, strict=True), marker="o", label=engine)
        floor = sorted({(p["tokens"], p["floor_us"]) for p in here})
        axis.plot(*zip(*floor, strict=True), "k--", label="limit of the machine")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="us per layer")
        axis.set_title(f"{result['shape']['name']}, {count} thread{'s' if count > 1 else ''}")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)

"""Recorded results: one file, a folder with one file per date, and what they say over time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moesaic as mo
from moesaic._errors import error_of
from moesaic._plots import new_figure

OPERATION = "bench"
FORMAT = 1


def save(results: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write results and return the file.

    A folder gets a file named after the date of the results. What was measured earlier that day
    stays in it, except for runs of the same command, shape and machine, which are replaced.
    """
    path = Path(path)
    if path.is_dir():
        path = path / f"{results[-1]['date']}.json"
        if path.exists():
            new = [_identity(result) for result in results]
            results = [*(old for old in load(path) if _identity(old) not in new), *results]
    path.write_text(to_text(results), encoding="utf-8")
    return path


def to_text(results: Sequence[dict[str, Any]]) -> str:
    """The content of a file of results."""
    return json.dumps({"format": FORMAT, "results": list(results)}, indent=1) + "\n"


def load(path: str | Path) -> list[dict[str, Any]]:
    """Return the results of one file. Raises FormatError, FileNotFoundError, OSError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        results = [dict(result, shape=dict(result["shape"])) for result in content["results"]]
        for result in results:
            _identity(result)
            Entry.of(result)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = f"a result of moesaic bench --json, format {FORMAT}"
        got = f"{type(error).__name__}: {error}"[:80]
        raise error_of(mo.FormatError, OPERATION, str(path), expected, got) from error
    return results


def load_folder(folder: str | Path) -> list[dict[str, Any]]:
    """Return the results of every file of a folder, oldest first. Raises as load() does."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        expected = "a folder with results (<date>.json)"
        raise error_of(mo.FormatError, OPERATION, str(folder), expected, "none")
    results = [result for file in files for result in load(file)]
    return sorted(results, key=lambda result: str(result["date"]))


def _device(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return str(machine.get("gpu") or f"{machine['cpu']}, {machine['isa']}")


def _identity(result: dict[str, Any]) -> tuple[object, ...]:
    return result["command"], sorted(result["shape"].items()), _device(result)


@dataclass(frozen=True)
class Entry:
    """One point of one date."""

    date: str
    shape: str
    device: str
    engine: str
    threads: int  #: 0 on a GPU
    tokens: int
    us: float
    limit_us: float
    error: float

    @staticmethod
    def of(result: dict[str, Any]) -> list[Entry]:
        """Return the points of a result that were measured on an idle machine."""
        facts = result["shape"]
        shape = f"{facts['name']} {facts['gate_up_type']}/{facts['down_type']}"
        return [
            Entry(
                result["date"], shape, _device(result), p["engine"], p.get("threads", 0),
                p["tokens"], p["us"], p["floor_us"], p["rel_l2"],
            )
            for p in result["points"]
            if not p.get("busy")
        ]  # fmt: skip


def history(results: Iterable[dict[str, Any]]) -> list[Entry]:
    """Return our engines' points in an order in which those of one kind follow each other."""
    entries = [entry for result in results for entry in Entry.of(result)]
    ours = [entry for entry in entries if entry.engine.startswith("moesaic")]
    return sorted(ours, key=lambda e: (e.shape, e.device, e.engine, e.threads, e.tokens, e.date))


HISTORY_HEADER = (
    "layer", "device", "engine", "threads", "tokens", "date", "us/layer", "time/limit", "error",
)  # fmt: skip


def history_rows(entries: Iterable[Entry]) -> list[list[str]]:
    """Return rows of HISTORY_HEADER."""
    return [
        [
            e.shape, e.device, e.engine, str(e.threads or "-"), str(e.tokens), e.date,
            f"{e.us:,.0f}", f"{e.us / e.limit_us:.2f}", f"{e.error:.0e}",
        ]
        for e in entries
    ]  # fmt: skip


def plot_history(entries: Sequence[Entry], path: str | Path) -> None:
    """Write a PNG with one panel per layer and device: time over the machine's limit, by date.

    The limit was measured in the same minutes, so a faster machine hour does not look like faster
    code. Panels show the default precision and the largest number of threads. Raises
    UnsupportedError without matplotlib (the extra ``plot``), FormatError when there are none.
    """
    panels: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.engine == "moesaic":
            panels.setdefault((entry.shape, entry.device), []).append(entry)
    if not panels:
        expected = "results of the default precision"
        raise error_of(mo.FormatError, OPERATION, "--history", expected, "none")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(OPERATION, (4.5 * columns + 1.5, 3.4 * rows), "constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    axes = list(grid.flat)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    from matplotlib import colormaps

    dates = sorted({entry.date for entry in entries})
    counts = sorted({entry.tokens for entry in entries})
    colours = colormaps["viridis"]
    shade = {count: colours(0.9 * i / max(len(counts) - 1, 1)) for i, count in enumerate(counts)}
    shown: dict[int, Any] = {}
    for axis, ((shape, device), here) in zip(axes, panels.items(), strict=False):
        most = max(entry.threads for entry in here)
        lines: dict[int, list[Entry]] = {}
        for entry in here:
            if entry.threads == most:
                lines.setdefault(entry.tokens, []).append(entry)
        for tokens, line in lines.items():
            at = [dates.index(entry.date) for entry in line]
            ratios = [entry.us / entry.limit_us for entry in line]
            (shown[tokens],) = axis.plot(at, ratios, marker="o", color=shade[tokens])
        axis.axhline(1, color="grey", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(dates)), dates, rotation=30, ha="right")
        axis.set_xlim(-0.5, len(dates) - 0.5)
        axis.set_ylabel("time / limit")
        threads = f", {most} thread{'' if most == 1 else 's'}" if most else ""
        axis.set_title(f"{shape}\n{device}{threads}", fontsize=9)
        axis.grid(True, alpha=0.3)
    labels = [str(count) for count in sorted(shown)]
    handles = [shown[count] for count in sorted(shown)]
    figure.legend(handles, labels, title="tokens", loc="outside right upper")
    figure.suptitle("Time of a layer over the least time that the machine allows (1: as fast)")
    figure.savefig(path, dpi=120)

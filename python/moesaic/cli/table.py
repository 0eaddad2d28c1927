"""Plain text tables and sizes."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Return aligned columns; those named in `left`, and the first, are flush left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    flush_left = [i == 0 or name in left for i, name in enumerate(header)]

    def text(line: Sequence[str]) -> str:
        cells = zip(line, widths, flush_left, strict=True)
        return "  ".join(c.ljust(w) if at_left else c.rjust(w) for c, w, at_left in cells).rstrip()

    return "\n".join([text(lines[0]), "  ".join("-" * w for w in widths), *map(text, lines[1:])])


def pairs(entries: Sequence[tuple[str, str]]) -> str:
    """Return "name  value" lines with aligned values."""
    width = max((len(name) for name, _ in entries), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in entries)


def size(nbytes: float) -> str:
    """Return a size in binary units: "18.4 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")

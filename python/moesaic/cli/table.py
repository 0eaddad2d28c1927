"""Plain text tables and sizes."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

#: The least that a column of words is wrapped to.
_NARROWEST = 10


def terminal_width() -> int | None:
    """Columns of the terminal that is printed to, or as COLUMNS says; None: no terminal."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"]) or None
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """Return aligned columns; those named in `left`, and the first, are flush left.

    Words are wrapped to `width`, or that of the terminal; numbers never are. Where they alone take
    more, each row becomes lines of names and values.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    flush_left = [i == 0 or name in left for i, name in enumerate(header)]
    limit = width if width is not None else terminal_width()
    if limit is not None:
        _narrow(widths, flush_left, header, limit)
        if sum(widths) + 2 * (len(widths) - 1) > limit:
            return _records(header, rows)

    def text(line: Sequence[str]) -> str:
        cells = [
            textwrap.wrap(cell, size, drop_whitespace=True) or [""] if len(cell) > size else [cell]
            for cell, size in zip(line, widths, strict=True)
        ]
        out = []
        for i in range(max(map(len, cells))):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            columns = zip(parts, widths, flush_left, strict=True)
            out.append(
                "  ".join(c.ljust(w) if at_left else c.rjust(w) for c, w, at_left in columns)
            )
        return "\n".join(line.rstrip() for line in out)

    return "\n".join([text(lines[0]), "  ".join("-" * w for w in widths), *map(text, lines[1:])])


def _narrow(widths: list[int], words: Sequence[bool], header: Sequence[str], limit: int) -> None:
    """Take from the widest columns of words what is too much."""
    columns = [i for i, at_left in enumerate(words) if at_left]
    while sum(widths) + 2 * (len(widths) - 1) > limit:
        widest = max(columns, key=lambda i: widths[i])
        if widths[widest] <= max(_NARROWEST, len(header[widest].split(" ")[0])):
            return
        widths[widest] -= 1


def _records(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n\n".join(pairs(list(zip(header, row, strict=True))) for row in rows)


def pairs(entries: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Return "name  value" lines with aligned values, which are wrapped to the width."""
    indent = max((len(name) for name, _ in entries), default=0) + 2
    limit = width if width is not None else terminal_width()
    room = None if limit is None or limit - indent < 2 * _NARROWEST else limit - indent
    lines = []
    for name, value in entries:
        wrapped = [value] if room is None or len(value) <= room else textwrap.wrap(value, room)
        for i, part in enumerate(wrapped):
            lines.append(f"{(name if i == 0 else '').ljust(indent)}{part}".rstrip())
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Return a size in binary units: "18.4 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")

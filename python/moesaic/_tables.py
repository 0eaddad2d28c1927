"""Plain text tables, for values that print as one and for the command line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

#: The least that a column of words is wrapped to.
_NARROWEST = 10


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[str] | None = None,
    width: int | None = None,
) -> str:
    """Return aligned columns; those named in ``left``, and the first, are flush left, None: all.

    Words are wrapped to ``width``, None: never; numbers never are. Where they alone take more, each
    row becomes lines of names and values.
    """
    if not header:
        return ""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    flush_left = [i == 0 or left is None or name in left for i, name in enumerate(header)]
    if width is not None:
        _narrow(widths, flush_left, header, width)
        if sum(widths) + 2 * (len(widths) - 1) > width:
            return _records(header, rows, width)

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


def _records(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    return "\n\n".join(pairs(list(zip(header, row, strict=True)), width) for row in rows)


def pairs(entries: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Return "name  value" lines with aligned values, wrapped to ``width``, None: never."""
    indent = max((len(name) for name, _ in entries), default=0) + 2
    room = None if width is None or width - indent < 2 * _NARROWEST else width - indent
    lines = []
    for name, value in entries:
        wrapped = [value] if room is None or len(value) <= room else textwrap.wrap(value, room)
        for i, part in enumerate(wrapped):
            lines.append(f"{(name if i == 0 else '').ljust(indent)}{part}".rstrip())
    return "\n".join(lines)


def filled(text: str, width: int | None = None) -> str:
    """Return words as a paragraph, wrapped where a line is wider than ``width``, None: never."""
    if width is None or max(map(len, text.splitlines()), default=0) <= width:
        return text
    return textwrap.fill(" ".join(text.split()), max(width, _NARROWEST))

"""Tables as wide as the terminal, and sizes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

from moesaic import _tables


def terminal_width() -> int | None:
    """Columns of the terminal that is printed to, or as COLUMNS says; None: no terminal."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"]) or None
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def filled(text: str) -> str:
    """Return words as a paragraph, wrapped to the terminal where they are wider."""
    return _tables.filled(text, terminal_width())


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """Return aligned columns within ``width``, None: that of the terminal.

    Those named in ``left``, and the first, are flush left.
    """
    return _tables.table(header, rows, left, width or terminal_width())


def pairs(entries: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Return "name  value" lines within ``width``, None: that of the terminal."""
    return _tables.pairs(entries, width or terminal_width())


def size(nbytes: float) -> str:
    """Return a size in binary units: "18.4 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")

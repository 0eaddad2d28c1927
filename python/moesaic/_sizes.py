"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from moesaic import _core
from moesaic._errors import error_of
from moesaic._files import shown

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([KMGT]?)(i?B)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Bytes of "64GiB", "64G", "1.5T" or "1000000", units being powers of 1024; None: of none."""
    match = _FORM.fullmatch(text)
    value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    return int(value) if 1 <= value < 2**62 else None


def bytes_of(operation: str, what: str, size: str | int) -> int:
    """A size that a caller gave. Raises ConfigError for what is none."""
    value = parse_size(size) if isinstance(size, str) else size
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**62:
        expected = "bytes, or a size such as '12GiB'"
        raise error_of(_core.ConfigError, operation, what, expected, shown(size))
    return value

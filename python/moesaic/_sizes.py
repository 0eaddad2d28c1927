"""Sizes of memory as people write them."""

from __future__ import annotations

import re

import numpy as np

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


def bytes_of(operation: str, what: str, size: object) -> int:
    """A size that a caller gave. Raises DTypeError and ConfigError for what is none."""
    expected = "bytes, or a text such as '12GiB'"
    if isinstance(size, str):
        value = parse_size(size)
    elif isinstance(size, int | np.integer) and not isinstance(size, bool):
        value = int(size) if 1 <= size < 2**62 else None
    else:
        raise error_of(_core.DTypeError, operation, what, expected, type(size).__name__)
    if value is None:
        raise error_of(_core.ConfigError, operation, what, expected, shown(size))
    return value

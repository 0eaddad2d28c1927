"""Files that a conversion reads by position."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic._files import open_regular, read_at
from moesaic.saving.convert.plan import OPERATION
from moesaic.saving.tensors import Array


class Shards:
    """The files of a GGUF file, read by position: a mapping would fill memory with its pages."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(open_regular(Path(path))) for path in paths]

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, shard: int, offset: int, count: int) -> Array:
        """Bytes of a shard; threads may read at the same time. Raises FormatError at its end."""
        data = np.empty(count, np.uint8)
        if missing := read_at(self._files[shard], data.data, offset):
            what, expected = f"shard {shard}", f"{missing} more bytes"
            raise error_of(_core.FormatError, OPERATION, what, expected, "its end")
        return data

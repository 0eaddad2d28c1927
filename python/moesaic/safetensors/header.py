"""The header of one safetensors file: which tensors it holds, and where.

Nothing is believed: sizes are compared with the file, and no byte belongs to two tensors, so that
what a header asks for is never larger than its file.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moesaic._files import MAX_JSON, open_regular, read_into, shown, size_of
from moesaic.safetensors.errors import wrong
from moesaic.safetensors.parsing import parse_json

DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "I32": np.int32, "F32": np.float32,
    "U64": np.uint64, "I64": np.int64, "F64": np.float64, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
    "F8_E8M0": np.uint8,
}  # fmt: skip
_ITEM_SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
_MAX_RANK = 8
_MAX_NAME = 4096
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class TensorEntry(NamedTuple):
    """Where a tensor lies: its file, type name, shape and absolute byte range."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(Mapping[str, TensorEntry]):
    """The tensors of one file by name. What an entry says is checked when it is asked for."""

    def __init__(self, path: Path, facts: dict[str, Any], first: int, size: int) -> None:
        self._path, self._facts, self._first, self._size = path, facts, first, size
        if not _all_plain(facts, size - first):
            self._explain()

    def __getitem__(self, name: str) -> TensorEntry:
        return _entry(self._path, name, self._facts[name], self._first, self._size)

    def __contains__(self, name: object) -> bool:
        return name in self._facts

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def _explain(self) -> None:
        """Raises FormatError for the first tensor that is wrong, or shares bytes."""
        entries = {}
        for name in self._facts:
            if len(name) > _MAX_NAME or _HALF_PAIR.search(name):
                raise wrong(
                    f"{self._path} header",
                    f"names of at most {_MAX_NAME} Unicode characters",
                    repr(name[:80]),
                )
            entries[name] = self[name]
        _check_apart(entries)


def read_header(path: Path) -> Header:
    """The tensors of one file. Raises FormatError for a header that is not what the format says."""
    with open_regular(path) as file:
        return header_of(path, file)


def header_of(path: Path, file: BinaryIO) -> Header:
    """``read_header`` of a file that is open."""
    where, size = f"{path} header", size_of(file)
    prefix = file.read(8)
    length, limit = int.from_bytes(prefix, "little"), min(max(size - 8, 0), MAX_JSON)
    if len(prefix) < 8 or length > limit:
        raise wrong(where, f"at most {limit} bytes", length)
    data = bytearray(length)
    if missing := read_into(file, memoryview(data)):
        raise wrong(where, f"{missing} more bytes", "the end of the file")
    facts = parse_json(bytes(data), where)
    facts.pop("__metadata__", None)
    return Header(path, facts, 8 + length, size)


def _all_plain(facts: dict[str, Any], size: int) -> bool:
    """Whether all names are fine and every tensor has ``size`` bytes' room to itself.

    Over whole arrays, as a file may have 10^5 tensors; where it says no, a look at each says why.
    """
    if not facts:
        return True
    try:
        "".join(facts).encode()
        longest = max(map(len, facts))
        rank = max([len(one["shape"]) for one in facts.values()])
        spans = np.array([one["data_offsets"] for one in facts.values()])
    except (TypeError, KeyError, ValueError, OverflowError):
        return False
    if longest > _MAX_NAME or rank > _MAX_RANK:
        return False
    if spans.dtype != np.int64 or spans.ndim != 2 or spans.shape[1] != 2:
        return False
    begin, end = spans[np.argsort(spans[:, 0], kind="stable")].T
    if begin[0] < 0 or (begin > end).any() or (end > size).any():
        return False
    stored = begin < end
    return bool((end[stored][:-1] <= begin[stored][1:]).all())


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _entry(path: Path, name: str, facts: Any, first: int, size: int) -> TensorEntry:
    """The entry of one tensor; ``first`` is where the data begins, ``size`` that of the file."""

    def bad(what: str, expected: str, got: object) -> Exception:
        return wrong(f"{path}: tensor {name!r}{what}", expected, _shown(got))

    if not isinstance(facts, dict):
        raise bad("", "an object", type(facts).__name__)
    dtype, shape, offsets = facts.get("dtype"), facts.get("shape"), facts.get("data_offsets")
    if not isinstance(dtype, str):
        raise bad(" dtype", "a type name", dtype)
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_size, shape)):
        raise bad(" shape", f"at most {_MAX_RANK} sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise bad(" data_offsets", "[begin, end]", offsets)
    begin, end = first + offsets[0], first + offsets[1]
    if not begin <= end <= size:
        raise bad(" data_offsets", f"a range within {size - first} bytes", offsets)
    item_size = _ITEM_SIZES.get(dtype)
    if item_size is not None:
        needed = item_size
        for dim in shape:
            needed *= dim
        if end - begin != needed:
            raise bad(" data_offsets", f"{needed} bytes for {dtype} {shape}", end - begin)
    return TensorEntry(path, dtype, tuple(shape), begin, end)


def _shown(value: object) -> str:
    if isinstance(value, list) and len(value) > _MAX_RANK:
        return f"a list of {len(value)}"
    return shown(value)


def _check_apart(entries: dict[str, TensorEntry]) -> None:
    """Raises FormatError where two tensors share bytes, which no writer of the format makes."""
    stored = [(entry.begin, entry.end, name) for name, entry in entries.items()]
    stored.sort()
    last_end, last_name = 0, ""
    for begin, end, name in stored:
        if begin < last_end and end > begin:
            raise wrong(
                f"{entries[name].path}: tensor {name!r} data_offsets",
                f"bytes of its own, from {last_end} of the file on",
                f"those from {begin} on, of which {last_name!r} has some",
            )
        if end > last_end:
            last_end, last_name = end, name

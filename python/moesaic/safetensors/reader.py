"""The safetensors container, read without the ``safetensors`` package.

A header of names, then one ``read`` per tensor or per expert of it, so that a load holds little
more than its result.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic import _core

Array = npt.NDArray[Any]

_MAX_HEADER = 100 << 20  # as the format's reference implementation
_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "I32": np.int32, "F32": np.float32,
    "U64": np.uint64, "I64": np.int64, "F64": np.float64, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
    "F8_E8M0": np.uint8,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")


def wrong(where: str, expected: str, got: object) -> _core.FormatError:
    return _core.FormatError(f"load_from_safetensors: {where}: expected {expected}, got {got}")


def unsupported(where: str, expected: str, got: object) -> _core.UnsupportedError:
    return _core.UnsupportedError(f"load_from_safetensors: {where}: expected {expected}, got {got}")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, type name, shape and absolute byte range."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} twice")
    return found


def read_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise wrong(where, "a JSON object", error) from None
    if not isinstance(value, dict):
        raise wrong(where, "a JSON object", type(value).__name__)
    return value


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises FormatError for a header that is not what the format says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise wrong(
                f"{path} header", f"at most {min(max(size - 8, 0), _MAX_HEADER)} bytes", length
            )
        header = read_json(file.read(length), f"{path} header")
    first = 8 + length
    entries = {}
    for name, facts in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, facts, first, size)
    return entries


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(path: Path, name: str, facts: Any, first: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(facts, dict):
        raise wrong(where, "an object", type(facts).__name__)
    dtype, shape, offsets = (facts.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise wrong(f"{where} dtype", "a type name", repr(dtype))
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise wrong(f"{where} shape", "sizes", repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise wrong(f"{where} data_offsets", "[begin, end]", repr(offsets)[:80])
    begin, end = first + offsets[0], first + offsets[1]
    if not begin <= end <= size:
        raise wrong(f"{where} data_offsets", f"a range within {size - first} bytes", offsets)
    if dtype in _DTYPES:
        elements = 1
        for dim in shape:
            elements *= dim
        needed = elements * np.dtype(_DTYPES[dtype]).itemsize
        if end - begin != needed:
            raise wrong(f"{where} data_offsets", f"{needed} bytes for {dtype} {shape}", end - begin)
    return TensorEntry(path, dtype, tuple(shape), begin, end)


class Checkpoint:
    """The tensors and configuration of a model: a folder, one file, or an index file.

    Raises FileNotFoundError, and FormatError for malformed headers or an index that disagrees
    with them.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        self.folder = path if path.is_dir() else path.parent
        self.tensors: dict[str, TensorEntry] = {}
        index = self._index_of(path)
        if index is not None:
            self._read_index(index)
            return
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(2, "No .safetensors file in", str(path))
        for file in files:
            for name, entry in read_header(file).items():
                if name in self.tensors:
                    raise wrong(
                        f"{file}: tensor {name!r}",
                        "a name that no other file has",
                        f"the same in {self.tensors[name].path}",
                    )
                self.tensors[name] = entry

    @staticmethod
    def _index_of(path: Path) -> Path | None:
        if path.is_file():
            return path if path.name.endswith(".json") else None
        found = sorted(path.glob("*.safetensors.index.json"))
        if len(found) > 1:
            raise wrong(str(path), "one index file", ", ".join(file.name for file in found))
        return found[0] if found else None

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index.read_bytes(), str(index)).get("weight_map")
        if not isinstance(weight_map, dict):
            raise wrong(f"{index} weight_map", "an object", type(weight_map).__name__)
        headers: dict[str, dict[str, TensorEntry]] = {}
        for name, shard in weight_map.items():
            # A shard lies beside its index, never elsewhere.
            if (
                not isinstance(shard, str)
                or not shard
                or Path(shard).name != shard
                or "\\" in shard
            ):
                raise wrong(f"{index}: tensor {name!r}", "a file name", repr(shard))
            if shard not in headers:
                file = index.parent / shard
                if not file.is_file():
                    raise wrong(f"{index}: tensor {name!r}", f"the file {shard}", "no such file")
                headers[shard] = read_header(file)
            if name not in headers[shard]:
                raise wrong(f"tensor {name!r}", f"to be in {shard}, as {index.name} says", "none")
            self.tensors[name] = headers[shard][name]

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None."""
        file = self.folder / name
        return read_json(file.read_bytes(), str(file)) if file.is_file() else None

    def entry(self, name: str) -> TensorEntry:
        """Raises FormatError when there is no such tensor."""
        if name not in self.tensors:
            raise wrong(f"tensor {name!r}", "to be there", "no such tensor")
        return self.tensors[name]

    def raw(self, name: str, index: int | None = None) -> Array:
        """One tensor, or one slice of its first dimension, as stored; bf16 and fp8 as bits."""
        entry = self.entry(name)
        if entry.dtype not in _DTYPES:
            raise unsupported(f"tensor {name!r} dtype", " or ".join(_DTYPES), entry.dtype)
        begin, shape = entry.begin, entry.shape
        if index is not None:
            shape = shape[1:]
            begin += index * ((entry.end - entry.begin) // entry.shape[0])
        values = np.empty(shape, _DTYPES[entry.dtype])
        with entry.path.open("rb", buffering=0) as file:
            file.seek(begin)
            left = memoryview(values.reshape(-1).view(np.uint8).data)
            while left:
                count = file.readinto(left)
                if not count:
                    raise wrong(
                        f"tensor {name!r}", f"{len(left)} more bytes", "the end of the file"
                    )
                left = left[count:]
        return values

    def read(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], index: int | None = None
    ) -> Array:
        """One tensor (or slice of its first dimension) of ``shape``. bf16 comes as f32.

        Raises FormatError naming the tensor when it has another type or shape.
        """
        entry = self.entry(name)
        if entry.dtype not in dtypes:
            raise wrong(f"tensor {name!r} dtype", " or ".join(dtypes), entry.dtype)
        found = entry.shape if index is None else entry.shape[1:]
        if found != shape or (index is not None and not index < entry.shape[0]):
            want = list(shape) if index is None else ["E", *shape]
            raise wrong(f"tensor {name!r} shape", str(want), list(entry.shape))
        values = self.raw(name, index)
        if entry.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

"""The GGUF container, written by the ``gguf`` package up to its tensors' data.

The data is put at its offsets from here: the package takes whole tensors, and the experts of a
model are larger than memory. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic._files import shown
from moesaic.saving.tensors import Tensor

#: Of offsets in the data; what a file without ``general.alignment`` has.
ALIGNMENT = 32
#: Between two looks at signals and at the callback.
PIECE = 16 << 20


@dataclass(frozen=True)
class Value:
    """A value of the metadata and the GGUF type that it is stored as, by its name there."""

    value: Any
    type: str
    element: str | None = None  # of an array


def value_of(operation: str, key: str, value: Any) -> Value:
    """The GGUF form of a Python value: bool, int, float, str or a list of one of them."""
    if isinstance(value, Value):
        return value
    if not isinstance(key, str):
        raise error_of(
            _core.DTypeError, operation, "metadata", "keys that are str", type(key).__name__
        )
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, str):
        return Value(value, "STRING")
    if isinstance(value, bool | int | float):
        return Value(value, _number(operation, key, [value]))
    if isinstance(value, list | tuple) and value:
        if all(isinstance(one, str) for one in value):
            return Value(list(value), "ARRAY", "STRING")
        if all(isinstance(one, bool | int | float) for one in value):
            return Value(list(value), "ARRAY", _number(operation, key, value))
    expected = "bool, int, float, str or a list of one of them"
    raise error_of(_core.DTypeError, operation, f"metadata[{key!r}]", expected, shown(value))


def _number(operation: str, key: str, values: Sequence[Any]) -> str:
    if all(isinstance(one, bool) for one in values):
        return "BOOL"
    if any(isinstance(one, float) for one in values):
        # What f32 holds is stored so, as converters do.
        exact = all(float(np.float32(one)) == one for one in values)
        return "FLOAT32" if exact else "FLOAT64"
    for name, least, most in (
        ("UINT32", 0, 2**32 - 1), ("INT32", -(2**31), 2**31 - 1),
        ("INT64", -(2**63), 2**63 - 1), ("UINT64", 0, 2**64 - 1),
    ):  # fmt: skip
        if all(least <= one <= most for one in values):
            return name
    what, expected = f"metadata[{key!r}]", "integers of 64 bits"
    raise error_of(_core.ConfigError, operation, what, expected, shown(values))


@dataclass(frozen=True)
class Layout:
    """Where the data of each tensor lies in a file, and how long the file is."""

    offsets: dict[str, int]
    nbytes: int


def layout_of(start: int, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> Layout:
    """The layout of a file whose data begins at ``start``."""
    at, offsets = start, {}
    for tensor in tensors:
        offsets[tensor.name] = at
        at += _aligned(tensor.nbytes, _alignment(metadata))
    return Layout(offsets, at)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _alignment(metadata: Mapping[str, Value]) -> int:
    stated = metadata.get("general.alignment")
    return ALIGNMENT if stated is None else int(stated.value)


def begin(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> int:
    """Writes all but the data to ``path``, and gives the file its length. Returns where data is."""
    import gguf

    writer = gguf.GGUFWriter(None, metadata["general.architecture"].value)
    writer.data_alignment = _alignment(metadata)
    for key, value in metadata.items():
        element = None if value.element is None else gguf.GGUFValueType[value.element]
        if key != "general.architecture":  # which the writer has put first
            writer.add_key_value(key, value.value, gguf.GGUFValueType[value.type], element)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes,
            raw_dtype=_core.quant_types()[tensor.type]["id"],  # gguf may not name it yet
        )  # fmt: skip
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    start = _aligned(path.stat().st_size, writer.data_alignment)
    with path.open("r+b") as file:
        file.truncate(layout_of(start, metadata, tensors).nbytes)
    return start


def write_at(file: BinaryIO, offset: int, data: Iterable[memoryview]) -> None:
    """Writes pieces one behind the other; a raw file may take a part of one."""
    file.seek(offset)
    for piece in data:
        left = piece
        while left:
            left = left[file.write(left) :]


def pieces(data: memoryview) -> Iterator[memoryview]:
    for first in range(0, len(data), PIECE):
        yield data[first : first + PIECE]

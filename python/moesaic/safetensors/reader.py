"""The safetensors container, read without the ``safetensors`` package.

Names first, then one ``read`` per tensor or per expert of it, so that a load holds little more
than its result. Of a sharded checkpoint only the shards are opened that hold what is asked for.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic._files import (
    is_special,
    not_regular,
    open_regular,
    read_into,
    shown,
    snapshot_of,
)
from moesaic.safetensors.errors import unsupported, wrong
from moesaic.safetensors.folder import check_kind, files_of, is_index
from moesaic.safetensors.header import DTYPES, Header, TensorEntry, read_header
from moesaic.safetensors.parsing import read_json

__all__ = [
    "FLOATS",
    "Array",
    "Checkpoint",
    "TensorEntry",
    "read_header",
    "unsupported",
    "wrong",
]

Array = npt.NDArray[Any]

FLOATS = ("F32", "F16", "BF16")


class _Tensors(Mapping[str, TensorEntry]):
    """Names are known before any header is read."""

    def __init__(self, names: Mapping[str, str], entry: Callable[[str], TensorEntry]) -> None:
        self._names, self._entry = names, entry

    def __getitem__(self, name: str) -> TensorEntry:
        if name not in self._names:
            raise KeyError(name)
        return self._entry(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Checkpoint:
    """The tensors and configuration of a model: a folder, one file, or an index file.

    Raises FileNotFoundError, OSError for what is no regular file, and FormatError for malformed
    headers or an index that disagrees with them.
    """

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None:
        path = Path(os.fsdecode(path))
        mode = path.stat().st_mode
        if is_special(mode):
            raise not_regular(path)
        path = snapshot_of(path) if path.is_dir() else path
        self.folder = path if path.is_dir() else path.parent
        self._jsons: dict[str, dict[str, Any] | None] = {}
        self._headers: dict[str, Header] = {}
        #: The file of each tensor, before its header is read.
        self._files: dict[str, str] = {}
        self._index: Path | None = None
        config = self._config()
        if path.is_dir():
            files = files_of(path, config.get("transformers_weights"))
        else:
            check_kind(path)
            files = [path]
        if is_index(files[0]):
            self._read_index(files[0])
        else:
            self._read_files(files)
        #: All tensors by name; the file of one is opened when its entry is asked for.
        self.tensors: Mapping[str, TensorEntry] = _Tensors(self._files, self._entry_of)

    def _config(self) -> dict[str, Any]:
        config = self.json("config.json") or {}
        for name in ("text_config", "language_config", "llm_config"):
            inner = config.get(name)
            if inner is not None and not isinstance(inner, dict):
                raise wrong(f"config.json {name}", "an object", shown(inner))
        return config

    def _read_files(self, files: list[Path]) -> None:
        for file in files:
            for name in self._header(file.name):
                if name in self._files:
                    raise wrong(
                        f"{file}: tensor {name!r}",
                        "a name that no other file has",
                        f"the same in {self._files[name]}",
                        "files of ranks that split experts or rows are no whole checkpoint",
                    )
                self._files[name] = file.name

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise wrong(f"{index} weight_map", "an object", type(weight_map).__name__)
        # There are a hundred thousand names and few shards.
        if not set(map(type, weight_map.values())) <= {str}:
            name = next(name for name, shard in weight_map.items() if type(shard) is not str)
            raise wrong(f"{index}: tensor {name!r}", "a file name", shown(weight_map[name]))
        for shard in set(weight_map.values()):
            # A shard lies beside its index, never elsewhere.
            beside = Path(shard).name == shard and "\\" not in shard and "\0" not in shard
            if not beside or not shard.endswith(".safetensors"):
                raise wrong(f"{index} weight_map", "names of .safetensors files", shown(shard))
        self._index, self._files = index, weight_map

    def _header(self, file: str) -> Header:
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self._headers[file]

    def _entry_of(self, name: str) -> TensorEntry:
        file = self._files[name]
        try:
            header = self._header(file)
        except FileNotFoundError:
            raise wrong(
                f"{self._index}: tensor {name!r}", f"the file {file}", "no such file"
            ) from None
        if name not in header:
            index = "the index" if self._index is None else self._index.name
            raise wrong(f"tensor {name!r}", f"to be in {file}, as {index} says", "none")
        return header[name]

    def only(self, names: Collection[str]) -> "Checkpoint":
        """The same with these tensors alone, and no file opened that holds none of them."""
        part = object.__new__(Checkpoint)
        part.__dict__.update(self.__dict__)
        part._files = {name: self._files[name] for name in names}
        part.tensors = _Tensors(part._files, part._entry_of)
        return part

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, read once; None where there is none."""
        if name not in self._jsons:
            try:
                self._jsons[name] = read_json(self.folder / name)
            except FileNotFoundError:
                self._jsons[name] = None
        return self._jsons[name]

    def entry(self, name: str) -> TensorEntry:
        """Raises FormatError when there is no such tensor."""
        if name not in self._files:
            raise wrong(f"tensor {name!r}", "to be there", "no such tensor")
        return self._entry_of(name)

    def raw(self, name: str, index: int | None = None) -> Array:
        """One tensor, or one slice of its first dimension, as stored; bf16 and fp8 as bits."""
        entry = self.entry(name)
        if entry.dtype not in DTYPES:
            raise unsupported(f"tensor {name!r} dtype", " or ".join(DTYPES), entry.dtype)
        begin, shape = entry.begin, entry.shape
        if index is not None:
            if not shape or not 0 <= index < shape[0]:
                raise wrong(f"tensor {name!r} shape", f"more than {index} experts", list(shape))
            shape = shape[1:]
            begin += index * ((entry.end - entry.begin) // entry.shape[0])
        values = np.empty(shape, DTYPES[entry.dtype])
        with open_regular(entry.path) as file:
            file.seek(begin)
            missing = read_into(file, memoryview(values.reshape(-1).view(np.uint8).data))
        if missing:
            raise wrong(f"tensor {name!r}", f"{missing} more bytes", "the end of the file")
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

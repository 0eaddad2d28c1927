"""The safetensors container, read without the ``safetensors`` package.

Names first, then one ``read`` per tensor or per expert of it, so that a load holds little more
than its result. Of a sharded checkpoint only the shards are opened that hold what is asked for,
each once; the index, which names every tensor of the model, is read once for all of its layers.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moesaic._files import (
    descriptor_of,
    is_special,
    not_regular,
    read_at,
    shown,
    snapshot_of,
)
from moesaic.safetensors.errors import unsupported, wrong
from moesaic.safetensors.folder import check_kind, files_of, is_index
from moesaic.safetensors.header import DTYPES, Header, TensorEntry, header_of, read_header
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

#: Of a tensor: pieces, and bytes of each.
_SAMPLES, _SAMPLE = 8, 64

#: Indexes that were read, the last used at the end, by what says that a file is the same.
_INDEXES: OrderedDict[tuple[object, ...], dict[str, str]] = OrderedDict()
_INDEXES_KEPT = 2
#: A file that is younger may change once more within a tick of its clock.
_SETTLED_NS = 2_000_000_000
_INDEXES_LOCK = threading.Lock()


def _shards_by_name(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says; not to be changed.

    An index of a large model has 10^5 names, and its layers are loaded one after the other.
    """
    facts = index.stat()
    key = (str(index), facts.st_mtime_ns, facts.st_size, facts.st_ino, facts.st_dev)
    with _INDEXES_LOCK:
        if key in _INDEXES:
            _INDEXES.move_to_end(key)
            return _INDEXES[key]
    weight_map = read_json(index).get("weight_map")
    if weight_map is None:
        expected = "a weight_map, as *.safetensors.index.json has"
        raise wrong(str(index), expected, "none", f"open the folder, {index.parent}")
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
    if time.time_ns() - facts.st_mtime_ns < _SETTLED_NS:
        return weight_map
    with _INDEXES_LOCK:
        _INDEXES[key] = weight_map
        while len(_INDEXES) > _INDEXES_KEPT:
            _INDEXES.popitem(last=False)
    return weight_map


class _Shards:
    """The files of a checkpoint that are open: each is opened once, and closed with the last user.

    So the tensors that are read are those of the header that said where they lie, also of a file
    that another took the place of.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, tuple[BinaryIO, Header]] = {}
        self._descriptors: list[int] = []

    def __getitem__(self, name: str) -> tuple[BinaryIO, Header]:
        if name not in self._open:
            path = self._folder / name
            descriptor = descriptor_of(path)
            self._descriptors.append(descriptor)
            # Whichever of the two objects goes first, the descriptor is closed below.
            file = os.fdopen(descriptor, "rb", buffering=0, closefd=False)
            self._open[name] = file, header_of(path, file)
        return self._open[name]

    def __del__(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


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
        self._shards = _Shards(self.folder)
        self._entries: dict[str, TensorEntry] = {}
        #: All tensors by name, with their files; one is opened when an entry of it is asked for.
        self.tensors: Mapping[str, str]
        self._index: Path | None = None
        config = self._config()
        if path.is_dir():
            files = files_of(path, config.get("transformers_weights"))
        else:
            check_kind(path)
            files = [path]
        if is_index(files[0]):
            self._index, self.tensors = files[0], _shards_by_name(files[0])
        else:
            self.tensors = self._read_files(files)

    def _config(self) -> dict[str, Any]:
        config = self.json("config.json") or {}
        for name in ("text_config", "language_config", "llm_config"):
            inner = config.get(name)
            if inner is not None and not isinstance(inner, dict):
                raise wrong(f"config.json {name}", "an object", shown(inner))
        return config

    def _read_files(self, files: list[Path]) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in files:
            for name in self._shards[file.name][1]:
                if name in found:
                    raise wrong(
                        f"{file}: tensor {name!r}",
                        "a name that no other file has",
                        f"the same in {found[name]}",
                        "files of ranks that split experts or rows are no whole checkpoint",
                    )
                found[name] = file.name
        return found

    def _new_entry(self, name: str) -> TensorEntry:
        file = self.tensors[name]
        try:
            header = self._shards[file][1]
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
        part.tensors = {name: self.tensors[name] for name in names}
        part._entries = {}
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
        found = self._entries.get(name)
        if found is None:
            if name not in self.tensors:
                raise wrong(f"tensor {name!r}", "to be there", "no such tensor")
            found = self._entries[name] = self._new_entry(name)
        return found

    def raw(self, name: str, index: int | None = None) -> Array:
        """One tensor, or one slice of its first dimension, as stored; bf16 and fp8 as bits.

        Threads may read at the same time.
        """
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
        file = self._shards[self.tensors[name]][0]
        missing = read_at(file, memoryview(values.reshape(-1).view(np.uint8).data), begin)
        if missing:
            raise wrong(f"tensor {name!r}", f"{missing} more bytes", "the end of the file")
        return values

    def sample(self, name: str, index: int | None = None) -> bytes:
        """A few of the bytes of a tensor or of a slice of it, spread over it.

        They tell it from another of the same size in a file of the same time of change, as images
        of containers have one time for all files.
        """
        entry = self.entry(name)
        begin, end = entry.begin, entry.end
        if index is not None:
            size = (end - begin) // entry.shape[0]
            begin, end = begin + index * size, begin + (index + 1) * size
        file = self._shards[self.tensors[name]][0]
        found = bytearray()
        for i in range(_SAMPLES):
            at = begin + (end - begin) * i // _SAMPLES
            piece = bytearray(min(_SAMPLE, end - at))
            read_at(file, memoryview(piece), at)
            found += piece
        return bytes(found)

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

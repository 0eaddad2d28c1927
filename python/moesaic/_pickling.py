"""How pickle makes objects again: values of their fields, what was read from files from files.

The compiled module returns these functions from ``__reduce__``. Pickles name them, so their names
and arguments stay.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic import _core
from moesaic._errors import error_of

if TYPE_CHECKING:
    from moesaic.safetensors import CheckpointExperts
    from moesaic.safetensors.reader import Checkpoint


def value(kind: Any, fields: dict[str, Any]) -> Any:
    """Return an object of a value class."""
    return kind._from_fields(fields)


def _changed(path: str, what: str, then: object, now: object) -> _core.FormatError:
    expected = f"the file that was pickled, with {what} {then}"
    hint = "load the changed file by its name"
    return error_of(_core.FormatError, "unpickle", path, expected, str(now), hint)


class GgufSource:
    """One file as pickles name it.

    All that was read from the file shares this, so that a pickle of several layers opens it once.
    ``shards`` has (name, bytes, time of change) of each file, ``tensors`` a hash of the tensor
    infos and the metadata.
    """

    def __init__(
        self, path: str, mmap: bool, shards: Sequence[tuple[str, int, int]], tensors: int
    ) -> None:
        self.path, self.mmap = path, mmap
        self.shards, self.tensors = [tuple(shard) for shard in shards], tensors
        self._file: _core.GgufFile | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GgufSource, (self.path, self.mmap, self.shards, self.tensors)

    def open(self) -> _core.GgufFile:
        """Return the file. Raises FormatError when it is not the one that was pickled."""
        if self._file is None:
            file = _core.GgufFile(self.path, mmap=self.mmap)
            try:
                self._check(file._source())  # type: ignore[attr-defined]
            except _core.FormatError:
                file.close()
                raise
            self._file = file
        return self._file

    def _check(self, now: GgufSource) -> None:
        for i, what in enumerate(("names", "bytes", "times of change")):
            mine, others = ([shard[i] for shard in s.shards] for s in (self, now))
            if mine != others:
                raise _changed(self.path, what, mine, others)
        if self.tensors != now.tensors:
            raise _changed(self.path, "a tensor table of hash", self.tensors, now.tensors)


def gguf_file(source: GgufSource) -> _core.GgufFile:
    """Return a GgufFile."""
    return source.open()


def gguf_layer(source: GgufSource, layer: int, options: dict[str, Any]) -> _core.MoeLayer:
    """Return what MoeLayer.from_gguf made."""
    return _core.MoeLayer.from_gguf(source.open(), layer, **options)


def gguf_stack(source: GgufSource, layer: int, options: dict[str, Any]) -> _core.ExpertStack:
    """Return what ExpertStack.load_from_gguf made."""
    return _core.ExpertStack.load_from_gguf(source.open(), layer, **options)


def gguf_store(source: GgufSource, options: dict[str, Any]) -> _core.MoeExpertStore:
    """Return what MoeExpertStore.from_gguf made, with pools of its own."""
    return _core.MoeExpertStore.from_gguf(source.open(), **options)


def gguf_matrix(source: GgufSource, name: str, options: dict[str, Any]) -> _core.QuantMatrix:
    """Return what QuantMatrix.from_gguf made."""
    return _core.QuantMatrix.from_gguf(source.open(), name, **options)


def stack_of(layer: tuple[Callable[..., _core.MoeLayer], tuple[Any, ...]]) -> _core.ExpertStack:
    """Return the stack of a layer that came from files."""
    function, arguments = layer
    return function(*arguments).stack


class CheckpointSource:
    """The files of one layer of a safetensors checkpoint as pickles name them.

    ``files`` has (bytes, time of change in ns) by name, ``tensors`` is a hash of the tensor table
    and of the configuration.
    """

    def __init__(self, path: str | os.PathLike[str], layer: int, prefix: str | None) -> None:
        self.path = str(Path(os.fsdecode(path)).absolute())
        self.layer, self.prefix = layer, prefix
        self.files: dict[str, tuple[int, int]] = {}
        self._facts: list[object] = []
        self._tensors = ""  # of a pickle

    def note(self, checkpoint: Checkpoint) -> None:
        """Keep what tells these files from later ones; loaders call it once they are open."""
        entries = [(name, checkpoint.entry(name)) for name in sorted(checkpoint.tensors)]
        self._facts = [checkpoint.json("config.json")]
        self._facts += [(name, one.dtype, one.shape, one.begin, one.end) for name, one in entries]
        for file in sorted({Path(one.path) for _, one in entries}):
            found = file.stat()
            self.files[file.name] = (found.st_size, found.st_mtime_ns)

    @property
    def tensors(self) -> str:
        if not self._facts:
            return self._tensors
        digest = hashlib.sha256()
        for fact in self._facts:
            digest.update(repr(fact).encode(errors="replace"))
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointSource, (self.path, self.layer, self.prefix), (self.files, self.tensors)

    def __setstate__(self, state: tuple[dict[str, tuple[int, int]], str]) -> None:
        self.files, self._tensors = state

    def check(self) -> None:
        """Raises FormatError when the files are not those that were pickled."""
        from moesaic.safetensors.reader import Checkpoint  # files of GGUF do without
        from moesaic.safetensors.sets import of_layer

        now = CheckpointSource(self.path, self.layer, self.prefix)
        now.note(of_layer(Checkpoint(self.path), self.layer, self.prefix))
        if sorted(self.files) != sorted(now.files):
            raise _changed(self.path, "files", sorted(self.files), sorted(now.files))
        for name, then in self.files.items():
            for what, mine, other in zip(
                ("bytes", "time of change"), then, now.files[name], strict=True
            ):
                if mine != other:
                    raise _changed(str(Path(self.path) / name), what, mine, other)
        if self.tensors != now.tensors:
            raise _changed(self.path, "a tensor table of hash", self.tensors, now.tensors)


def checkpoint_layer(
    source: CheckpointSource, layer: int, options: dict[str, Any]
) -> _core.MoeLayer:
    """Return what MoeLayer.from_safetensors made."""
    source.check()
    return _core.MoeLayer.from_safetensors(source.path, layer, **options)


def checkpoint_stack(
    source: CheckpointSource, layer: int, options: dict[str, Any]
) -> _core.ExpertStack:
    """Return what ExpertStack.load_from_safetensors made."""
    source.check()
    return _core.ExpertStack.load_from_safetensors(source.path, layer, **options)


def checkpoint_experts(
    path: str, facts: dict[str, Any], prefix: str | None = None
) -> CheckpointExperts:
    """Return the experts of a checkpoint. Raises FormatError when the files are others now."""
    from moesaic.safetensors import CheckpointExperts  # files of GGUF do without

    experts = CheckpointExperts(path, prefix)
    for what, now in experts.facts().items():
        if now != facts[what]:
            raise _changed(path, what, facts[what], now)
    return experts


def checkpoint_store(experts: CheckpointExperts, options: dict[str, Any]) -> _core.MoeExpertStore:
    """Return what MoeExpertStore.from_safetensors made, with pools of its own."""
    return _core.MoeExpertStore.from_safetensors(experts, **options)

"""Repacked experts that are kept for the next start: where, and what tells them from others.

``cpp/src/cpu/panel_cache.hpp`` writes and maps the files, as those of a GGUF file. Here they are
named: by the tensors that the rows of a role are made of, and by a hash of all that they depend on.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from moesaic import _core
from moesaic._files import snapshot_of
from moesaic.safetensors.encoded import Encoded
from moesaic.safetensors.quantization import Quantization

#: (tensor, file, selection) of each role, as ``WeightOrigin`` has them.
Origins: TypeAlias = dict[str, tuple[str, int, int]]
#: Takes roles from a weight cache into a builder; returns the names of those that it had.
Lookup: TypeAlias = Callable[["_core.StackBuilder", Origins], Sequence[str]]

#: Counts changes of the rows that are made of the same tensors, so that those which an older
#: library kept are made anew.
_VERSION = 1
#: What a folder in that of the checkpoint is called.
_BESIDE = "moesaic.panels"
_SAMPLES = 8


def cache_folder(path: str | os.PathLike[str], parent: str) -> str:
    """The folder for the repacked weights of a checkpoint: in its own, or in a ``parent``."""
    place = Path(os.fsdecode(path)).absolute()
    folder = snapshot_of(place) if place.is_dir() else place.parent
    if not parent:
        return str(folder / _BESIDE)
    # That of a snapshot in the hub's cache is a hash, which says which revision it is.
    return str(Path(parent) / f"{folder.name}.panels")


def origin_of(role: str, group: list[Encoded], kept: list[int] | None, rows: slice) -> Origins:
    """The origin of one role, whose experts are in ``group``; ``rows`` are its rows in each."""
    first = group[0]
    files = hashlib.sha256(_facts(group).encode(errors="replace"))
    for one in group[:: max(1, len(group) // _SAMPLES)]:
        files.update(one.checkpoint.sample(one.name, one.matrix.index))
    which = (role, [(one.name, one.matrix.index) for one in group], kept, first.asked)
    selection = hashlib.sha256(repr(which).encode(errors="replace"))
    files.update(repr((rows.start, rows.stop, rows.step)).encode())
    return {role: (f"{first.name}.{role}", _number(files), _number(selection))}


def _facts(group: list[Encoded]) -> str:
    """What the rows of these matrices depend on, but for the bytes of the tensors."""
    checkpoint = group[0].checkpoint
    files: dict[str, tuple[int, int]] = {}
    tensors = []
    for one in group:
        for name in sorted(one.tensors()):
            entry = checkpoint.entry(name)
            tensors.append((name, entry.dtype, entry.shape, entry.begin, entry.end))
            if entry.path.name not in files:
                found = entry.path.stat()
                files[entry.path.name] = (found.st_size, found.st_mtime_ns)
    recipes = [one.recipe for one in group]
    return repr((_VERSION, files, tensors, recipes, Quantization.of(checkpoint).said))


def _number(digest: "hashlib._Hash") -> int:
    return int.from_bytes(digest.digest()[:8], "little")

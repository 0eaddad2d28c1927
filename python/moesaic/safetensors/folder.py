"""Which files of a folder are the checkpoint.

A folder as downloaded may hold a model several times: as one file and as shards, in the form of its
maker (``consolidated``) or in another type (``model.fp16``). transformers takes model.safetensors,
else the shards that model.safetensors.index.json names, unless config.json names another file; so
does this. Where neither is there, the only set of files is taken.
"""

import os
import re
import stat
from collections import defaultdict
from pathlib import Path

from moesaic._files import is_special, not_regular
from moesaic.safetensors.errors import unsupported, wrong

_INDEX = re.compile(r"(?P<set>.+)\.safetensors\.index(?P<variant>\..+)?\.json")
_WEIGHTS = re.compile(r"(?P<set>.+)\.safetensors")
_SHARD = re.compile(r"-\d{1,9}-of-\d{1,9}")
_RANK = re.compile(r"-mp\d+$|(?:^|[-_.])(?:ep|tp|mp|rank|mp_rank)[-_]?\d+(?=[-_.]|$)")
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".gguf")


def is_index(path: Path) -> bool:
    return path.suffix == ".json"


def check_kind(path: Path) -> None:
    """Raises UnsupportedError for a file of weights in another form than safetensors."""
    if path.suffix in _OTHERS:
        raise unsupported(
            str(path), "a .safetensors file", f"a {path.suffix} file", _conversion(path.suffix)
        )


def _conversion(suffix: str) -> str:
    if suffix == ".gguf":
        return "MoeLayer.from_gguf opens it"
    return "save_pretrained of transformers writes safetensors"


def files_of(folder: Path, named: object = None) -> list[Path]:
    """The index file, or the files of tensors; ``named`` is what config.json says instead.

    Raises OSError where one of the folder's files of tensors is no regular file, FileNotFoundError
    when there are none, UnsupportedError for weights in another form, FormatError where nothing
    tells which of several sets is meant.
    """
    names = _names(folder)
    if isinstance(named, str) and named:
        if named not in names:
            raise wrong(
                f"{folder}/config.json transformers_weights", "a .safetensors file of the folder",
                repr(named[:80]),
            )  # fmt: skip
        return [folder / named]
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if name in names:
            return [folder / name]
    sets: dict[str, list[str]] = defaultdict(list)
    for name in names:
        sets[_set_of(name)].append(name)
    # Adapters are no model, and what is loaded are the weights without them.
    sets.pop("adapter_model", None)
    if not sets:
        raise _nothing(folder)
    ranks = [name for name in sets if _RANK.search(name)]
    if len(ranks) > 1:
        raise unsupported(
            str(folder), "each tensor whole in one file",
            f"files for {len(ranks)} ranks: {', '.join(sorted(ranks)[:3])} ...",
            "experts or rows are split over them; the original checkpoint has them whole",
        )  # fmt: skip
    if "model" in sets:  # shards whose index is missing
        return _files(folder, sets["model"])
    whole = [name for name in sets if _is_whole(name, sets[name])]
    if len(sets) > 1 and whole:
        raise wrong(
            str(folder), "one set of files, or model.safetensors", ", ".join(sorted(sets)[:8]),
            "give the path of the file or of the index that is meant",
        )  # fmt: skip
    return _files(folder, [name for group in sets.values() for name in group])


def _names(folder: Path) -> list[str]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _WEIGHTS.fullmatch(entry.name) and not _INDEX.fullmatch(entry.name):
                continue
            try:
                mode = entry.stat().st_mode
            except FileNotFoundError:  # a link to a file that was not downloaded
                continue
            if is_special(mode):
                raise not_regular(folder / entry.name)
            if stat.S_ISREG(mode):
                found.append(entry.name)
    return sorted(found)


def _set_of(name: str) -> str:
    index = _INDEX.fullmatch(name)
    if index is not None:
        return index["set"] + (index["variant"] or "")
    weights = _WEIGHTS.fullmatch(name)
    assert weights is not None
    return _SHARD.sub("", weights["set"])


def _is_whole(name: str, files: list[str]) -> bool:
    """Whether a set is a model by itself: by its name, or as it has shards."""
    known = name.startswith(("model.", "consolidated", "pytorch_model"))
    return known or len(files) > 1 or any(_INDEX.fullmatch(file) for file in files)


def _files(folder: Path, names: list[str]) -> list[Path]:
    """The index of a set, else its files."""
    indices = [name for name in names if _INDEX.fullmatch(name)]
    if len(indices) > 1:
        raise wrong(str(folder), "one index file", ", ".join(indices[:8]))
    return [folder / name for name in indices or sorted(names)]


def _nothing(folder: Path) -> Exception:
    with os.scandir(folder) as entries:
        others = sorted(e.name for e in entries if e.name.endswith(_OTHERS))
    if not others:
        return FileNotFoundError(2, "No .safetensors file in", str(folder))
    return unsupported(
        str(folder),
        "a .safetensors file",
        ", ".join(others[:3]),
        _conversion(Path(others[0]).suffix),
    )

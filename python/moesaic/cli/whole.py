"""Whole models and their tokenizers, for the commands that run them; torch comes with the first."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moesaic as mo
from moesaic._errors import error_of

from .models import GgufModel, open_model

#: Types of activations and of tensors that are not kept, as torch spells them.
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True)
class Place:
    """Where a model is: a GGUF file, or the folder of a checkpoint."""

    path: Path
    gguf: bool


def require_packages(command: str, *names: str) -> None:
    """Raises UnsupportedError for the first package of these that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise error_of(
                mo.UnsupportedError, command, "packages", " and ".join(names), f"no {name}",
                "pip install 'moesaic[transformers]'",
            )  # fmt: skip


def place_of(path: str) -> Place:
    """Where the model of a command's argument is. Raises as ``open_model``."""
    with open_model(path) as model:
        if isinstance(model, GgufModel):
            return Place(Path(model.path), True)
        return Place(model.checkpoint.folder, False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars, hints and warnings of transformers; errors are raised anyway."""
    import transformers

    logging = transformers.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def model_of(
    place: Place,
    *,
    dense: str = "keep",
    dtype: str | None = None,
    gate_up: str | None = None,
    down: str | None = None,
    memory: int | None = None,
    weight_cache: bool | str = False,
) -> Any:
    """The model of a place, its experts here. Raises as ``from_gguf`` and ``from_pretrained``."""
    import torch

    import moesaic.transformers as mt

    if place.gguf:
        types = {} if dtype is None else {"dtype": getattr(torch, DTYPES[dtype])}
        kept = dense if dense == "keep" else getattr(torch, DTYPES[dense])
        return mt.from_gguf(
            place.path, dense=kept, memory=memory, weight_cache=weight_cache, **types
        )
    return mt.from_pretrained(
        place.path,
        dtype="auto" if dtype is None else getattr(torch, DTYPES[dtype]),
        gate_up=gate_up,
        down=down,
        memory=memory,
    )


def tokenizer_of(place: Place, given: str | None) -> Any:
    """The tokenizer of a model, or of a folder or file of its own.

    Raises UnsupportedError where transformers cannot make one.
    """
    import transformers

    where = place.path if given is None else Path(given)
    if not where.exists():
        raise FileNotFoundError(2, "No such file or directory", str(where))
    hint = "--tokenizer names a folder with one" if given is None else ""
    file = {} if where.is_dir() else {"gguf_file": where.name}
    folder = where if where.is_dir() else where.parent
    expected = "one that transformers makes"
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(folder.absolute()), **file)
    except Exception as error:  # of any kind: it depends on the class that the files name
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise error_of(
            mo.UnsupportedError, "generate", f"tokenizer of {where}", expected, got, hint
        ) from error
    # transformers makes a tokenizer without words of a folder that has a configuration alone.
    if len(found) <= len(found.all_special_ids):
        raise error_of(
            mo.UnsupportedError, "generate", f"tokenizer of {where}", expected, "no words", hint
        )
    return found

"""A checkpoint or GGUF file to a GGUF file with experts of other types.

======================  ===============================================================
``plan``                what will be written, and the types that are asked for
``from_gguf``           a GGUF file as the source
``from_folder``         a checkpoint folder as the source
``imatrix``             how much columns count, from a file of llama.cpp's tools
``others``              its tensors beside the MoE layers
``shards``              files that are read by position
``run``                 writing it, in parallel, with a journal
======================  ===============================================================
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moesaic import _core
from moesaic._errors import error_of
from moesaic.saving.convert.imatrix import Importances, opened
from moesaic.saving.convert.plan import OPERATION, Plan, Types
from moesaic.saving.convert.run import write_plan
from moesaic.saving.convert.shards import Shards

__all__ = ["Plan", "Types", "planned", "write_plan"]


@contextmanager
def planned(
    source: str | os.PathLike[str],
    types: Types,
    layers: Sequence[int] | None = None,
    other: str | None = None,
    architecture: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
) -> Iterator[Plan]:
    """The plan of a conversion, whose source is open for as long as the block.

    ``other`` says of tensors beside the MoE layers 'copy' or 'omit'; None: copy from a GGUF file,
    omit from a folder. ``imatrix`` is a file of importances for the encoders. Raises ConfigError
    for a type or an option that does not fit, FormatError for importances that do not, and what
    opening the source raises.
    """
    types.check()
    with ExitStack() as stack:
        importances = None
        if imatrix is not None:
            importances = stack.enter_context(opened(Path(os.fsdecode(imatrix))))
        plan = stack.enter_context(
            _planned(Path(os.fsdecode(source)), types, layers, other, architecture, importances)
        )
        if importances is not None:
            importances.check()
            importances.note_in(plan)
        yield plan


@contextmanager
def _planned(
    path: Path,
    types: Types,
    layers: Sequence[int] | None,
    other: str | None,
    architecture: str | None,
    importances: Importances | None,
) -> Iterator[Plan]:
    from moesaic.saving.convert.from_folder import plan_from_folder
    from moesaic.saving.convert.from_gguf import plan_from_gguf

    if path.is_dir() or path.suffix in (".safetensors", ".json"):
        yield plan_from_folder(path, types, layers, architecture, other == "copy", importances)
        return
    with _core.GgufFile(path) as file, Shards(file.shard_paths) as shards:
        if architecture is not None:
            expected = "none for a GGUF file, which has its own"
            raise error_of(
                _core.ConfigError, OPERATION, "architecture", expected, repr(architecture)
            )
        yield plan_from_gguf(file, shards, types, layers, other == "omit", importances)

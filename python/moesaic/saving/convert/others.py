"""Tensors of a checkpoint beside its MoE layers, under the names that llama.cpp has for them.

Only of models whose tensors llama.cpp's converter renames and leaves as they are otherwise. Of most
models it permutes, splits or shifts some; under a name without that they would be wrong numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic.safetensors.reader import FLOATS, Checkpoint
from moesaic.saving.convert.plan import OPERATION
from moesaic.saving.tensors import Array, Tensor

#: Qwen2MoeModel, Qwen3MoeModel and OlmoeModel of its convert_hf_to_gguf, whose modify_tensors stack
#: experts and do nothing else.
RENAMED = ("qwen2moe", "qwen3moe", "olmoe")
_BLOCK = re.compile(r"model\.layers\.(\d+)\.mlp\.")
#: Tables that follow from the configuration.
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")


def check_copied(architecture: str) -> None:
    """Raises UnsupportedError unless the names are all that changes."""
    if architecture not in RENAMED:
        raise error_of(
            _core.UnsupportedError, OPERATION, "other",
            f"omit, as the tensors of {architecture!r} are more than renamed for GGUF", "copy",
            f"{', '.join(RENAMED)} can be copied",
        )  # fmt: skip


def other_tensors(
    checkpoint: Checkpoint, architecture: str, layers: Sequence[int], blocks: int
) -> list[Tensor]:
    """All tensors outside of the blocks of ``layers``: matrices as stored, vectors as F32.

    Raises UnsupportedError for one without a name, or of another type than floats.
    """
    import gguf

    found = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(found[architecture], blocks)
    tensors = []
    for name in checkpoint.tensors:
        block = _BLOCK.match(name)
        if _COMPUTED.fullmatch(name) or (block is not None and int(block[1]) in layers):
            continue
        known = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        entry = checkpoint.entry(name)
        if known is None or entry.dtype not in FLOATS:
            got = "none" if known is None else entry.dtype
            expected = "a name in GGUF" if known is None else " or ".join(FLOATS)
            raise error_of(
                _core.UnsupportedError, OPERATION, f"tensor {name!r}", expected, got,
                "other=omit leaves all such tensors out",
            )  # fmt: skip
        # llama.cpp adds and multiplies by vectors of F32.
        type = "F32" if len(entry.shape) == 1 else entry.dtype
        tensors.append(Tensor(known, type, entry.shape, _reader(checkpoint, name, type)))
    return tensors


def _reader(checkpoint: Checkpoint, name: str, type: str) -> Callable[[int], Array]:
    def read(_: int) -> Array:
        entry = checkpoint.entry(name)
        if entry.dtype == type:
            return checkpoint.raw(name)
        return checkpoint.read(name, FLOATS, entry.shape).astype(np.float32)

    return read

"""Layers to files, and files to files of other types.

======================  ===============================================================
``layers``              layers to a GGUF file
``keys``, ``names``     the keys of a GGUF file, and the names of its tensors
``stacks``, ``small``   experts as tensors, and what a layer has beside them
``tensors``             a tensor on its way into a file
``container``           the GGUF container
``verify``, ``facts``   a file read back, and compared with what it is to hold
``checkpoint``          layers to a checkpoint folder of Hugging Face
``gptq``, ``fp8``       INT4 experts as tensors of GPTQ, E4M3 ones as those of FP8
``hf_names``            names of the tensors of a folder
``hf_fields``           the fields of its config.json
``hf_tensors``          a tensor on its way there
``convert/``            a checkpoint or GGUF file to a GGUF file of other types
``atomic``, ``steps``   files that appear whole, and the progress of a write
======================  ===============================================================

What the functions here need is imported when they are called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from moesaic._core import MoeLayer, Progress

__all__ = ["save_safetensors", "write_gguf"]


def write_gguf(
    path: str | os.PathLike[str],
    layers: MoeLayer | Sequence[MoeLayer] | Mapping[int, MoeLayer],
    *,
    metadata: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    fused: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], object] | bool | None = None,
) -> None:
    """Write MoE layers to a GGUF file, as llama.cpp's converters name and order them.

    Encoded weights, biases, scales and routers come out bit by bit as the layers have them, and the
    file opens as the same layers: their configurations are read back before it takes its name. What
    the architecture has no key or tensor for is refused by name. Routers, norms and biases are
    written as F32.

    The file appears whole or not at all: it is written beside its name, brought to the disk, and
    renamed. A full disk, Ctrl-C or a cancelled progress leave what was there, and nothing else.

    Parameters
    ----------
    path : path
        The file.
    layers : MoeLayer, sequence or mapping of MoeLayer
        One layer is block 0, a sequence are blocks 0, 1, ..; a mapping names the blocks.
    metadata : mapping, optional
        More keys of the file, and those to replace: bool, int, float, str or a list of one of them.
    architecture : str, optional
        A name of ``known_architectures``. None: that of the layers' configurations.
    fused : bool
        Gate and up as one tensor, which has one type.
    overwrite : bool
        Whether a file that is there is replaced.
    progress : callable or bool, optional
        Called with a ``Progress``; may return False to stop. True shows a tqdm bar.

    Raises
    ------
    ConfigError
        A file that is there, an unknown architecture, or two types for a fused tensor.
    UnsupportedError
        What the architecture or GGUF cannot express, by name: a guard of the router, INT4 and E4M3
        experts, a bias of shared experts, a layer without a router.
    DTypeError
        ``layers`` or a value of ``metadata`` of another type.
    DeviceError
        A layer that is closed.
    OperationCancelled
        ``progress`` returned False.
    OSError
        The file cannot be written; the one that was there is as it was.

    Examples
    --------
    >>> import moesaic as mo
    >>> _ = mo.testing.write_moe_gguf("model.gguf", layers=4)  # a small model with random weights
    >>> layers = [mo.MoeLayer.from_gguf("model.gguf", i) for i in (1, 3)]
    >>> mo.write_gguf("two.gguf", layers, metadata={"general.name": "two layers"})
    >>> mo.GgufFile("two.gguf").moe_layers
    [0, 1]
    """
    from moesaic.saving.layers import write_layers

    write_layers(
        path, layers, operation="write_gguf", metadata=metadata, architecture=architecture,
        fused=fused, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def save_safetensors(
    path: str | os.PathLike[str],
    layers: MoeLayer | Sequence[MoeLayer] | Mapping[int, MoeLayer],
    *,
    model_type: str | None = None,
    dequantize: Literal["f32", "f16", "bf16"] | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], object] | bool | None = None,
) -> None:
    """Write MoE layers to a folder of Hugging Face: model.safetensors and config.json.

    ``MoeLayer.from_safetensors`` opens them again, equal bit by bit where nothing was decoded.
    Matrices of F32, F16 and BF16 are written as they are, those of INT4 as a GPTQ checkpoint and
    those of E4M3 as one of FP8, with its ``quantization_config``; everything beside the experts as
    F32.
    Model types: those whose checkpoints have one tensor for each matrix: mixtral, minimax_m2,
    olmoe, flex_olmo, qwen2_moe, qwen3_moe, qwen3_next, deepseek_v2, deepseek_v3, kimi_k2, glm4_moe,
    glm4_moe_lite, dots1, mimo_v2_flash, ernie4_5_moe, hunyuan_v1_moe, jamba, lfm2_moe. What one of
    them cannot express is refused by name. config.json has the fields of the MoE layers alone.

    Each of both files appears whole or not at all.

    Parameters
    ----------
    path : path
        The folder, which is made where there is none.
    layers : MoeLayer, sequence or mapping of MoeLayer
        One layer is layer 0, a sequence are layers 0, 1, ..; a mapping names them.
    model_type : str, optional
        As in config.json. None: one that the layers' architecture stores.
    dequantize : {'f32', 'f16', 'bf16'}, optional
        What quantised matrices, and those with scales, are decoded to; None refuses them, but for
        INT4 and E4M3, which are decoded on request only.
    config : mapping, optional
        More fields of config.json.
    overwrite : bool
        Whether files that are there are replaced.
    progress : callable or bool, optional
        Called with a ``Progress``; may return False to stop. True shows a tqdm bar.

    Raises
    ------
    ConfigError
        A file that is there, or a model type that is not among these.
    UnsupportedError
        What the model type cannot express, by name; quantised matrices without ``dequantize``;
        INT4 beside E4M3; INT4 in groups of several sizes, with zero points of both 0 and 16, or of
        experts that were selected after they were loaded.
    DTypeError
        ``layers`` of another type.
    OperationCancelled
        ``progress`` returned False.
    OSError
        A file cannot be written; the one that was there is as it was.

    Examples
    --------
    >>> import moesaic as mo
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> layer = mo.MoeLayer.from_gguf("model.gguf", 0)
    >>> mo.save_safetensors("folder", layer, dequantize="bf16")
    >>> mo.MoeLayer.from_safetensors("folder", 0).stack.quants["up"]
    'BF16'
    """
    from moesaic.saving.checkpoint import save

    save(
        path, layers, model_type=model_type, dequantize=dequantize, config=config,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip

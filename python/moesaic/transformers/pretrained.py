"""A checkpoint with its experts here, also one that names a quantisation method of its own."""

from __future__ import annotations

import copy
import errno
import os
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
import transformers

from moesaic import _core
from moesaic._arguments import checked
from moesaic._errors import error_of
from moesaic._files import snapshot_of
from moesaic.transformers.quantizer import METHOD, MoesaicConfig

#: What a saved model says of its experts.
_SAVED = ("experts", "gate_up", "down", "memory")


@checked
def from_pretrained(
    folder: str | PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    experts: str | PathLike[str] | None = None,
    gate_up: str | None = None,
    down: str | None = None,
    memory: int | str | None = None,
    weight_cache: bool | str | PathLike[str] = False,
    config: Any = None,
    **options: Any,
) -> Any:
    """Make a model of a checkpoint, its experts here.

    That is ``AutoModelForCausalLM.from_pretrained`` with a ``MoesaicConfig``, which transformers
    does not take beside a method that config.json names. Here experts in FP8, GPTQ, AWQ, MXFP4 and
    the other forms that ``MoeLayer.from_safetensors`` opens stay encoded, and matrices outside of
    experts that are encoded are decoded, for torch to run.

    Parameters
    ----------
    folder : str or path-like
        The checkpoint, or the folder of it that the hub's cache has.
    dtype : torch.dtype or 'auto'
        Of activations and all tensors outside of experts. 'auto': as config.json says.
    experts, gate_up, down, memory, weight_cache
        As in ``MoesaicConfig``.
    config : transformers.PreTrainedConfig, optional
        The configuration of the model. None: that of the folder.
    **options
        Of ``AutoModelForCausalLM.from_pretrained``.

    Returns
    -------
    transformers.PreTrainedModel
        For text generation, in evaluation mode.

    Raises
    ------
    FileNotFoundError, OSError
        The folder is absent or cannot be read.
    UnsupportedError
        No experts, or a class of experts that cannot run here.
    FormatError
        Tensors are missing or do not fit the model; or ``folder`` is a file.
    ConfigError
        As in ``MoesaicConfig``.

    Examples
    --------
    >>> import moesaic.transformers as mt
    >>> model = mt.from_pretrained("qwen3-30b-a3b-fp8", gate_up="Q4_K")  # doctest: +SKIP
    """
    place = snapshot_of(Path(fspath(folder)))
    if place.is_file():
        raise error_of(
            _core.FormatError, "from_pretrained", str(place), "the folder of a checkpoint",
            "a file", "from_gguf opens one of GGUF",
        )  # fmt: skip
    if not place.is_dir():
        hint = "a model of the hub is downloaded first, by huggingface_hub.snapshot_download"
        raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)} ({hint})", str(place))
    if config is None:
        config = transformers.AutoConfig.from_pretrained(str(place))
    asked = {"experts": experts, "gate_up": gate_up, "down": down, "memory": memory}
    config, saved = _apart(config)
    wanted = {**saved, **{key: value for key, value in asked.items() if value is not None}}
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(place),
        config=config,
        dtype=dtype,
        quantization_config=MoesaicConfig(**wanted, weight_cache=weight_cache),
        **options,
    )


def _apart(config: Any) -> tuple[Any, dict[str, Any]]:
    """The configuration without its method, which the files show; what a saved model had asked."""
    config, saved = copy.deepcopy(config), {}
    for part in (config, config.get_text_config()):
        method = getattr(part, "quantization_config", None)
        if method is None:
            continue
        del part.quantization_config
        if isinstance(method, dict) and method.get("quant_method") == METHOD:
            saved = {key: value for key, value in method.items() if key in _SAVED}
    return config, saved

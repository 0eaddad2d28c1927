"""A whole model of one GGUF file: its experts, and its matrices if wanted, stay as they are."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from moesaic import _core
from moesaic._arguments import checked
from moesaic._errors import error_of
from moesaic.torch.embedding import Embedding
from moesaic.torch.linear import Linear
from moesaic.transformers.gguf_names import EXPERTS, IGNORED, Change, architecture_of, names_of
from moesaic.transformers.quantizer import MoesaicConfig
from moesaic.transformers.routers import ROUTER, keep_routers

#: What a file of a whole model has, of whatever architecture, and one of experts alone has not.
_EMBEDDING = "token_embd.weight"
#: Types that torch computes with as well as we do.
_PLAIN = ("F32", "F16", "BF16")


@checked
def from_gguf(
    path: str | PathLike[str],
    dense: Literal["keep"] | torch.dtype = "keep",
    *,
    dtype: torch.dtype = torch.bfloat16,
    config: Any = None,
    memory: int | str | None = None,
    weight_cache: bool | str | PathLike[str] = False,
) -> Any:
    """Make a model of transformers of a GGUF file.

    Parameters
    ----------
    path : str or path-like
        The file, or the first of its shards.
    dense : 'keep' or torch.dtype
        What becomes of the matrices outside of experts. 'keep': the encoded ones run here as the
        file has them, and the embedding decodes the rows that are asked for. A type: they are
        decoded to it, and run in torch.
    dtype : torch.dtype
        With 'keep', the type of activations and of all tensors that are not kept; routers compute
        in f32.
    config : transformers.PreTrainedConfig, optional
        The configuration of the model. None: what transformers reads from the file.
    memory : int or str, optional
        Bytes, or a size such as '12GiB', that experts take at most, as in ``MoesaicConfig``; the
        other tensors are in memory beside them. None: all experts are in memory.
    weight_cache : bool or path-like
        Where the weights that run here are kept as kernels read them: the next start maps them from
        there instead of making them, and processes share them. True: in a folder beside the file,
        'model.gguf.panels'. A path: in a folder of that name there. False: nowhere.

    Returns
    -------
    transformers.PreTrainedModel
        For text generation, in evaluation mode.

    Raises
    ------
    FileNotFoundError, OSError
        The file is absent or cannot be read, or ``weight_cache`` is a place that cannot be written,
        or the disk is full.
    UnsupportedError
        An architecture that is not known in all its tensors, or whose configuration transformers
        cannot read, which ``config`` helps with.
    FormatError
        A tensor is missing, is one too many, or has another shape; or ``path`` is a folder.
    ConfigError
        The configuration describes other MoE layers than the file, or ``memory`` is no size, or
        less than one expert of each layer needs, or ``weight_cache`` is given beside it.

    Examples
    --------
    >>> import moesaic.transformers as mt
    >>> model = mt.from_gguf("model.gguf")  # doctest: +SKIP
    >>> model = mt.from_gguf("model.gguf", dense=torch.bfloat16)  # doctest: +SKIP
    >>> model = mt.from_gguf("model.gguf", memory="12GiB")  # doctest: +SKIP
    >>> model = mt.from_gguf("model.gguf", weight_cache=True)  # doctest: +SKIP
    """
    if dense != "keep" and not isinstance(dense, torch.dtype):
        raise error_of(
            _core.ConfigError, "from_gguf", "dense", "'keep' or a torch.dtype", repr(dense)
        )
    if Path(fspath(path)).is_dir():
        raise error_of(
            _core.FormatError, "from_gguf", fspath(path), "a GGUF file", "a folder",
            "from_pretrained opens that of a checkpoint",
        )  # fmt: skip
    quantization = MoesaicConfig(path, memory=memory, weight_cache=weight_cache)
    file = _core.GgufFile(path)
    if config is None:
        config = _config_of(fspath(path), file)
    text = config.get_text_config()
    name, row = architecture_of(file, text.model_type)
    drafts = int(file.metadata.get(f"{name}.nextn_predict_layers", 0))
    _check_layers(text, file, drafts)
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config)
    tensors = _Tensors(file, names_of(name, row, text.num_hidden_layers))
    keep = dense == "keep"
    dtype = dtype if keep else dense
    kept = {}
    if keep:
        kept = _kept_modules(skeleton, tensors, row, text, dtype, quantization.weight_cache)
    state, routers = {}, {}
    for key, value in skeleton.state_dict().items():
        module = key.rpartition(".")[0]
        if module in kept or ".experts." in key:
            continue
        if key == "lm_head.weight" and text.tie_word_embeddings:
            continue
        decoded = tensors.decoded(key, row.change(key, text))
        fitting = _fitting(decoded, value.shape, key)
        state[key] = fitting.to(dtype)
        if keep and ROUTER.fullmatch(tensors.name_of(key) or ""):
            routers[key] = fitting
    tensors.check_all_used(range(text.num_hidden_layers, text.num_hidden_layers + drafts))
    if keep:
        config.tie_word_embeddings = text.tie_word_embeddings = False
    model = type(skeleton).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        quantization_config=quantization.with_modules(kept),
    )
    keep_routers(model, routers)
    return model


def _config_of(path: str, file: _core.GgufFile) -> Any:
    """What transformers reads from the file, with the widths of experts that it leaves out."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(Path(path).absolute().parent), gguf_file=Path(path).name
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise error_of(
            _core.UnsupportedError, "from_gguf", "configuration",
            "an architecture that transformers reads", str(error)[:200], "give it as config=",
        ) from error  # fmt: skip
    text = config.get_text_config()
    if file.moe_layers:
        layer = _core.MoeConfig.from_gguf(file, file.moe_layers[0])
        widths = {
            "moe_intermediate_size": layer.intermediate_size,
            "shared_expert_intermediate_size": layer.shared_intermediate_size,
        }
        for name, width in widths.items():
            if hasattr(text, name):
                setattr(text, name, width)
    return config


def _check_layers(config: Any, file: _core.GgufFile, drafts: int) -> None:
    """Raises ConfigError where the configuration says other layers than the file.

    The two say what a MoE layer is by rules of their own, so that a field that one lacks shows.
    """
    name = file.metadata["general.architecture"]
    layers = file.metadata[f"{name}.block_count"] - drafts
    _must_be("num_hidden_layers", layers, config.num_hidden_layers)
    for layer in file.moe_layers:
        if layer >= layers:
            continue
        of_file, of_config = (
            one.to_dict()
            for one in (
                _core.MoeConfig.from_gguf(file, layer),
                _core.MoeConfig.from_hf(config, layer),
            )
        )
        for facts in (of_file, of_config):
            facts |= facts.pop("router")
            for tensor in ("architecture", "router_bias", "selection_bias"):
                del facts[tensor]
        for field, value in of_file.items():
            _must_be(f"{field} of layer {layer}", value, of_config[field])


def _must_be(what: str, of_file: object, of_config: object) -> None:
    if of_file != of_config:
        raise error_of(
            _core.ConfigError,
            "from_gguf",
            what,
            f"{of_file}, as the file has it",
            str(of_config),
            "give the configuration of the model as config=",
        )


class _Tensors:
    """The tensors of a file by keys of the model, each of which must be used."""

    def __init__(self, file: _core.GgufFile, name_of: Any) -> None:
        self.file, self.name_of = file, name_of
        self.used: set[str] = set()

    def find(self, key: str) -> _core.GgufTensor:
        """The tensor of a key. Raises FormatError without one."""
        name = self.name_of(key)
        for candidate in (name, f"{name}.weight"):
            if name is not None and candidate in self.file.tensors:
                self.used.add(candidate)
                return self.file.tensors[candidate]
        hint = ""
        if _EMBEDDING not in self.file.tensors:
            hint = "MoesaicConfig(experts=) takes a file of experts alone, beside a checkpoint"
        raise error_of(_core.FormatError, "from_gguf", key, f"the tensor {name}", "none", hint)

    def has(self, key: str) -> bool:
        return self.name_of(key) in self.file.tensors

    def decoded(self, key: str, change: Change | None) -> torch.Tensor:
        tensor = self.find(key)
        values = torch.from_numpy(_core.dequantize(tensor.data, tensor.quant, tensor.shape))
        return values if change is None else change.apply(values)

    def check_all_used(self, drafts: range) -> None:
        """Raises FormatError for a tensor without a place in the model.

        Blocks that predict tokens further ahead have none in transformers.
        """
        passed_by = tuple(f"blk.{block}." for block in drafts)
        left = [
            name
            for name in self.file.tensors
            if name not in self.used
            and not name.startswith(passed_by)
            and not EXPERTS.fullmatch(name)
            and not IGNORED.fullmatch(name)
        ]
        if left:
            raise error_of(
                _core.FormatError, "from_gguf", left[0], "tensors that the model has a place for",
                f"{len(left)} without one",
            )  # fmt: skip


def _fitting(tensor: torch.Tensor, shape: torch.Size, key: str) -> torch.Tensor:
    """The tensor in the shape that the model has it in: dimensions of 1 come and go."""
    bare = [tuple(n for n in one if n != 1) for one in (tensor.shape, shape)]
    if bare[0] != bare[1]:
        raise error_of(
            _core.FormatError, "from_gguf", key, str(list(shape)), str(list(tensor.shape))
        )
    return tensor.reshape(shape)


def _kept_modules(
    model: nn.Module,
    tensors: _Tensors,
    row: Any,
    config: Any,
    dtype: torch.dtype,
    weight_cache: bool | str,
) -> dict[str, nn.Module]:
    """Modules over the encoded matrices of a file, by the names of those that they replace.

    A matrix whose columns have another order in the file stays out: columns share blocks.
    """
    kept: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, nn.Embedding):
            tensor = tensors.find(key)
            if tensor.quant not in _PLAIN:
                kept[name] = Embedding.from_gguf(tensors.file, tensor.name, dtype)
        elif type(module) is nn.Linear:
            if name == "lm_head" and not tensors.has(key):
                key = "model.embed_tokens.weight"  # tied
            tensor, change = tensors.find(key), row.change(key, config) or Change()
            if tensor.quant in _PLAIN or change.columns is not None:
                continue
            bias = None if module.bias is None else tensors.find(f"{name}.bias").name
            kept[name] = Linear(_matrix(tensors.file, tensor, bias, change, weight_cache))
    return kept


def _matrix(
    file: _core.GgufFile,
    tensor: _core.GgufTensor,
    bias: str | None,
    change: Change,
    weight_cache: bool | str,
) -> _core.QuantMatrix:
    """The matrix of a tensor; one whose rows have another order here is made anew at each start."""
    if change.rows is None:
        return _core.QuantMatrix.from_gguf(file, tensor.name, bias=bias, weight_cache=weight_cache)
    rows = change.rows.numpy()
    values = None
    if bias is not None:
        one = file.tensors[bias]
        values = _core.dequantize(one.data, one.quant, one.shape)[rows]
    n, k = tensor.shape
    data = tensor.data.reshape(n, -1)[rows]
    return _core.QuantMatrix.from_encoded(data, tensor.quant, (n, k), bias=values)

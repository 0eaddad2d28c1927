"""``from_pretrained(..., quantization_config=MoesaicConfig(...))``: experts that torch never holds.

transformers builds the model without memory, this quantizer takes the experts out of it, so that
their weights are not read, and puts its own in their place when all else is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from copy import copy
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moesaic import _core
from moesaic._errors import error_of
from moesaic._offload_store import opened
from moesaic._sizes import bytes_of
from moesaic.torch.experts import Experts
from moesaic.transformers.activations import activation_of
from moesaic.transformers.encode import encoded_as
from moesaic.transformers.encoded_linears import EncodedLinears
from moesaic.transformers.layouts import experts_of, layer_of, unsupported, weights_of
from moesaic.transformers.pooled import pooled_experts
from moesaic.transformers.special import class_for

#: The name of the method in config.json.
METHOD = "moesaic"
#: A multiple of the blocks of all types.
_WIDEST = 256


class MoesaicConfig(QuantizationConfigMixin):
    """Where a model gets its experts from, for ``from_pretrained(quantization_config=)``.

    Parameters
    ----------
    experts : str or path-like, optional
        A GGUF file, or the folder of a checkpoint in any format that ``MoeLayer.from_safetensors``
        opens. None: the checkpoint that is being loaded.
    gate_up : str, optional
        The type that gate and up matrices are encoded in, such as 'Q4_K'. None: as they are there.
    down : str, optional
        The type of the down matrices. None: as they are there.
    memory : int or str, optional
        Bytes, or a size such as '12GiB', that experts take at most, all layers together: those that
        are used most stay in memory, the others are read when they are needed, as they are there:
        from a GGUF file, or from a folder whose experts ``open_store`` reads one by one. None: all
        are in memory.
    weight_cache : bool or path-like
        Where the repacked experts are kept for the next start, as in
        ``ExpertStack.load_from_gguf`` and ``load_from_safetensors``.

    Raises
    ------
    ConfigError
        A size or a type that is none, a limit beside a type to encode in or a cache, or a cache
        beside a type to encode a GGUF file in.

    Examples
    --------
    >>> import moesaic.transformers as mt
    >>> mt.MoesaicConfig(gate_up="Q4_K", down="Q6_K").gate_up
    'Q4_K'
    >>> mt.MoesaicConfig("model.gguf", memory="12GiB").memory
    12884901888
    """

    _modules: Mapping[str, nn.Module] = MappingProxyType({})

    def __init__(
        self,
        experts: str | PathLike[str] | None = None,
        gate_up: str | None = None,
        down: str | None = None,
        memory: int | str | None = None,
        weight_cache: bool | str | PathLike[str] = False,
        quant_method: str = METHOD,
    ) -> None:
        for kind in (gate_up, down):
            if kind is not None:  # a type that there is not is no reason to load a model first
                _core.quantize(np.zeros((1, _WIDEST), np.float32), kind)
        if memory is not None:
            memory = bytes_of("MoesaicConfig", "memory", memory)
            if gate_up is not None or down is not None:
                raise error_of(
                    _core.ConfigError, "MoesaicConfig", "gate_up, down",
                    "None beside memory=, as experts are read as they are",
                    f"{gate_up}, {down}", "moesaic convert writes a file with other types",
                )  # fmt: skip
        if not isinstance(weight_cache, bool):
            weight_cache = str(Path(os.fspath(weight_cache)).absolute())
        others: dict[str, object] = {"memory": memory}
        if experts is not None and not Path(os.fspath(experts)).is_dir():
            others |= {"gate_up": gate_up, "down": down}
        beside = [name for name, value in others.items() if value is not None]
        if weight_cache and beside:
            raise error_of(
                _core.ConfigError, "MoesaicConfig", "weight_cache",
                "experts that are all in memory, those of a GGUF file in its types",
                ", ".join(beside),
            )  # fmt: skip
        self.quant_method, self.memory, self.weight_cache = quant_method, memory, weight_cache
        self.experts = None if experts is None else str(Path(os.fspath(experts)).absolute())
        self.gate_up, self.down = gate_up, down
        register_quantizer()

    def with_modules(self, modules: Mapping[str, nn.Module]) -> MoesaicConfig:
        """One that also puts these modules in the place of those of their names."""
        config = copy(self)
        config._modules = modules
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that config.json keeps: all but ``weight_cache``, which is local."""
        kept = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        return {key: value for key, value in kept.items() if key != "weight_cache"}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Make one of the fields of a config.json, which comes from outside and names no folder to
        write to. Raises ConfigError where it does.
        """
        if config_dict.get("weight_cache"):
            raise error_of(
                _core.ConfigError, "MoesaicConfig", "weight_cache of config.json", "none",
                str(config_dict["weight_cache"]), "a MoesaicConfig of your own may have one",
            )  # fmt: skip
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


def register_quantizer() -> None:
    """Make the method known to transformers, once."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MoesaicConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = MoesaicQuantizer


class MoesaicQuantizer(HfQuantizer):
    """What transformers calls before and after it loads the rest of a model."""

    def __init__(self, config: MoesaicConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self._experts: dict[str, _Wanted] = {}
        self._linears: EncodedLinears | None = None

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config
        if config.experts is None:
            config.experts = _folder_of(checkpoint_files)
        if checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            self._linears = EncodedLinears(_folder_of(checkpoint_files), model)
        for name, module in experts_of(model, "MoesaicConfig"):
            if layer_of(name) in map(layer_of, self._experts):
                raise unsupported(module, name, "one module of experts in a layer", "several")
            self._experts[name] = _Wanted(module)
        linears = () if self._linears is None else self._linears.wanted
        replaced = (*self._experts, *config._modules, *linears)
        for name in replaced:
            model.set_submodule(name, nn.Identity())  # no parameters: nothing is read for it
        unread = {rf"{re.escape(name)}\." for name in replaced}
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | unread
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = self.quantization_config
        source = _source_of(config)
        for name, wanted in self._experts.items():
            experts = source(wanted.kind, layer_of(name), wanted.activation)
            wanted.check(experts.stack, name)
            model.set_submodule(name, experts.eval())
        for name, module in config._modules.items():
            model.set_submodule(name, module.eval())
        if self._linears is not None:
            for name in self._linears.wanted:
                model.set_submodule(name, self._linears.module(name).eval())
            self._linears = None  # and with it the files
        return model

    def get_state_dict_and_metadata(
        self, model: nn.Module
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return all but the experts, which the saved configuration names the place of."""
        state = model.state_dict()
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)
                and not key.endswith("_extra_state")}, {}  # fmt: skip

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Return whether all but the experts, whose files are named, is in torch."""
        return not self.quantization_config._modules

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on other modules can be trained: True."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes the model: True."""
        return True


class _Wanted:
    """What an experts module was, before it had weights."""

    def __init__(self, module: nn.Module) -> None:
        weights = weights_of(module)
        self.sizes = tuple(weights.up.shape)
        self.gated = weights.gate is not None
        self.kind, self.activation = class_for(module), activation_of(module)

    def check(self, stack: _core.ExpertStack, name: str) -> None:
        """Raises FormatError where the file has other experts."""
        sizes = (stack.num_experts, stack.intermediate_size, stack.hidden_size)
        if sizes != self.sizes or stack.gated != self.gated:
            gated = ("ungated", "gated")
            raise error_of(
                _core.FormatError,
                "MoesaicConfig",
                name,
                f"{gated[self.gated]} experts [E, I, H] {list(self.sizes)}, as the model has them",
                f"{gated[stack.gated]} {list(sizes)}",
            )


#: Makes the module of a class for a block, with an activation.
_Source = Callable[[type[Experts], int, _core.Activation], Experts]


def _source_of(config: MoesaicConfig) -> _Source:
    """The experts of a GGUF file or a folder, by blocks."""
    path = config.experts
    assert path is not None
    if config.memory is not None:
        return pooled_experts(opened(path), config.memory)
    file = None if Path(path).is_dir() else _core.GgufFile(path)
    cache = config.weight_cache
    wanted = {"gate": config.gate_up, "up": config.gate_up, "down": config.down}
    quant: Any = {role: kind for role, kind in wanted.items() if kind is not None}

    def loaded(kind: type[Experts], block: int, activation: _core.Activation) -> Experts:
        if file is not None:
            stack = _core.ExpertStack.load_from_gguf(file, block, weight_cache=cache)
            stack = encoded_as(stack, config.gate_up, config.down)
        else:
            stack = _core.ExpertStack.load_from_safetensors(
                path, block, quant=quant, weight_cache=cache
            )
        return kind(stack, activation)

    return loaded


def _folder_of(checkpoint_files: list[str] | None) -> str:
    if not checkpoint_files:
        raise error_of(
            _core.ConfigError, "MoesaicConfig", "experts", "a GGUF file or a folder", "None",
            "a model that is made of a state_dict has no files of its own",
        )  # fmt: skip
    return str(Path(checkpoint_files[0]).parent.absolute())

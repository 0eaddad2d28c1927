"""Routers that keep the type that their file has them in, in models of another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

#: Tensors of routers, by their names in GGUF files.
ROUTER = re.compile(r"blk\.\d+\.ffn_gate_inp\.(weight|bias)")


def keep_routers(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the ``tensors`` of routers, by their keys, where the model has them in its own type.

    Which experts a token goes to then depends on them as the file has them, and one token takes a
    product of f32 half the time or less of one of BF16, whose weights torch reorders at each call.
    """
    for key, values in tensors.items():
        name, _, field = key.rpartition(".")
        module = model.get_submodule(name)
        getattr(module, field).data = values
        if field == "weight":
            module.register_forward_pre_hook(_in_type_of_weights)


def _in_type_of_weights(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = inputs
    return (hidden.to(module.weight.dtype), *others)

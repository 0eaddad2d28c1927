"""Experts modules of transformers: which modules they are, and how they hold their weights.

Classes that ``use_experts_implementation`` decorates say how; the few others are listed here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from moesaic import _core
from moesaic._errors import error_of
from moesaic.torch.experts import Experts

#: Classes without the decorator, whose weights are [E, cols, rows] (transposed) or not.
_UNDECORATED = {"Llama4TextExperts": True, "LongcatFlashExperts": False}


@dataclass(frozen=True)
class Weights:
    """The matrices of all experts of a module, [E, rows, cols] as views, and biases [E, rows]."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    biases: dict[str, torch.Tensor]


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several experts as parameters."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, torch.Tensor) and down.ndim == 3


def experts_of(model: nn.Module, operation: str) -> list[tuple[str, nn.Module]]:
    """The name and module of all experts of a model. Raises UnsupportedError without any."""
    found = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not found:
        here = any(isinstance(module, Experts) for module in model.modules())
        raise error_of(
            _core.UnsupportedError,
            operation,
            type(model).__name__,
            "a model with modules of fused experts",
            "experts that run here already" if here else "none",
        )
    return found


def layer_of(name: str) -> int:
    """The number of the layer in the name of a module, -1 where it has none."""
    numbers: list[str] = re.findall(r"\.(\d+)(?=\.|$)", "." + name)
    return int(numbers[0]) if numbers else -1


def unsupported(module: nn.Module, what: str, expected: str, got: str) -> _core.Error:
    """The error of an experts class that cannot run here."""
    return error_of(
        _core.UnsupportedError, "moesaic.transformers", f"{type(module).__name__}, {what}",
        expected, got,
    )  # fmt: skip


def weights_of(module: nn.Module) -> Weights:
    """The weights of an experts module as views, whatever their layout.

    Raises UnsupportedError for a class whose layout is not known.
    """
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise unsupported(module, "the outputs of experts", "a sum of them", "a norm of each")
    if not hasattr(module, "is_concatenated") and name not in _UNDECORATED:
        raise unsupported(
            module, "the layout", "a class that use_experts_implementation describes", "another"
        )
    gated = getattr(module, "has_gate", True)
    transposed = getattr(module, "is_transposed", _UNDECORATED.get(name, False))
    inner = getattr(module, "gate_up_proj" if gated else "up_proj").detach()
    down = module.down_proj.detach()
    inner = inner[: len(down)]  # LongCat keeps rows for experts that have no weights
    if transposed:
        inner, down = inner.transpose(1, 2), down.transpose(1, 2)
    if down.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise unsupported(module, "the weights", "f32, f16 or bf16", str(down.dtype))
    biases = {}
    if getattr(module, "has_bias", False):
        names = ("gate_up_proj_bias" if gated else "up_proj_bias", "down_proj_bias")
        inner_bias, biases["down"] = (getattr(module, one).detach() for one in names)
        biases["up"] = inner_bias
    if not gated:
        return Weights(None, inner, down, biases)
    half = inner.shape[1] // 2
    parts = (slice(half), slice(half, None))
    if not getattr(module, "is_concatenated", True):
        parts = (slice(0, None, 2), slice(1, None, 2))
    if biases:
        biases["gate"], biases["up"] = (inner_bias[:, part] for part in parts)
    return Weights(inner[:, parts[0]], inner[:, parts[1]], down, biases)

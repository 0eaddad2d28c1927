"""``experts_implementation="moesaic"``: a model of transformers over its own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic import _core
from moesaic._errors import error_of
from moesaic.torch.experts import Experts
from moesaic.transformers.activations import activation_of
from moesaic.transformers.convert import stack_of

NAME = "moesaic"
#: Where a module keeps the experts that were made of its weights, out of reach of its state_dict.
_KEPT = "_moesaic_experts"


def register() -> None:
    """Make ``experts_implementation="moesaic"`` and ``MoesaicConfig`` known to transformers.

    A model that is loaded with it, or told by ``model.set_experts_implementation("moesaic")``, runs
    its experts here from then on. At its first call a layer copies its weights into the order that
    runs fastest, and again when they change, so that they are in memory twice: ``convert`` is for
    models that stay. The weights count as frozen; a backward pass that needs their gradients is an
    error. A second call changes nothing.

    Examples
    --------
    >>> import transformers
    >>> import moesaic.transformers as mt
    >>> mt.register()
    >>> config = transformers.Qwen3MoeConfig(
    ...     vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_experts=4,
    ...     num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, head_dim=16)
    >>> model = transformers.AutoModelForCausalLM.from_config(
    ...     config, experts_implementation="moesaic")
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    from moesaic.transformers.quantizer import register_quantizer

    register_quantizer()


def experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The forward of an experts module, as the interface of transformers calls it."""
    if getattr(module, "_is_expert_parallel", False):  # there E stands for an expert elsewhere
        elsewhere = top_k_index >= module.num_experts
        top_k_index = top_k_index.masked_fill(elsewhere, -1)
    y: torch.Tensor = _kept(module)(hidden_states, top_k_index, top_k_weights)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    if trained and torch.is_grad_enabled():
        y = _Frozen.apply(y, *trained)
    return y


def _kept(module: nn.Module) -> Experts:
    """The experts made of the weights as they are now."""
    key = tuple((w.data_ptr(), w._version, w.dtype) for w in module.parameters())
    kept: _Kept | None = module.__dict__.get(_KEPT)
    if kept is None or kept.key != key:
        kept = _Kept(key, Experts(stack_of(module), activation_of(module)))
        module.__dict__[_KEPT] = kept
    return kept.experts


def kept_experts(module: nn.Module) -> Experts | None:
    """The experts that a module was last run with; None before its first call."""
    kept: _Kept | None = module.__dict__.get(_KEPT)
    return None if kept is None else kept.experts


def _nothing() -> None:
    """What copies and pickles of a module have in the place of experts made of its weights."""


class _Kept:
    """Experts made of a module's weights, and what these weights were then."""

    def __init__(self, key: tuple[Any, ...], experts: Experts) -> None:
        self.key, self.experts = key, experts

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


class _Frozen(torch.autograd.Function):
    """Passes a value on, and refuses to make gradients of the weights it came from."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        raise error_of(
            _core.UnsupportedError,
            "backward",
            "weights of experts",
            "frozen ones",
            "requires_grad=True",
            "freeze them with requires_grad_(False), or train with another experts_implementation",
        )

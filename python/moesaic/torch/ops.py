"""The operators ``torch.ops.moesaic``, which ``torch.compile`` and ``torch.export`` keep whole.

``experts(x, ids, weights, number)``
    x [..., H], ids and weights [..., k]: what the experts of that number make of x, [..., H].
``experts_backward(dy, x, ids, weights, number)``
    The gradients of x and of the weights.
``moe_layer(x, number)``
    What a whole layer makes of x [..., H].

They run on the CPU; tensors from elsewhere are copied there and the result back.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic import _core
from moesaic._errors import error_of
from moesaic.torch.arrays import array_of, threads_of_torch
from moesaic.torch.frozen import FrozenExperts, FrozenLayer, frozen
from moesaic.torch.gradients import expert_gradients

# The operators are there for as long as this object is.
_LIBRARY = torch.library.Library("moesaic", "DEF")
_LIBRARY.define("experts(Tensor x, Tensor ids, Tensor weights, int number) -> Tensor")
_LIBRARY.define(
    "experts_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, int number)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define("moe_layer(Tensor x, int number) -> Tensor")

#: Kernels for tensors of any device; the ones for shapes alone are registered beside them.
_ANYWHERE = "CompositeExplicitAutograd"


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] as dense [T, H] on the CPU."""
    return x.reshape(-1, x.shape[-1]).cpu().contiguous()


def _experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> torch.Tensor:
    experts = frozen(number, FrozenExperts)
    _check_experts(x, ids, weights, experts.stack)
    rows = _rows(x)
    y = torch.empty_like(rows)
    chosen = array_of(_rows(ids))
    with threads_of_torch():
        _core.moe_forward(
            array_of(rows),
            None,
            experts.stack,
            routing=_core.Routing(chosen, array_of(_rows(weights).float())),
            activation=experts.activation,
            precision=experts.precision,  # type: ignore[arg-type]
            out=array_of(y),
        )
    experts.uses.observe(chosen)
    return y.view(x.shape).to(x.device)


def _check_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, stack: _core.ExpertStack
) -> None:
    """What the core would name by its own names, or not see in flat arrays."""
    hidden = stack.hidden_size
    fits = x.ndim >= 1 and x.shape[-1] == hidden and ids.shape[:-1] == x.shape[:-1]
    if not fits or weights.shape != ids.shape:
        raise error_of(
            _core.ShapeError,
            "moesaic.experts",
            "x, ids, weights",
            f"[..., {hidden}], [..., k], [..., k]",
            ", ".join(str(list(one.shape)) for one in (x, ids, weights)),
        )


def _experts_fake(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _experts_backward(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    experts = frozen(number, FrozenExperts)
    with threads_of_torch():
        dx, dw = expert_gradients(
            _rows(dy), _rows(x), _rows(ids), _rows(weights), experts.stack, experts.activation
        )
    return dx.view(x.shape).to(x.device), dw.view(weights.shape).to(weights.device)


def _experts_backward_fake(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ids, weights, ctx.number = inputs
    ctx.save_for_backward(x, ids, weights)


def _experts_autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, ids, weights = ctx.saved_tensors
    dx, dw = torch.ops.moesaic.experts_backward(dy, x, ids, weights, ctx.number)
    return dx, None, dw, None


def _moe_layer(x: torch.Tensor, number: int) -> torch.Tensor:
    layer = frozen(number, FrozenLayer).layer
    rows = _rows(x)
    y = torch.empty_like(rows)
    with threads_of_torch():
        layer(array_of(rows), out=array_of(y))
    return y.view(x.shape).to(x.device)


def _moe_layer_fake(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def _moe_layer_autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    raise error_of(
        _core.UnsupportedError,
        "moesaic.moe_layer",
        "backward",
        "gradients through Experts alone",
        "a layer with a router of its own",
        "route in torch, and give the ids and weights to moesaic.torch.Experts",
    )


_LIBRARY.impl("experts", _experts, _ANYWHERE)
_LIBRARY.impl("experts_backward", _experts_backward, _ANYWHERE)
_LIBRARY.impl("moe_layer", _moe_layer, _ANYWHERE)
torch.library.register_fake("moesaic::experts", _experts_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::experts_backward", _experts_backward_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::moe_layer", _moe_layer_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "moesaic::experts", _experts_autograd, setup_context=_experts_context, lib=_LIBRARY
)
torch.library.register_autograd("moesaic::moe_layer", _moe_layer_autograd, lib=_LIBRARY)

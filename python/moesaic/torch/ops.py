"""The operators ``torch.ops.moesaic``, which ``torch.compile`` and ``torch.export`` keep whole.

``experts(x, ids, weights, number)``
    x [..., H], ids and weights [..., k]: what the experts of that number make of x, [..., H].
``experts_backward(dy, x, ids, weights, number)``
    The gradients of x and of the weights.
``moe_layer(x, number)``, ``moe_layer_backward(dy, x, number)``
    What a whole layer makes of x [..., H]; the gradient of x.
``linear(x, number)``, ``linear_backward(dy, number)``
    The product of x [..., K] with the matrix [N, K] of that number, [..., N]; the gradient of x.
``embedding(ids, number, dtype)``
    The rows [..., K] of a table.

They run on the CPU; tensors from elsewhere are copied there and the result back.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic import _core
from moesaic._errors import error_of
from moesaic.torch.arrays import array_of, threads_of_torch
from moesaic.torch.frozen import FrozenExperts, FrozenLayer, FrozenMatrix, FrozenTable, frozen
from moesaic.torch.gradients import expert_gradients
from moesaic.torch.layer_gradients import layer_gradient

# The operators are there for as long as this object is.
_LIBRARY = torch.library.Library("moesaic", "DEF")
_LIBRARY.define("experts(Tensor x, Tensor ids, Tensor weights, int number) -> Tensor")
_LIBRARY.define(
    "experts_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, int number)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define("moe_layer(Tensor x, int number) -> Tensor")
_LIBRARY.define("moe_layer_backward(Tensor dy, Tensor x, int number) -> Tensor")
_LIBRARY.define("linear(Tensor x, int number) -> Tensor")
_LIBRARY.define("linear_backward(Tensor dy, int number) -> Tensor")
_LIBRARY.define("embedding(Tensor ids, int number, ScalarType dtype) -> Tensor")

#: Kernels for tensors of any device; the ones for shapes alone are registered beside them.
_ANYWHERE = "CompositeExplicitAutograd"


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] as dense [T, H] on the CPU; at one token each step that is not needed counts."""
    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1])
    if not x.is_cpu:
        x = x.cpu()
    return x if x.is_contiguous() else x.contiguous()


def _in_place_of(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows [T, N] in the dimensions and on the device of x [..., K]."""
    if x.ndim != 2:
        y = y.view(*x.shape[:-1], y.shape[-1])
    return y if x.is_cpu else y.to(x.device)


def _experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> torch.Tensor:
    experts = frozen(number, FrozenExperts)
    _check_experts(x, ids, weights, experts.stack)
    rows = _rows(x)
    y = torch.empty_like(rows)
    chosen = array_of(_rows(ids))
    with threads_of_torch():
        routing = _core.Routing(chosen, array_of(_rows(weights)))
        experts.forward(array_of(rows), routing, array_of(y))
    experts.uses.observe(chosen)
    return _in_place_of(y, x)


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
    return _in_place_of(dx, x), _in_place_of(dw, weights)


def _experts_backward_fake(
    dy: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ids, weights, ctx.number = inputs
    ctx.save_for_backward(x, ids, weights)
    ctx.kept = frozen(ctx.number, FrozenExperts)  # the module may be gone by then


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
    return _in_place_of(y, x)


def _moe_layer_fake(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def _moe_layer_backward(dy: torch.Tensor, x: torch.Tensor, number: int) -> torch.Tensor:
    layer = frozen(number, FrozenLayer).layer
    with threads_of_torch():
        dx = layer_gradient(_rows(dy), _rows(x), layer)
    return _in_place_of(dx, x)


def _moe_layer_backward_fake(dy: torch.Tensor, x: torch.Tensor, number: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def _moe_layer_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.number = inputs
    ctx.save_for_backward(x)
    ctx.kept = frozen(ctx.number, FrozenLayer)


def _moe_layer_autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.moesaic.moe_layer_backward(dy, x, ctx.number), None


def _linear(x: torch.Tensor, number: int) -> torch.Tensor:
    matrix = frozen(number, FrozenMatrix).matrix
    rows = _rows(x)
    y = rows.new_empty((rows.shape[0], matrix.shape[0]))
    with threads_of_torch():
        matrix(array_of(rows), out=array_of(y))
    return _in_place_of(y, x)


def _linear_fake(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], frozen(number, FrozenMatrix).matrix.shape[0]))


def _linear_backward(dy: torch.Tensor, number: int) -> torch.Tensor:
    matrix = frozen(number, FrozenMatrix).matrix
    rows = _rows(dy)
    with threads_of_torch():
        decoded = torch.from_numpy(matrix.dequantize())
    return _in_place_of((rows.float() @ decoded).to(dy.dtype), dy)


def _linear_backward_fake(dy: torch.Tensor, number: int) -> torch.Tensor:
    return dy.new_empty((*dy.shape[:-1], frozen(number, FrozenMatrix).matrix.shape[1]))


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.number = inputs[1]
    ctx.kept = frozen(ctx.number, FrozenMatrix)


def _linear_autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    return torch.ops.moesaic.linear_backward(dy, ctx.number), None


def _embedding(ids: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
    table = frozen(number, FrozenTable)
    rows = ids.cpu().reshape(-1)
    outside = (rows < 0) | (rows >= table.rows)
    if outside.any():
        raise error_of(
            _core.ShapeError,
            "moesaic.embedding",
            "ids",
            f"0 to {table.rows - 1}",
            str(int(rows[outside][0])),
        )
    decoded = _core.dequantize(table.data[rows.numpy()], table.quant)
    return torch.from_numpy(decoded).to(ids.device, dtype).view(*ids.shape, table.columns)


def _embedding_fake(ids: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, frozen(number, FrozenTable).columns), dtype=dtype)


_LIBRARY.impl("experts", _experts, _ANYWHERE)
_LIBRARY.impl("experts_backward", _experts_backward, _ANYWHERE)
_LIBRARY.impl("moe_layer", _moe_layer, _ANYWHERE)
_LIBRARY.impl("moe_layer_backward", _moe_layer_backward, _ANYWHERE)
_LIBRARY.impl("linear", _linear, _ANYWHERE)
_LIBRARY.impl("linear_backward", _linear_backward, _ANYWHERE)
_LIBRARY.impl("embedding", _embedding, _ANYWHERE)
torch.library.register_fake("moesaic::experts", _experts_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::experts_backward", _experts_backward_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::moe_layer", _moe_layer_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::moe_layer_backward", _moe_layer_backward_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::linear_backward", _linear_backward_fake, lib=_LIBRARY)
torch.library.register_fake("moesaic::embedding", _embedding_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "moesaic::linear", _linear_autograd, setup_context=_linear_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "moesaic::experts", _experts_autograd, setup_context=_experts_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "moesaic::moe_layer", _moe_layer_autograd, setup_context=_moe_layer_context, lib=_LIBRARY
)

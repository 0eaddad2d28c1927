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
``experts_forward``, ``moe_layer_forward``, ``linear_forward``
    The same as those without this ending, and no gradient: what torch does around an operator that
    has one takes a quarter of a call of one token.

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
for _name in ("experts", "experts_forward"):
    _LIBRARY.define(f"{_name}(Tensor x, Tensor ids, Tensor weights, int number) -> Tensor")
_LIBRARY.define(
    "experts_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, int number)"
    " -> (Tensor, Tensor)"
)
for _name in ("moe_layer", "moe_layer_forward", "linear", "linear_forward"):
    _LIBRARY.define(f"{_name}(Tensor x, int number) -> Tensor")
_LIBRARY.define("moe_layer_backward(Tensor dy, Tensor x, int number) -> Tensor")
_LIBRARY.define("linear_backward(Tensor dy, int number) -> Tensor")
_LIBRARY.define("embedding(Tensor ids, int number, ScalarType dtype) -> Tensor")

#: Kernels for tensors of any device; the ones for shapes alone are registered beside them.
_ANYWHERE = "CompositeExplicitAutograd"
_HALF = (torch.bfloat16, torch.float16)
#: Dimensions of an array of the core.
_MAX_RANK = 4


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] as dense [T, H] on the CPU; at one token each step that is not needed counts."""
    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.is_cpu and x.is_contiguous() else x.cpu().contiguous()


def _in_place_of(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows [..., N] in the dimensions and on the device of x [..., K]."""
    if x.ndim != y.ndim:
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
    if weights.dtype in _HALF:  # torch is quicker at it than a Routing, which tells the log
        weights = weights.float()
    with threads_of_torch():
        routing = _core.Routing(chosen, array_of(_rows(weights)))
        experts.forward(array_of(rows), routing, array_of(y))
    experts.uses.observe(chosen)
    return _in_place_of(y, x)


def _check_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, stack: _core.ExpertStack
) -> None:
    """What the core would name by its own names, or not see in flat arrays."""
    hidden, rows, chosen = stack.hidden_size, x.shape, ids.shape
    fits = len(rows) >= 1 and rows[-1] == hidden and chosen[:-1] == rows[:-1]
    if not fits or weights.shape != chosen:
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
    frozen_matrix = frozen(number, FrozenMatrix)
    as_it_is = x.is_cpu and 2 <= x.ndim <= _MAX_RANK and x.is_contiguous()
    rows = x if as_it_is else _rows(x)
    y = rows.new_empty((*rows.shape[:-1], frozen_matrix.rows))
    with threads_of_torch():
        frozen_matrix.matrix(array_of(rows), out=array_of(y))
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
    rows = ids.cpu().reshape(-1).numpy()
    if rows.size and not 0 <= rows.min() <= rows.max() < table.rows:
        outside = rows[(rows < 0) | (rows >= table.rows)]
        raise error_of(
            _core.ShapeError,
            "moesaic.embedding",
            "ids",
            f"0 to {table.rows - 1}",
            str(int(outside[0])),
        )
    decoded = _core.dequantize(table.data[rows], table.quant)
    return torch.from_numpy(decoded).to(ids.device, dtype).view(*ids.shape, table.columns)


def _embedding_fake(ids: torch.Tensor, number: int, dtype: torch.dtype) -> torch.Tensor:
    return ids.new_empty((*ids.shape, frozen(number, FrozenTable).columns), dtype=dtype)


for _name, _kernel, _fake in (
    ("experts", _experts, _experts_fake),
    ("experts_forward", _experts, _experts_fake),
    ("experts_backward", _experts_backward, _experts_backward_fake),
    ("moe_layer", _moe_layer, _moe_layer_fake),
    ("moe_layer_forward", _moe_layer, _moe_layer_fake),
    ("moe_layer_backward", _moe_layer_backward, _moe_layer_backward_fake),
    ("linear", _linear, _linear_fake),
    ("linear_forward", _linear, _linear_fake),
    ("linear_backward", _linear_backward, _linear_backward_fake),
    ("embedding", _embedding, _embedding_fake),
):
    _LIBRARY.impl(_name, _kernel, _ANYWHERE)
    torch.library.register_fake(f"moesaic::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "moesaic::linear", _linear_autograd, setup_context=_linear_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "moesaic::experts", _experts_autograd, setup_context=_experts_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "moesaic::moe_layer", _moe_layer_autograd, setup_context=_moe_layer_context, lib=_LIBRARY
)

# Each with a gradient, and without.
_EXPERTS = torch.ops.moesaic.experts.default, torch.ops.moesaic.experts_forward.default
_MOE_LAYER = torch.ops.moesaic.moe_layer.default, torch.ops.moesaic.moe_layer_forward.default
_LINEAR = torch.ops.moesaic.linear.default, torch.ops.moesaic.linear_forward.default


def _needs_none(*tensors: torch.Tensor) -> bool:
    """Whether a call can do without a gradient.

    A graph that is being captured cannot: who runs it may want one.
    """
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))


def run_experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, number: int
) -> torch.Tensor:
    """``experts``, or ``experts_forward`` where that is enough."""
    out: torch.Tensor = _EXPERTS[_needs_none(x, weights)](x, ids, weights, number)
    return out


def run_layer(x: torch.Tensor, number: int) -> torch.Tensor:
    """``moe_layer``, or ``moe_layer_forward`` where that is enough."""
    out: torch.Tensor = _MOE_LAYER[_needs_none(x)](x, number)
    return out


def run_linear(x: torch.Tensor, number: int) -> torch.Tensor:
    """``linear``, or ``linear_forward`` where that is enough."""
    out: torch.Tensor = _LINEAR[_needs_none(x)](x, number)
    return out

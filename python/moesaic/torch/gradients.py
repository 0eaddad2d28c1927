"""What flows back through frozen experts, decoded one after another.

A token t that goes to expert e with weight w adds w * (D h) to its output, with h = act(G x, U x)
and the matrices G, U and D of the expert. So its share of dx and dw follows from the output's
gradient dy, and the weights themselves get none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from moesaic import _core


def activate(
    activation: _core.Activation, gate: torch.Tensor | None, up: torch.Tensor
) -> torch.Tensor:
    """The formula of an activation over tensors, as the docstring of ``Activation`` has it."""
    kind, limit = activation.kind, activation.limit
    if gate is None:
        if kind == "relu_squared":
            return functional.relu(up).square()
        return functional.gelu(up, approximate="tanh")
    if kind == "swiglu":
        return functional.silu(gate) * up
    if kind == "swiglu_clamp_input":
        return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    if kind == "swiglu_clamp_output":
        return functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if kind == "swiglu_oai":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    if kind == "geglu_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    if kind == "reglu":
        return functional.relu(gate) * up
    beta, linear_beta = activation.beta, activation.linear_beta  # situ
    if linear_beta:
        up = linear_beta * torch.tanh(up / linear_beta)
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up


def activation_gradients(
    activation: _core.Activation, gate: torch.Tensor | None, up: torch.Tensor, dy: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients of gate and up, or of up alone, where that of ``activate`` is ``dy``.

    Written out, since a kernel of an operator runs below autograd.
    """
    kind, limit = activation.kind, activation.limit
    if gate is None:
        if kind == "relu_squared":
            return [dy * 2 * functional.relu(up)]
        return [_gelu_backward(dy, up)]
    if kind == "swiglu":
        return [_silu_backward(dy * up, gate), dy * functional.silu(gate)]
    if kind == "geglu_tanh":
        return [_gelu_backward(dy * up, gate), dy * functional.gelu(gate, approximate="tanh")]
    if kind == "reglu":
        return [dy * up * (gate > 0), dy * functional.relu(gate)]
    if kind == "situ":
        beta, linear_beta = activation.beta, activation.linear_beta
        bounded, sigmoid = torch.tanh(gate / beta), torch.sigmoid(gate)
        slope = torch.ones_like(up)
        if linear_beta:
            line = torch.tanh(up / linear_beta)
            up, slope = linear_beta * line, 1 - line.square()
        d_gate = (1 - bounded.square()) * sigmoid + beta * bounded * sigmoid * (1 - sigmoid)
        return [dy * up * d_gate, dy * beta * bounded * sigmoid * slope]
    clamped = up.clamp(-limit, limit)
    inside = up.abs() <= limit
    if kind == "swiglu_clamp_output":
        silu = functional.silu(gate)
        d_gate = _silu_backward(dy * clamped * (silu <= limit), gate)
        return [d_gate, dy * silu.clamp(max=limit) * inside]
    below, gate = gate <= limit, gate.clamp(max=limit)
    if kind == "swiglu_clamp_input":
        return [_silu_backward(dy * clamped, gate) * below, dy * functional.silu(gate) * inside]
    alpha = activation.alpha  # swiglu_oai
    sigmoid = torch.sigmoid(alpha * gate)
    d_gate = sigmoid * (1 + alpha * gate * (1 - sigmoid))
    return [dy * (clamped + 1) * d_gate * below, dy * gate * sigmoid * inside]


def _silu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten.silu_backward(dy, x)
    return out


def _gelu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    return out


def matrix_of(stack: _core.ExpertStack, role: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One matrix [rows, cols] as the products use it, its scale and its low-rank delta included."""
    matrix = torch.from_numpy(stack.dequantize(role, expert)).to(dtype)  # type: ignore[arg-type]
    delta = stack.deltas.get(role)  # type: ignore[call-overload]
    if delta is not None:
        a, b, scale = delta
        low, high = (torch.tensor(one[expert], dtype=dtype) for one in (a, b))
        matrix += scale * (high @ low)
    return matrix


class _Expert:
    """One expert decoded, and what it makes of rows [n, H]: ``out``."""

    def __init__(
        self,
        stack: _core.ExpertStack,
        activation: _core.Activation,
        expert: int,
        rows: torch.Tensor,
    ) -> None:
        dtype, self.activation = rows.dtype, activation
        roles = ("gate", "up") if stack.gated else ("up",)
        self.inner = [matrix_of(stack, role, expert, dtype) for role in roles]
        self.down = matrix_of(stack, "down", expert, dtype)
        products = [functional.linear(rows, matrix) for matrix in self.inner]
        for product, role in zip(products, roles, strict=True):
            if role in stack.biases:
                product += torch.tensor(stack.biases[role][expert], dtype=dtype)
        self.gate, self.up = products[0] if stack.gated else None, products[-1]
        self.out = functional.linear(activate(activation, self.gate, self.up), self.down)
        if "down" in stack.biases:
            self.out += torch.tensor(stack.biases["down"][expert], dtype=dtype)

    def backward(self, d_out: torch.Tensor) -> torch.Tensor:
        """The gradient of the rows."""
        d_products = activation_gradients(self.activation, self.gate, self.up, d_out @ self.down)
        return sum(
            (d @ matrix for matrix, d in zip(self.inner, d_products, strict=True)),
            start=torch.zeros((), dtype=d_out.dtype),
        )


def experts_in_turn(
    x: torch.Tensor, ids: torch.Tensor, stack: _core.ExpertStack, activation: _core.Activation
) -> Iterator[tuple[torch.Tensor, torch.Tensor, _Expert]]:
    """Each expert that ids [T, k] name, at work on its tokens, with their numbers and slots.

    Ids that are none of an expert are skipped. One expert is in memory at a time.
    """
    for expert in ids.unique().tolist():
        if 0 <= expert < stack.num_experts:
            token, slot = torch.where(ids == expert)
            yield token, slot, _Expert(stack, activation, expert, x[token])


def expert_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    stack: _core.ExpertStack,
    activation: _core.Activation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x [T, H] and of the weights [T, k], of their element types.

    Sums are in f32, or in f64 for an x of f64.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx, dw = torch.zeros_like(x, dtype=dtype), torch.zeros_like(weights, dtype=dtype)
    for token, slot, expert in experts_in_turn(x.to(dtype), ids, stack, activation):
        share = dy[token].to(dtype)
        dw[token, slot] = (share * expert.out).sum(-1)
        d_out = share * weights[token, slot, None].to(dtype)
        dx.index_add_(0, token, expert.backward(d_out))
    return dx.to(x.dtype), dw.to(weights.dtype)

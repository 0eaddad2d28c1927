"""What flows back through a whole layer: its experts, and the weights that its router gave them.

Which experts a token goes to is a choice, through which nothing flows. Their weights, and those of
shared experts with a gate, are functions of the input like any other. Sums are in f32, or in f64
for an input of f64. As in ``gradients``, formulas are written out: a kernel of an operator runs
below autograd.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from moesaic import _core
from moesaic.torch.arrays import array_of
from moesaic.torch.gradients import expert_gradients, experts_in_turn, matrix_of


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight of rows [T, H]; x itself for a weight of None."""

    def __init__(self, x: torch.Tensor, weight: object, eps: float) -> None:
        self.x, self.weight, self.out = x, None, x
        if weight is None:
            return
        self.weight = torch.tensor(weight, dtype=x.dtype)
        self.factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        self.out = x * self.factor * self.weight

    def backward(self, d_out: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        if self.weight is None:
            return d_out
        d_normed = d_out * self.weight
        along = (d_normed * self.x).mean(-1, keepdim=True)
        return self.factor * (d_normed - self.x * self.factor.square() * along)


class RouterWeights:
    """The weights [T, k] that a router gives experts of ids [T, k] by logits [T, E]: ``out``."""

    def __init__(self, logits: torch.Tensor, ids: torch.Tensor, router: _core.RouterConfig) -> None:
        if router.router_bias:
            logits = logits + torch.tensor(router.router_bias, dtype=logits.dtype)
        self.router, self.ids, self.logits = router, ids, logits
        if router.score == "softmax":
            self.scores = torch.softmax(logits, -1)
        elif router.score == "softmax_selected":
            self.scores = torch.softmax(logits.gather(1, ids), -1)
        elif router.score == "sigmoid":
            self.scores = torch.sigmoid(logits)
        else:  # sqrt_softplus
            self.scores = functional.softplus(logits).sqrt()
        self.of_selected = router.score == "softmax_selected"
        self.chosen = self.scores if self.of_selected else self.scores.gather(1, ids)
        self.sum = self.chosen.sum(-1, keepdim=True)
        if not router.renormalize:
            self.divisor = torch.ones_like(self.sum)
        elif router.guard == "clamp_min":
            self.divisor = self.sum.clamp(min=router.guard_eps)
        else:
            self.divisor = self.sum + (router.guard_eps if router.guard == "add_eps" else 0.0)
        self.scale = router.scale or 1.0
        self.out = self.chosen / self.divisor * self.scale

    def backward(self, d_out: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits."""
        d_chosen = d_out * self.scale / self.divisor
        if self.router.renormalize:
            d_divisor = -(d_out * self.out).sum(-1, keepdim=True) / self.divisor
            if self.router.guard == "clamp_min":
                d_divisor = d_divisor * (self.sum >= self.router.guard_eps)
            d_chosen = d_chosen + d_divisor
        if self.of_selected:
            return torch.zeros_like(self.logits).scatter_add_(
                1, self.ids, _softmax_backward(d_chosen, self.scores)
            )
        d_scores = torch.zeros_like(self.scores).scatter_add_(1, self.ids, d_chosen)
        if self.router.score == "softmax":
            return _softmax_backward(d_scores, self.scores)
        if self.router.score == "sigmoid":
            return d_scores * self.scores * (1 - self.scores)
        return d_scores * torch.sigmoid(self.logits) / (2 * self.scores)


def _softmax_backward(d_out: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out * (d_out - (d_out * out).sum(-1, keepdim=True))


def layer_gradient(dy: torch.Tensor, x: torch.Tensor, layer: _core.MoeLayer) -> torch.Tensor:
    """The gradient of x [T, H], of its element type, where that of the output is dy [T, H]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    config, norms = layer.config, layer.norms
    rows = x.float() if x.dtype == torch.float64 else x
    # The experts that the forward chose; their weights again, from the logits.
    ids = torch.tensor(layer.route(array_of(rows)).topk_ids, dtype=torch.int64)
    given, dy = x.to(dtype), dy.to(dtype)
    normed = RmsNorm(given, norms.get("input_norm"), config.norm_eps)
    of_router = normed
    if config.router_input == "norm":
        of_router = RmsNorm(given, norms["router_norm"], config.norm_eps)
    weight = torch.tensor(layer.router_weight, dtype=dtype)
    weights = RouterWeights(functional.linear(of_router.out, weight), ids, config.router)

    d_normed, d_weights = _experts_backward(dy, normed.out, ids, weights.out, layer)
    d_normed += _shared_backward(dy, normed.out, layer)
    d_router_input = weights.backward(d_weights) @ weight
    if of_router is normed:
        return normed.backward(d_normed + d_router_input).to(x.dtype)
    return (normed.backward(d_normed) + of_router.backward(d_router_input)).to(x.dtype)


def _experts_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    layer: _core.MoeLayer,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of what the experts read and of the weights, identity experts included."""
    config, stack = layer.config, layer.stack
    if layer.latent is None:
        if config.router.weight_on == "input":
            dx, dw = _on_input_backward(dy, x, ids, weights, stack, config.activation)
        else:
            dx, dw = expert_gradients(dy, x, ids, weights, stack, config.activation)
    else:
        down, up = (matrix_of(layer.latent, role, 0, x.dtype) for role in ("up", "down"))
        narrow = functional.linear(x, down)
        total = torch.zeros_like(narrow)
        for token, slot, expert in experts_in_turn(narrow, ids, stack, config.activation):
            total.index_add_(0, token, weights[token, slot, None] * expert.out)
        norm = RmsNorm(total, layer.norms.get("latent_norm"), config.norm_eps)
        d_total = norm.backward(dy @ up)
        d_narrow, dw = expert_gradients(d_total, narrow, ids, weights, stack, config.activation)
        dx = d_narrow @ down
    identity = (ids >= stack.num_experts).to(x.dtype)
    dx = dx + dy * (weights * identity).sum(-1, keepdim=True)
    return dx, dw + identity * (dy * x).sum(-1, keepdim=True)


def _on_input_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    stack: _core.ExpertStack,
    activation: _core.Activation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the weight of a pair scales what its expert reads: pairs are tokens of one expert."""
    top_k = ids.shape[1]
    of_pair = x.repeat_interleave(top_k, 0)
    scaled = of_pair * weights.reshape(-1, 1)
    ones = torch.ones_like(scaled[:, :1])
    d_scaled, _ = expert_gradients(
        dy.repeat_interleave(top_k, 0), scaled, ids.reshape(-1, 1), ones, stack, activation
    )
    dx = (d_scaled * weights.reshape(-1, 1)).view(-1, top_k, x.shape[1]).sum(1)
    return dx, (d_scaled * of_pair).sum(-1).view_as(weights)


def _shared_backward(dy: torch.Tensor, x: torch.Tensor, layer: _core.MoeLayer) -> torch.Tensor:
    """The gradient of what shared experts read; zeros without them."""
    shared = layer.shared
    if shared is None:
        return torch.zeros_like(x)
    every = torch.zeros((len(x), 1), dtype=torch.int64)
    gate = None if shared.gate is None else torch.tensor(shared.gate, dtype=x.dtype)
    weights = torch.ones_like(x[:, :1]) if gate is None else torch.sigmoid(x @ gate)[:, None]
    dx, dw = expert_gradients(dy, x, every, weights, shared.stack, layer.config.shared_activation)
    return dx if gate is None else dx + dw * weights * (1 - weights) * gate

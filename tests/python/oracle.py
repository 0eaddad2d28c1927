"""What results must be: the definition of a layer in f64, and how far from it they are."""

from dataclasses import dataclass, field

import numpy as np

import moesaic as mo


def rel_l2(got, want) -> float:
    """The relative error |got - want| / |want| of all values together.

    Infinite where it cannot be computed (another shape, or NaN on either side), so that no bound
    lets it pass.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return float("inf")
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    return float("inf") if np.isnan(error) else float(error)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def expert_f64(x, gate, up, down) -> np.ndarray:
    """One expert on one token: down (silu(gate x) * up x)."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    return down @ (silu(gate @ x) * (up @ x))


def moe_f64(x, ids, weights, gate, up, down) -> np.ndarray:
    """The weighted sum of each token's experts; ids below 0 are skipped."""
    y = np.zeros((len(x), down.shape[1]))
    for t, slot in np.ndindex(*np.shape(ids)):
        e = ids[t][slot]
        if e >= 0:
            y[t] += weights[t][slot] * expert_f64(x[t], gate[e], up[e], down[e])
    return y


# --- routers -----------------------------------------------------------------------------------


def router_scores(router: mo.RouterConfig, logits: np.ndarray) -> np.ndarray:
    """Scores [T, E] of logits to which the router's bias is added already."""
    if router.score == "softmax":
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)
    if router.score == "sigmoid":
        return sigmoid(logits)
    if router.score == "sqrt_softplus":
        return np.sqrt(np.logaddexp(0, logits))
    return logits  # softmax_selected: what the selected ones make of them


def selection_fault(router: mo.RouterConfig, logits: np.ndarray, ids: np.ndarray) -> str | None:
    """Why ids [T, top_k] are not the best of each token in descending order; None if they are.

    Values that f32 cannot tell apart may stand in either order.
    """
    values = logits if router.select_on == "logits" else router_scores(router, logits)
    if len(router.selection_bias):
        values = values + np.asarray(router.selection_bias)
    near = 1e-4 * (1 + np.abs(values).max(initial=0))
    unclear = np.zeros(len(ids), bool)
    if router.groups_used < router.num_groups:
        groups = values.reshape(len(ids), router.num_groups, -1)
        best = np.sort(groups, 2)[:, :, -2:]
        reduced = best.max(2) if router.group_reduce == "max" else best.sum(2)
        last = np.sort(reduced, 1)[:, -router.groups_used]
        unclear = (np.abs(reduced - last[:, None]) <= near).sum(1) > 1
        masked = -np.inf if router.group_mask == "minus_infinity" else 0.0
        used = np.repeat(reduced >= last[:, None], groups.shape[2], 1)
        values = np.where(used, values, masked)
    for t in np.flatnonzero(~unclear):
        chosen, others = values[t][ids[t]], np.delete(values[t], ids[t])
        if len(set(ids[t])) != router.top_k:
            return f"token {t} has an expert twice: {ids[t]}"
        if len(others) and others.max() > chosen.min() + near:
            return f"token {t}: {ids[t]} leaves out a value of {others.max()}, above {chosen.min()}"
        if (np.diff(chosen) > near).any():
            return f"token {t}: {ids[t]} is not in descending order: {chosen}"
    return None


def router_weights(router: mo.RouterConfig, logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Weights [T, top_k] of ids; those below 0 count as experts of no score."""
    there = ids >= 0
    scores = router_scores(router, logits)
    weights = np.where(there, np.take_along_axis(scores, np.maximum(ids, 0), 1), 0.0)
    if router.score == "softmax_selected":
        powers = np.where(there, np.exp(weights - weights.max(1, keepdims=True)), 0.0)
        weights = powers / np.maximum(powers.sum(1, keepdims=True), 1e-300)
    if router.renormalize:
        total = weights.sum(1, keepdims=True)
        if router.guard == "add_eps":
            weights = weights / (total + router.guard_eps)
        elif router.guard == "clamp_min":
            weights = weights / np.maximum(total, router.guard_eps)
        else:
            even = np.where(there, 1 / router.top_k, 0.0)
            weights = np.where(total > 0, weights / np.where(total > 0, total, 1), even)
    return weights * (router.scale or 1.0)


# --- layers ------------------------------------------------------------------------------------


def activate(a: mo.Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The formulas in the docstring of Activation."""
    clamped, capped = np.clip(up, -a.limit, a.limit), np.minimum(gate, a.limit)
    return {
        "swiglu": lambda: silu(gate) * up,
        "swiglu_clamp_input": lambda: silu(capped) * clamped,
        "swiglu_clamp_output": lambda: np.minimum(silu(gate), a.limit) * clamped,
        "swiglu_oai": lambda: capped * sigmoid(a.alpha * capped) * (clamped + 1),
        "geglu_tanh": lambda: gelu_tanh(gate) * up,
        "reglu": lambda: np.maximum(gate, 0) * up,
        "gelu_tanh": lambda: gelu_tanh(up),
        "relu_squared": lambda: np.maximum(up, 0) ** 2,
        "situ": lambda: (
            a.beta * np.tanh(gate / a.beta) * sigmoid(gate)
            * (up if a.linear_beta == 0 else a.linear_beta * np.tanh(up / a.linear_beta))
        ),
    }[a.kind]()  # fmt: skip


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


@dataclass
class ExpertsF64:
    """Experts of one kind: up [E, I, H], down [E, H, I], gate like up or None, and biases."""

    activation: mo.Activation
    gate: np.ndarray | None
    up: np.ndarray
    down: np.ndarray
    #: By role, [E, rows].
    bias: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, e: int, x: np.ndarray) -> np.ndarray:
        """Expert ``e`` on rows x [n, H]."""

        def product(role: str, values: np.ndarray) -> np.ndarray:
            y = values @ getattr(self, role)[e].T
            return y + self.bias[role][e] if role in self.bias else y

        up = product("up", x)
        gate = up if self.gate is None else product("gate", x)
        return product("down", activate(self.activation, gate, up))


@dataclass
class LayerF64:
    """All parts of a layer, with the facts of its config."""

    config: mo.MoeConfig
    experts: ExpertsF64
    router_weight: np.ndarray
    shared: ExpertsF64 | None = None
    shared_gate: np.ndarray | None = None
    latent: tuple[np.ndarray, np.ndarray] | None = None
    latent_norm: np.ndarray | None = None
    input_norm: np.ndarray | None = None
    router_norm: np.ndarray | None = None

    def expert_input(self, x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x if self.input_norm is None else self._norm(x, self.input_norm)

    def logits(self, x: np.ndarray, router_input: np.ndarray | None = None) -> np.ndarray:
        """What the layer's own router computes, without its bias."""
        if router_input is not None:
            read = router_input.astype(np.float64)
        elif self.router_norm is not None:
            read = self._norm(x.astype(np.float64), self.router_norm)
        else:
            read = self.expert_input(x)
        return read @ self.router_weight.T

    def __call__(self, x, ids, weights) -> tuple[np.ndarray, np.ndarray]:
        """y [T, H], and the size of the terms that each value is the sum of.

        Where terms cancel, errors are as large as the terms allow, not as the sum.
        """
        x = self.expert_input(x)
        inner = x if self.latent is None else x @ self.latent[0].T
        on_input = self.config.router.weight_on == "input"
        y, size = np.zeros((len(x), inner.shape[1])), np.zeros((len(x), inner.shape[1]))
        for e in np.unique(ids[(ids >= 0) & (ids < len(self.experts.up))]):
            tokens, slots = np.nonzero(ids == e)
            w = weights[tokens, slots][:, None]
            term = self.experts(e, inner[tokens] * w) if on_input else self.experts(
                e, inner[tokens]) * w  # fmt: skip
            np.add.at(y, tokens, term)
            np.add.at(size, tokens, np.abs(term))
        if self.latent is not None:
            if self.latent_norm is not None:
                factor = self._norm(y, self.latent_norm) / np.where(y == 0, 1, y)
                y, size = y * factor, size * np.abs(factor)
            up = self.latent[1]
            y, size = y @ up.T, np.sqrt(size**2 @ (up.T**2))
        # Identity experts stand behind those with weights, and give the input itself.
        for t, slot in zip(*np.nonzero(ids >= len(self.experts.up)), strict=True):
            y[t] += x[t] * weights[t, slot]
            size[t] += np.abs(x[t] * weights[t, slot])
        if self.shared is not None:
            term = self.shared(0, x)
            if self.shared_gate is not None:
                term = term * sigmoid(x @ self.shared_gate)[:, None]
            term = term * self.config.shared_scale
            y, size = y + term, size + np.abs(term)
        return y, size

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return rms_norm(x, weight, self.config.norm_eps)

"""What results must be: the definition of a layer in f64, and how far from it they are."""

import numpy as np


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


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


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

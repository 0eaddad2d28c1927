"""Random values for tests; everything follows from the seed."""

import numpy as np

import moesaic as mo


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """f32 values of the normal distribution with deviation ``scale``."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values * np.float32(scale)


def expert_weights(
    experts: int, hidden: int, intermediate: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f32 gate, up [E, I, H] and down [E, H, I] whose products are about as large as x."""
    shapes = [(experts, intermediate, hidden)] * 2 + [(experts, hidden, intermediate)]
    return tuple(
        normal(*shape, seed=3 * seed + i, scale=shape[-1] ** -0.5) for i, shape in enumerate(shapes)
    )


def random_routing(
    tokens: int, experts: int, top_k: int, *, seed: int = 0, skipped: tuple[int, ...] = ()
) -> mo.Routing:
    """Different experts for every token, with weights that do not add up to 1.

    The ``skipped`` tokens have no expert.
    """
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    ids[list(skipped)] = -1
    return mo.Routing(ids, rng.random((tokens, top_k), np.float32))


def poisoned(*shape: int) -> np.ndarray:
    """What an output holds before a call, so that a value that nobody wrote is seen."""
    return np.full(shape, np.nan, np.float32)

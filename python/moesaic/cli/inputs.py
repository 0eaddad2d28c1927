"""What a layer is called with beside x, for the commands that run layers on random tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

import moesaic as mo


def other_inputs(layer: mo.MoeLayer, tokens: int, seed: int) -> dict[str, Any]:
    """Return random keyword arguments for `tokens` rows; none where x is enough.

    A router that reads a tensor of its own gets one as independent of x as x itself is random, and
    a table of experts by token gets token ids that are all equally likely.
    """
    rng = np.random.default_rng([seed, 1])
    config = layer.config
    if config.vocab_size:
        return {"token_ids": rng.integers(0, config.vocab_size, tokens).astype(np.int32)}
    if config.router_input == "separate":
        return {"router_input": rng.standard_normal((tokens, config.hidden_size), np.float32)}
    return {}


def rows(arguments: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Return the arguments of the tokens from `first` to `end`."""
    return {name: array[first:end] for name, array in arguments.items()}

"""One small layer of every architecture, and of the parts that few of them have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from test_models_agree import LAYER, PAIRS, VOCAB, H, hf_config, readable, specs, write_gguf

import moesaic as mo


def random_values(seed: int) -> Any:
    """Arrays of a shape, about as large as what keeps products as large as x."""
    rng = np.random.default_rng(seed)
    return lambda shape: rng.standard_normal(shape) / np.sqrt(shape[-1])


def architectures() -> list[tuple[str, str]]:
    """An architecture and a model type stored as it, each architecture once."""
    return list({pair[0]: pair for pair in PAIRS if readable(pair)}.values())


def files_of(pair: tuple[str, str], folder: Path) -> Iterator[Path]:
    """A file for each way that this model can be stored; the layer is block ``LAYER``."""
    for number, spec in enumerate(specs(*pair)):
        _, shared = hf_config(pair[1], spec)
        path = folder / f"{pair[0]}-{number}.gguf"
        write_gguf(path, *pair, spec, shared, random_values(number))
        yield path


def inputs_of(layer: mo.MoeLayer, tokens: int, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """x [tokens, H], and what a call of this layer takes beside it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, H), np.float32)
    others: dict[str, Any] = {}
    if layer.token_experts is not None:
        others["token_ids"] = rng.integers(0, VOCAB, tokens, np.int32)
    if layer.config.router_input == "separate":
        others["router_input"] = rng.standard_normal((tokens, H), np.float32)
    return x, others


__all__ = ["LAYER", "architectures", "files_of", "inputs_of"]

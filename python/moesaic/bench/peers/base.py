"""What a peer must offer to be measured beside us."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from ..weights import BenchLayer


class PeerUnavailable(Exception):
    """The peer cannot run here; the message says why."""


def require_ggml_types(layers: list[BenchLayer], count: int = 1000) -> None:
    """For peers that read a GGUF file's bytes of types below ``count``. Raises PeerUnavailable."""
    for weight in (layers[0].gate, layers[0].up, layers[0].down):
        if not 0 <= weight.ggml_id < count:
            raise PeerUnavailable(f"reads no {weight.quant}")


class Peer:
    """One engine with its own copy of the weights.

    ``load`` is called once per bench; ``prepare`` once per number of tokens and threads; ``run`` is
    what is timed and must do the routed experts of one layer: gate, up, SiLU, down, weighted sum.
    """

    name = "peer"

    def load(self, layers: list[BenchLayer]) -> None:
        raise NotImplementedError

    def prepare(self, num_tokens: int, threads: int) -> None:
        raise NotImplementedError

    def run(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Run x f32 [T, H], ids i32 [T, top_k], weights f32 [T, top_k]; returns f32 [T, H]."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives its memory back."""

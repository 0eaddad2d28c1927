"""Our own entries in the bench: the layer at each precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import moesaic as mo
from moesaic._errors import error_of

from .peers import Peer
from .weights import INT4_GROUP

if TYPE_CHECKING:
    from .weights import BenchLayer, BenchWeight


class Moesaic(Peer):
    """One stack per layer, prepared once; the routing is given, as for the peers."""

    def __init__(self, precision: str, device: str = "cpu") -> None:
        self.name = "moesaic" if precision == "auto" else f"moesaic {precision}"
        self._device = device
        self._precision: Any = precision  # a word that the call checks
        self._stacks: list[mo.ExpertStack] = []

    def load(self, layers: list[BenchLayer]) -> None:
        self._stacks = load_stacks(layers, self._device)

    def share(self, other: Moesaic) -> None:
        """Uses the stacks of another entry instead of a second copy."""
        self._stacks = other._stacks

    def prepare(self, num_tokens: int, threads: int) -> None:
        self._threads = threads
        hidden = self._stacks[0].hidden_size
        self._out = np.empty((num_tokens, hidden), np.float32)

    def run(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        routing = mo.Routing(ids, weights)
        with mo.tuning(threads=self._threads):
            return mo.moe_forward(
                x,
                None,
                self._stacks[layer],
                routing=routing,
                out=self._out,
                precision=self._precision,
            )

    def close(self) -> None:
        self._stacks = []


def load_stacks(layers: list[BenchLayer], device: str = "cpu") -> list[mo.ExpertStack]:
    """Stacks in the layout the backend runs fastest, from bytes as a file holds them."""
    int4 = {w.quant == "INT4" for w in (layers[0].gate, layers[0].up, layers[0].down)}
    if len(int4) > 1:
        types = [w.quant for w in (layers[0].gate, layers[0].up, layers[0].down)]
        expected = "INT4 for gate, up and down, or for none"
        raise error_of(mo.ConfigError, "bench", "layers", expected, ", ".join(types))
    return [_int4_stack(l, device) if True in int4 else _encoded_stack(l, device) for l in layers]


def _encoded_stack(layer: BenchLayer, device: str) -> mo.ExpertStack:
    def role(weight: BenchWeight) -> tuple[np.ndarray, str, tuple[int, int, int]]:
        return weight.data, weight.quant, weight.shape

    return mo.ExpertStack.from_encoded(
        gate=role(layer.gate), up=role(layer.up), down=role(layer.down), device=device
    )


def _int4_stack(layer: BenchLayer, device: str) -> mo.ExpertStack:
    def marlin(*roles: BenchWeight) -> mo.MarlinExpertStack:
        experts, _, cols = roles[0].shape
        words = [w.data.view(np.int32).reshape(experts, cols // 8, w.shape[1]) for w in roles]
        scales = [w.scales for w in roles if w.scales is not None]
        return mo.MarlinExpertStack.from_gptq(
            np.concatenate(words, axis=2), np.concatenate(scales, axis=2), group_size=INT4_GROUP
        )

    return mo.ExpertStack.from_marlin(
        gate_up=marlin(layer.gate, layer.up), down=marlin(layer.down), device=device
    )

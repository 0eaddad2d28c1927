"""Peers on a GPU: grouped products over pairs sorted by expert, the rest of the layer in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import PeerUnavailable

if TYPE_CHECKING:
    from ..weights import BenchLayer, BenchWeight


def first_line(error: Exception) -> str:
    """What an error says, for a table; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class GpuPeer:
    """Softmax top-k, the sort before the experts and the sum behind them; all capturable.

    ``errors`` are what the engine raises where it cannot run; they become PeerUnavailable.
    """

    name = "gpu peer"
    errors: tuple[type[Exception], ...] = (RuntimeError,)

    def __init__(self, torch: Any, device: str, layer: BenchLayer, count: int) -> None:
        self._torch, self._device = torch, device
        self._top_k, self._num_experts = layer.shape.top_k, layer.shape.num_experts
        try:
            self._layers = [self._load(layer) for _ in range(count)]
        except self.errors as error:
            raise PeerUnavailable(first_line(error)) from error

    def _load(self, layer: BenchLayer) -> Any:
        """One layer's weights in memory of their own."""
        raise NotImplementedError

    def _experts(self, weights: Any, rows: Any, ends: Any) -> Any:
        """SwiGLU experts of bf16 rows [P, H] sorted by expert; ``ends`` int32 [E]."""
        raise NotImplementedError

    def prepare(self, xs: list[Any], logits: list[Any]) -> Callable[[int], Any]:
        torch = self._torch

        def call(i: int) -> Any:
            x = xs[i]
            weights, ids = torch.softmax(logits[i], dim=-1).topk(self._top_k, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            flat = ids.reshape(-1)
            order = torch.argsort(flat, stable=True)
            counts = torch.zeros(self._num_experts, dtype=torch.int32, device=x.device)
            counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
            ends = torch.cumsum(counts, 0, dtype=torch.int32)
            y = self._experts(self._layers[i], x[order // self._top_k], ends)
            pairs = torch.empty_like(y)
            pairs[order] = y
            pairs = pairs.reshape(x.shape[0], self._top_k, -1)
            return (pairs.float() * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

        try:
            call(0)
        except self.errors as error:
            raise PeerUnavailable(first_line(error)) from error
        return call


class TorchGroupedPeer(GpuPeer):
    """torch._grouped_mm on weights as bf16."""

    name = "torch grouped"

    def __init__(self, torch: Any, device: str, layer: BenchLayer, count: int) -> None:
        if not hasattr(torch, "_grouped_mm"):
            raise PeerUnavailable("needs torch with _grouped_mm (2.8 or later)")
        super().__init__(torch, device, layer, count)

    def _load(self, layer: BenchLayer) -> Any:
        return tuple(self._role(role) for role in (layer.gate, layer.up, layer.down))

    def _role(self, weight: BenchWeight) -> Any:
        """Experts [E, K, N]: the transposed view that the grouped product reads."""
        torch = self._torch
        distinct = torch.from_numpy(weight.values).to(self._device, torch.bfloat16)
        experts = torch.from_numpy(np.arange(weight.shape[0]) % len(weight.values)).to(self._device)
        return distinct.index_select(0, experts).transpose(1, 2)

    def _experts(self, weights: Any, rows: Any, ends: Any) -> Any:
        torch = self._torch
        gate, up, down = weights
        g = torch._grouped_mm(rows, gate, offs=ends)
        hidden = torch.nn.functional.silu(g) * torch._grouped_mm(rows, up, offs=ends)
        return torch._grouped_mm(hidden, down, offs=ends)

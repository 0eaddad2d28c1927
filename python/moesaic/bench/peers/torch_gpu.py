"""PyTorch on a GPU: grouped bf16 products over pairs sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import PeerUnavailable

if TYPE_CHECKING:
    from ..weights import BenchLayer, BenchWeight


class TorchGroupedPeer:
    """torch._grouped_mm on weights as bf16, softmax top-k and the sum in torch, all capturable."""

    name = "torch grouped"

    def __init__(self, torch: Any, device: str, layer: BenchLayer, count: int) -> None:
        if not hasattr(torch, "_grouped_mm"):
            raise PeerUnavailable("needs torch with _grouped_mm (2.8 or later)")
        self._torch, self._device = torch, device
        self._top_k, self._experts = layer.shape.top_k, layer.shape.num_experts
        roles = (layer.gate, layer.up, layer.down)
        self._layers = [tuple(self._role(role) for role in roles) for _ in range(count)]

    def _role(self, weight: BenchWeight) -> Any:
        """Experts [E, K, N]: the transposed view that the grouped product reads."""
        torch = self._torch
        distinct = torch.from_numpy(weight.values).to(self._device, torch.bfloat16)
        experts = torch.from_numpy(np.arange(weight.shape[0]) % len(weight.values)).to(self._device)
        return distinct.index_select(0, experts).transpose(1, 2)

    def prepare(self, xs: list[Any], logits: list[Any]) -> Callable[[int], Any]:
        torch = self._torch

        def call(i: int) -> Any:
            gate, up, down = self._layers[i]
            x = xs[i]
            weights, ids = torch.softmax(logits[i], dim=-1).topk(self._top_k, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            flat = ids.reshape(-1)
            order = torch.argsort(flat, stable=True)
            counts = torch.zeros(self._experts, dtype=torch.int32, device=x.device)
            counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
            ends = torch.cumsum(counts, 0, dtype=torch.int32)
            rows = x[order // self._top_k]
            g = torch._grouped_mm(rows, gate, offs=ends)
            hidden = torch.nn.functional.silu(g) * torch._grouped_mm(rows, up, offs=ends)
            y = torch._grouped_mm(hidden, down, offs=ends)
            pairs = torch.empty_like(y)
            pairs[order] = y
            pairs = pairs.reshape(x.shape[0], self._top_k, -1)
            return (pairs.float() * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

        try:
            call(0)
        except RuntimeError as error:
            raise PeerUnavailable(str(error).splitlines()[0]) from error
        return call

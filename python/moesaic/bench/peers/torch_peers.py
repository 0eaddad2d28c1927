"""PyTorch on the CPU: a loop over the experts in use, in bf16 and in int4 (group 128)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Peer, PeerUnavailable

if TYPE_CHECKING:
    from ..weights import BenchLayer, BenchWeight


class _TorchLoop(Peer):
    """Sort pairs by expert, one product per role and expert in use, index_add back."""

    def __init__(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise PeerUnavailable("pip install torch") from error
        self._torch: Any = torch
        self._layers: list[tuple[list[Any], list[Any], list[Any]]] = []

    def _pack(self, values: np.ndarray) -> Any:
        raise NotImplementedError

    def _linear(self, x: Any, weight: Any) -> Any:
        raise NotImplementedError

    def _role(self, weight: BenchWeight) -> list[Any]:
        distinct = [self._pack(v) for v in weight.values]
        count = weight.shape[0]
        return [self._copy(distinct[e % len(distinct)]) for e in range(count)]

    def _copy(self, packed: Any) -> Any:
        return tuple(p.clone() for p in packed) if isinstance(packed, tuple) else packed.clone()

    def load(self, layers: list[BenchLayer]) -> None:
        for layer in layers:
            self._layers.append(
                (self._role(layer.gate), self._role(layer.up), self._role(layer.down))
            )

    def prepare(self, num_tokens: int, threads: int) -> None:
        self._torch.set_num_threads(threads)

    def run(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        torch = self._torch
        gate, up, down = self._layers[layer]
        with torch.inference_mode():
            xt = torch.from_numpy(x).to(torch.bfloat16)
            out = torch.zeros(x.shape, dtype=torch.float32)
            flat = torch.from_numpy(ids).reshape(-1)
            share = torch.from_numpy(weights).reshape(-1)
            order = torch.argsort(flat, stable=True)
            experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
            begin = 0
            for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
                pairs = order[begin : begin + count]
                begin += count
                tokens = pairs // ids.shape[1]
                rows = xt[tokens]
                g = self._linear(rows, gate[expert])
                h = torch.nn.functional.silu(g) * self._linear(rows, up[expert])
                y = self._linear(h, down[expert]).float() * share[pairs, None]
                out.index_add_(0, tokens, y)
        result: np.ndarray = out.numpy()
        return result

    def close(self) -> None:
        self._layers = []


class TorchBf16Peer(_TorchLoop):
    """torch's linear on the weights as bf16."""

    name = "torch bf16"

    def _pack(self, values: np.ndarray) -> Any:
        return self._torch.from_numpy(values).to(self._torch.bfloat16)

    def _linear(self, x: Any, weight: Any) -> Any:
        return self._torch.nn.functional.linear(x, weight)


class TorchInt4Peer(_TorchLoop):
    """aten's int4 product; the weights are quantised anew, asymmetric.

    Groups of 128, or 32 where 128 does not divide.
    """

    name = "torch int4"

    def _pack(self, values: np.ndarray) -> Any:
        torch = self._torch
        rows, cols = values.shape
        group = 128 if cols % 128 == 0 else 32
        grouped = values.reshape(rows, cols // group, group)
        low, high = grouped.min(2), grouped.max(2)
        scale = np.maximum(high - low, 1e-6) / 15.0
        q = np.clip(np.rint((grouped - low[..., None]) / scale[..., None]), 0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            torch.from_numpy(q.reshape(rows, cols).astype(np.int32)), 1
        )
        # aten computes (q - 8) * scale + zero.
        zero = low + 8.0 * scale
        table = np.stack([scale.T, zero.T], axis=-1)
        return packed, torch.from_numpy(np.ascontiguousarray(table)).to(torch.bfloat16)

    def _linear(self, x: Any, weight: Any) -> Any:
        packed, table = weight
        group = x.shape[1] // table.shape[0]
        return self._torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, table)

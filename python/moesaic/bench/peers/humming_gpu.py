"""humming-kernels on a GPU: grouped products of bf16 rows with 4-bit weights as GPTQ stores them.

Written against the Python face of humming-kernels 0.1.19, which compiles its kernels when they are
first used; not run on a GPU yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..weights import INT4_GROUP
from .base import PeerUnavailable
from .torch_gpu import GpuPeer

if TYPE_CHECKING:
    from ..weights import BenchLayer, BenchWeight

MIN_CAPABILITY = (8, 0)  # of bf16 rows


def gptq_arrays(*roles: BenchWeight) -> dict[str, np.ndarray]:
    """INT4 roles, one below the other, as a GPTQ checkpoint names and packs them.

    ``qweight`` int32 [E, K / 8, N]: eight codes of K in a word, the first in its lowest bits;
    ``scales`` f16 [E, K / group, N]. A weight is (code - 8) * scale.
    """
    words, scales = [], []
    for role in roles:
        experts, rows, cols = role.shape
        if role.scales is None:
            raise PeerUnavailable(f"reads no {role.quant}, INT4 alone")
        words.append(role.data.view(np.int32).reshape(experts, cols // 8, rows))
        scales.append(role.scales)
    return {"qweight": np.concatenate(words, axis=2), "scales": np.concatenate(scales, axis=2)}


class HummingPeer(GpuPeer):
    """Gate and up as one product, then down, each a grouped GEMM over all experts."""

    name = "humming int4"
    errors = (RuntimeError, AssertionError, ValueError, KeyError, OSError)

    def __init__(self, torch: Any, device: str, layer: BenchLayer, count: int) -> None:
        for role in (layer.gate, layer.up, layer.down):
            if role.quant != "INT4":
                raise PeerUnavailable(f"reads no {role.quant}, INT4 alone")
        if not torch.cuda.is_available():
            raise PeerUnavailable("needs a GPU that torch sees")
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            raise PeerUnavailable(f"needs sm_80 or later, not sm_{capability[0]}{capability[1]}")
        try:
            from humming.layer import HummingLayer
        except (ImportError, OSError, RuntimeError) as error:
            raise PeerUnavailable(f"pip install 'humming-kernels[cu13]' ({error})") from error
        self._make = HummingLayer
        super().__init__(torch, device, layer, count)

    def _load(self, layer: BenchLayer) -> Any:
        return self._role(layer.gate, layer.up), self._role(layer.down)

    def _role(self, *roles: BenchWeight) -> Any:
        torch = self._torch
        experts, _, cols = roles[0].shape
        product = self._make(
            shape_n=sum(role.shape[1] for role in roles),
            shape_k=cols,
            weight_config={
                "quant_method": "gptq",
                "bits": 4,
                "group_size": INT4_GROUP,
                "sym": True,
            },
            num_experts=experts,
            torch_dtype=torch.bfloat16,
        ).to(self._device)
        arrays = gptq_arrays(*roles)
        product.load_from_tensors({k: torch.from_numpy(v) for k, v in arrays.items()})
        product.transform()
        return product

    def _experts(self, weights: Any, rows: Any, ends: Any) -> Any:
        functional = self._torch.nn.functional
        gate_up, down = weights
        grouped = {
            "expert_layout": functional.pad(ends, (1, 0)),  # first row of each expert, and the end
            "compute_config": {"gemm_type": "grouped_contiguous"},
        }
        gate, up = gate_up(rows, **grouped).chunk(2, dim=-1)
        return down((functional.silu(gate) * up).contiguous(), **grouped)

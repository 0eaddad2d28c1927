"""kt-kernel (ktransformers) on the GGUF bytes, through its extension module.

Its worker pool waits for itself when every core is taken, so it is measured with one thread only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Peer, PeerUnavailable, require_ggml_types

if TYPE_CHECKING:
    from ..weights import BenchLayer

_MAX_TOKENS = 4096


class KtPeer(Peer):
    """ktransformers' CPU experts, through its ``kt_kernel`` extension."""

    name = "kt-kernel"

    def __init__(self) -> None:
        try:
            import kt_kernel  # noqa: F401  chooses and registers the extension
            import torch
            from kt_kernel_ext import CPUInfer, WorkerPoolConfig
            from kt_kernel_ext.kvcache import ggml_type
            from kt_kernel_ext.moe import MOE, MOEConfig
        except Exception as error:  # it raises whatever its platform probe meets
            raise PeerUnavailable(
                f"pip install --no-deps kt-kernel safetensors torch ({error})"
            ) from error
        self._torch: Any = torch
        self._moe_class, self._config_class, self._types = MOE, MOEConfig, ggml_type
        pool = WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [1]
        self._infer: Any = CPUInfer(pool)
        self._layers: list[Any] = []

    def load(self, layers: list[BenchLayer]) -> None:
        require_ggml_types(layers)
        torch = self._torch
        shape = layers[0].shape
        if shape.intermediate % 256:
            raise PeerUnavailable("needs an intermediate size that is a multiple of 256")
        self._mask = torch.zeros(shape.num_experts, dtype=torch.bool)
        identity = torch.arange(shape.num_experts, dtype=torch.int64)
        for index, layer in enumerate(layers):
            config = self._config_class(
                shape.num_experts,
                shape.top_k,
                shape.hidden,
                shape.intermediate,
                self._mask.data_ptr(),
            )
            config.layer_idx = index
            config.pool = self._infer.backend_
            config.m_block = 32
            config.group_min_len = 10
            config.max_len = config.group_max_len = _MAX_TOKENS
            config.gate_proj = layer.gate.data.ctypes.data
            config.up_proj = layer.up.data.ctypes.data
            config.down_proj = layer.down.data.ctypes.data
            config.gate_type = layer.gate.ggml_id
            config.up_type = layer.up.ggml_id
            config.down_type = layer.down.ggml_id
            config.hidden_type = self._types.BF16
            moe = self._moe_class(config)
            self._infer.submit(moe.load_weights_task(identity.data_ptr()))
            self._infer.sync()
            self._layers.append(moe)

    def prepare(self, num_tokens: int, threads: int) -> None:
        if threads != 1:
            raise PeerUnavailable("measured with one thread only (its pool stalls with more here)")

    def run(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        torch = self._torch
        x16 = torch.from_numpy(x).to(torch.bfloat16)
        out = torch.empty_like(x16)
        ids64 = torch.from_numpy(ids.astype(np.int64))
        share = torch.from_numpy(weights)
        count = torch.tensor([x.shape[0]], dtype=torch.int32)
        task = self._layers[layer].forward_task(
            count.data_ptr(),
            ids.shape[1],
            ids64.data_ptr(),
            share.data_ptr(),
            x16.data_ptr(),
            out.data_ptr(),
            False,
        )
        self._infer.submit(task)
        self._infer.sync()
        result: np.ndarray = out.float().numpy()
        return result

    def close(self) -> None:
        self._layers = []

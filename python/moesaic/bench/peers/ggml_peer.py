"""ggml (llama.cpp's engine) through ``ggml-python``: mul_mat_id over repacked weights."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from .base import Peer, PeerUnavailable, require_ggml_types

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..weights import BenchLayer, BenchWeight

_META_BYTES = 16 << 20
# Types ggml repacks on x86; llama.cpp keeps the others as stored.
_REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})


class GgmlPeer(Peer):
    """One graph per layer and token count, in the order llama.cpp builds it."""

    name = "ggml"

    def __init__(self) -> None:
        try:
            import ggml
        except ImportError as error:
            raise PeerUnavailable("pip install ggml-python==0.0.45") from error
        self._g: Any = ggml
        self._quiet = ggml.ggml_log_callback(lambda *_: None)
        ggml.ggml_log_set(self._quiet, None)
        self._backend = ggml.ggml_backend_cpu_init()
        self._repack = self._repack_buffer_type()
        self.name = "ggml (repack)" if self._repack else "ggml"
        self._weight_stores: list[tuple[Any, Any]] = []
        self._weights: list[dict[str, Any]] = []
        self._graphs: list[dict[str, Any]] = []
        self._graph_context: Any = None
        self._graph_buffer: Any = None

    def _repack_buffer_type(self) -> Any:
        """The CPU_REPACK buffer type, which llama.cpp uses by default; None where it is missing."""
        g = self._g
        registry = g.ggml_backend_cpu_reg()
        address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        get = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
        types = get(g.ggml_backend_reg_dev_get(registry, 0))
        index = 0
        while types and types[index]:
            if b"REPACK" in g.ggml_backend_buft_name(types[index]):
                return types[index]
            index += 1
        return None

    def _context(self) -> Any:
        g = self._g
        return g.ggml_init(g.ggml_init_params(mem_size=_META_BYTES, mem_buffer=None, no_alloc=True))

    def load(self, layers: list[BenchLayer]) -> None:
        require_ggml_types(layers, self._g.GGML_TYPE_COUNT)
        self._layers = layers
        self._weights = [{} for _ in layers]
        repacked = {w.quant for w in self._roles(layers[0])} & _REPACKED if self._repack else set()
        self._store(lambda w: w.quant in repacked, self._repack)
        self._store(lambda w: w.quant not in repacked, None)

    @staticmethod
    def _roles(layer: BenchLayer) -> tuple[BenchWeight, ...]:
        return layer.gate, layer.up, layer.down

    def _store(self, belongs: Callable[[BenchWeight], bool], buffer_type: Any) -> None:
        """Uploads the roles that belong to one buffer type (None: the backend's own)."""
        g = self._g
        context = self._context()
        members = []
        for tensors, layer in zip(self._weights, self._layers, strict=True):
            for role, weight in zip(("gate", "up", "down"), self._roles(layer), strict=True):
                if belongs(weight):
                    experts, rows, cols = weight.shape
                    tensors[role] = g.ggml_new_tensor_3d(
                        context, weight.ggml_id, cols, rows, experts
                    )
                    members.append((tensors[role], weight.data))
        if not members:
            g.ggml_free(context)
            return
        if buffer_type is None:
            store = g.ggml_backend_alloc_ctx_tensors(context, self._backend)
        else:
            store = g.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not store:
            raise PeerUnavailable("ggml could not allocate the weights")
        self._weight_stores.append((context, store))
        for tensor, data in members:
            g.ggml_backend_tensor_set(tensor, data.ctypes.data_as(ctypes.c_void_p), 0, data.nbytes)

    def _release_graphs(self) -> None:
        if self._graph_context:
            self._g.ggml_backend_buffer_free(self._graph_buffer)
            self._g.ggml_free(self._graph_context)
            self._graph_context = None
            self._graphs = []

    def prepare(self, num_tokens: int, threads: int) -> None:
        g = self._g
        self._release_graphs()
        g.ggml_backend_cpu_set_n_threads(self._backend, threads)
        ctx = self._graph_context = self._context()
        first = self._layers[0]
        hidden, top_k = first.shape.hidden, first.shape.top_k
        for weights in self._weights:
            x = g.ggml_new_tensor_3d(ctx, g.GGML_TYPE_F32, hidden, 1, num_tokens)
            ids = g.ggml_new_tensor_2d(ctx, g.GGML_TYPE_I32, top_k, num_tokens)
            scale = g.ggml_new_tensor_3d(ctx, g.GGML_TYPE_F32, 1, top_k, num_tokens)
            gate = g.ggml_mul_mat_id(ctx, weights["gate"], x, ids)
            up = g.ggml_mul_mat_id(ctx, weights["up"], x, ids)
            h = g.ggml_swiglu_split(ctx, gate, up)
            rows = g.ggml_mul(ctx, g.ggml_mul_mat_id(ctx, weights["down"], h, ids), scale)
            stride = rows.contents.nb[2]
            out = None
            for slot in range(top_k):
                part = g.ggml_view_2d(
                    ctx, rows, hidden, num_tokens, stride, slot * rows.contents.nb[1]
                )
                out = part if out is None else g.ggml_add(ctx, out, part)
            if top_k == 1:
                out = g.ggml_cont(ctx, out)
            graph = g.ggml_new_graph(ctx)
            g.ggml_build_forward_expand(graph, out)
            self._graphs.append({"graph": graph, "x": x, "ids": ids, "scale": scale, "out": out})
        self._graph_buffer = g.ggml_backend_alloc_ctx_tensors(ctx, self._backend)
        self._out = np.empty((num_tokens, hidden), np.float32)

    def run(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        g = self._g
        graph = self._graphs[layer]
        for name, array in (("x", x), ("ids", ids), ("scale", weights)):
            ctypes.memmove(graph[name].contents.data, array.ctypes.data, array.nbytes)
        g.ggml_backend_graph_compute(self._backend, graph["graph"])
        ctypes.memmove(self._out.ctypes.data, graph["out"].contents.data, self._out.nbytes)
        return self._out

    def close(self) -> None:
        self._release_graphs()
        for context, store in self._weight_stores:
            self._g.ggml_backend_buffer_free(store)
            self._g.ggml_free(context)
        self._weight_stores = []
        self._g.ggml_backend_free(self._backend)

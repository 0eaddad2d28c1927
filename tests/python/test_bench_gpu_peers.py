"""Peers of the GPU bench without a GPU: what they are given, and why they are absent."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesaic.bench import BenchShape
from moesaic.bench.peers import PeerUnavailable
from moesaic.bench.peers.humming_gpu import HummingPeer, gptq_arrays
from moesaic.bench.peers.torch_gpu import GpuPeer, TorchGroupedPeer
from moesaic.bench.weights import INT4_GROUP, BenchLayer, answer_f64, make_layers

INT4 = BenchShape("int4", 256, 128, 6, 2, "INT4", "INT4")


@pytest.fixture(scope="module")
def layer() -> BenchLayer:
    return make_layers(INT4, 1)[0]


def decoded(qweight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, N, K] of what a GPTQ checkpoint holds."""
    codes = (qweight.view(np.uint32)[:, :, None] >> np.arange(0, 32, 4)[:, None]) & 15
    signed = codes.reshape(len(qweight), -1, qweight.shape[2]).astype(np.float32) - 8
    return (signed * scales.astype(np.float32).repeat(INT4_GROUP, axis=1)).transpose(0, 2, 1)


def fake_torch(capability: tuple[int, int] | None) -> Any:
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: capability is not None,
            get_device_capability=lambda device: capability,
        )
    )


def test_gptq_arrays_decode_to_the_values(layer: BenchLayer) -> None:
    for roles in ((layer.down,), (layer.gate, layer.up)):
        arrays = gptq_arrays(*roles)
        values = np.concatenate([role.values for role in roles], axis=1)
        which = np.arange(INT4.num_experts) % len(values)
        np.testing.assert_array_equal(decoded(**arrays), values[which])


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        (None, True, "needs a GPU"),
        ((7, 5), True, "needs sm_80 or later, not sm_75"),
        ((9, 0), False, "pip install 'humming-kernels"),
    ],
)
def test_humming_says_what_is_missing(
    layer: BenchLayer,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    installed: bool,
    reason: str,
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "humming.layer", None)
    with pytest.raises(PeerUnavailable, match=reason):
        HummingPeer(fake_torch(capability), "cuda:0", layer, 1)


def test_humming_reads_int4_alone() -> None:
    other = make_layers(BenchShape("q8", 64, 32, 2, 1, "Q8_0", "Q8_0"), 1)[0]
    with pytest.raises(PeerUnavailable, match="reads no Q8_0"):
        HummingPeer(fake_torch((9, 0)), "cuda:0", other, 1)
    with pytest.raises(PeerUnavailable, match="reads no Q8_0"):
        gptq_arrays(other.down)


def test_torch_grouped_needs_a_recent_torch(layer: BenchLayer) -> None:
    with pytest.raises(PeerUnavailable, match="_grouped_mm"):
        TorchGroupedPeer(SimpleNamespace(), "cuda:0", layer, 1)


class Grouped:
    """Stands for a layer of humming-kernels: the same calls, in f32 on the CPU."""

    fails = False

    def __init__(self, shape_n: int, shape_k: int, num_experts: int, **config: Any) -> None:
        assert config["weight_config"]["quant_method"] == "gptq"
        assert config["weight_config"]["group_size"] == INT4_GROUP
        self._shape = (num_experts, shape_n, shape_k)
        self._ready = False

    def to(self, device: str) -> Grouped:
        return self

    def load_from_tensors(self, tensors: dict[str, Any]) -> None:
        values = decoded(tensors["qweight"].numpy(), tensors["scales"].numpy())
        assert values.shape == self._shape
        self._values = values

    def transform(self) -> None:
        if self.fails:
            raise AssertionError
        self._ready = True

    def __call__(self, rows: Any, expert_layout: Any, compute_config: dict[str, str]) -> Any:
        import torch

        assert self._ready and compute_config == {"gemm_type": "grouped_contiguous"}
        first = expert_layout.tolist()
        assert len(first) == self._shape[0] + 1 and first[0] == 0 and first[-1] == len(rows)
        values = torch.from_numpy(self._values)
        parts = [rows[a:b].float() @ values[e].T for e, (a, b) in enumerate(pairwise(first))]
        return torch.cat(parts).to(rows.dtype)


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch = pytest.importorskip("torch")
    module = ModuleType("humming.layer")
    module.HummingLayer = Grouped  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch


def test_humming_is_asked_for_the_layer(layer: BenchLayer, humming: Any) -> None:
    torch = humming
    peer: GpuPeer = HummingPeer(torch, "cpu", layer, 2)
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((5, INT4.hidden), dtype=np.float32))
    logits = torch.from_numpy(rng.standard_normal((5, INT4.num_experts), dtype=np.float32))
    x = x.to(torch.bfloat16)
    y = peer.prepare([x, x], [logits, logits])(1).float().numpy()
    weights, ids = torch.softmax(logits, dim=-1).topk(INT4.top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    want = answer_f64(layer, x.float().numpy(), ids.numpy(), weights.numpy())
    assert np.linalg.norm(y - want) < 1e-2 * np.linalg.norm(want)


def test_what_humming_raises_is_a_reason(
    layer: BenchLayer, humming: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grouped, "fails", True)
    with pytest.raises(PeerUnavailable, match="AssertionError"):
        HummingPeer(humming, "cpu", layer, 1)

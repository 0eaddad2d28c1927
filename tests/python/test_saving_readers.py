"""Saved files as others read them: the gguf package, and ggml."""

from __future__ import annotations

import numpy as np
import pytest
from files import write_small
from oracle import rel_l2
from saved import open_layer
from values import normal

import moesaic as mo

gguf = pytest.importorskip("gguf")


def test_the_gguf_package_reads_it(tmp_path):
    small = write_small(tmp_path / "m.gguf", layers=3)
    chosen = {5: open_layer(small.path, 2), 2: open_layer(small.path, 0)}
    given = {
        "general.name": "two", "a.list": [1, 2], "a.texts": ["x", "y"], "a.flag": True, "a.int": -1,
        "a.big": 2**40, "a.float": 0.5, "a.double": 0.1, "general.alignment": 64,
    }  # fmt: skip
    mo.write_gguf(tmp_path / "new.gguf", chosen, metadata=given)
    reader = gguf.GGUFReader(tmp_path / "new.gguf")
    values = {name: entry.contents() for name, entry in reader.fields.items()}
    for key, value in given.items():
        assert values[key] == value
    assert reader.fields["a.float"].types == [gguf.GGUFValueType.FLOAT32]
    assert reader.fields["a.double"].types == [gguf.GGUFValueType.FLOAT64]
    want = {
        "block_count": 6, "embedding_length": small.hidden, "expert_count": small.num_experts,
        "expert_used_count": small.top_k, "expert_feed_forward_length": small.intermediate,
        "feed_forward_length": small.intermediate,
    }  # fmt: skip
    assert {key: values[f"qwen3moe.{key}"] for key in want} == want
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert all(tensor.data_offset % 64 == 0 for tensor in tensors.values())
    assert {name.split(".")[1] for name in tensors} == {"2", "5"}
    down = tensors["blk.5.ffn_down_exps.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q6_K
    assert list(down.shape) == [small.intermediate, small.hidden, small.num_experts]  # as ggml
    decoded = gguf.dequantize(down.data, down.tensor_type)
    np.testing.assert_allclose(decoded, small.weights[2].down, rtol=1e-5, atol=1e-6)
    router = tensors["blk.2.ffn_gate_inp.weight"]
    np.testing.assert_array_equal(router.data, small.weights[0].router)


def ggml_experts(path, x, routing) -> np.ndarray:
    """What the experts of block 0 of a file give in ggml's own graph, on one thread."""
    from moesaic.bench.peers.ggml_peer import GgmlPeer
    from moesaic.bench.shapes import BenchShape
    from moesaic.bench.weights import BenchLayer, BenchWeight

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def weight(role: str) -> BenchWeight:
        tensor = tensors[f"blk.0.ffn_{role}_exps.weight"]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        data = np.array(tensor.data).reshape(-1).view(np.uint8)
        return BenchWeight(
            tensor.tensor_type.name, int(tensor.tensor_type), shape, data, np.empty(0)
        )

    up = weight("up")
    experts, width, hidden = up.shape
    ids, weights = np.array(routing.topk_ids), np.array(routing.topk_weights)
    shape = BenchShape("saved", hidden, width, experts, ids.shape[1])
    peer = GgmlPeer()
    try:
        peer.load([BenchLayer(shape, weight("gate"), up, weight("down"))])
        peer.prepare(len(x), 1)
        return peer.run(0, x, ids, weights).copy()
    finally:
        peer.close()


def rounded(x: np.ndarray) -> np.ndarray:
    """As ggml rounds what meets K types: 8 bits with a scale for each 256 values."""
    blocks = x.reshape(*x.shape[:-1], -1, 256)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.round(blocks / step) * step).reshape(x.shape)


def in_numpy(stack: mo.ExpertStack, x: np.ndarray, routing, seen) -> np.ndarray:
    """The experts in f64, on activations as `seen` leaves them."""
    gate, up, down = (stack.dequantize(r).astype(np.float64) for r in ("gate", "up", "down"))
    y = np.zeros(x.shape)
    for token, (ids, weights) in enumerate(
        zip(routing.topk_ids, routing.topk_weights, strict=True)
    ):
        for expert, weight in zip(ids, weights, strict=True):
            g, u = gate[expert] @ seen(x[token]), up[expert] @ seen(x[token])
            y[token] += weight * (down[expert] @ seen(g / (1 + np.exp(-g)) * u))
    return y


@pytest.mark.parametrize("type", ["F32", "K types"])
def test_ggml_computes_the_same(type, tmp_path):
    """The experts of a written file in ggml's own graph: the same but for its rounding."""
    pytest.importorskip("ggml")
    types = {} if type == "K types" else {"gate_type": "F32", "down_type": "F32"}
    small = write_small(tmp_path / "m.gguf", **types)
    open_layer(small.path).save(tmp_path / "new.gguf")
    x = normal(4, small.hidden)
    layer = open_layer(tmp_path / "new.gguf")
    y, routing = layer(x, return_routing=True)
    got = ggml_experts(tmp_path / "new.gguf", x, routing)
    if type == "F32":
        assert rel_l2(got, y) < 1e-5
        return
    # A value that lies between two steps may be rounded to the other one, and then counts a step.
    assert rel_l2(got, in_numpy(layer.stack, x, routing, rounded)) < 1e-3
    assert rel_l2(in_numpy(layer.stack, x, routing, lambda values: values), y) < 2e-3

import gc
import logging

import numpy as np
import pytest
from files import write_small
from oracle import moe_f64, rel_l2, silu
from values import normal, poisoned

import moesaic as mo


def inputs(small, tokens):
    return normal(tokens, small.hidden)


@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_own_router(small, layer, tokens):
    x = inputs(small, tokens)
    weights = small.weights[0]
    y, routing = layer(x, return_routing=True)
    want = mo.route(x @ weights.router.T, top_k=small.top_k)
    np.testing.assert_array_equal(routing.topk_ids, want.topk_ids)
    np.testing.assert_allclose(routing.topk_weights, want.topk_weights, atol=1e-5)
    exact = moe_f64(
        x, routing.topk_ids, routing.topk_weights, weights.gate, weights.up, weights.down
    )
    assert y.shape == x.shape and y.dtype == x.dtype
    assert rel_l2(y, exact) < (2e-3 if tokens == 1 else 2e-2)


def test_forms_agree(small, layer):
    x = inputs(small, 5)
    y, routing = layer(x, return_routing=True)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer(x, routing=routing), y)
    logits = x @ small.weights[0].router.T
    assert rel_l2(layer(x, logits), y) < 1e-3
    with pytest.raises(mo.ConfigError, match="routing"):
        layer(x, logits, routing=routing)


def test_workspace_and_out(small, layer):
    x = inputs(small, 7)
    want = layer(x)
    workspace = mo.Workspace.for_layer(layer, max_tokens=7)
    assert workspace.nbytes > 0
    out = poisoned(*x.shape)
    for _ in range(2):
        assert layer(x, out=out, workspace=workspace) is out
        np.testing.assert_array_equal(out, want)
    layer(x, out=out, accumulate=True)
    assert rel_l2(out, 2 * want) < 1e-6
    out[:] = 3
    with pytest.raises(mo.WorkspaceError):
        layer(x, out=out, workspace=mo.Workspace(64))
    np.testing.assert_array_equal(out, 3)


def test_from_parts(small, layer):
    x = inputs(small, 3)
    parts = mo.MoeLayer(layer.stack, layer.config, small.weights[0].router)
    np.testing.assert_array_equal(parts(x), layer(x))
    np.testing.assert_array_equal(parts.router_weight, small.weights[0].router)
    bare = mo.MoeLayer(layer.stack, layer.config)
    assert bare.router_weight is None
    with pytest.raises(mo.Error):
        bare(x)
    with pytest.raises(mo.ShapeError, match="router_weight"):
        mo.MoeLayer(layer.stack, layer.config, np.zeros((2, 2), np.float32))
    with pytest.raises(mo.ShapeError, match="hidden_size"):
        mo.MoeLayer(layer.stack, layer.config.replace(hidden_size=8))


def test_shared_experts(tmp_path):
    small = write_small(tmp_path / "m.gguf", arch="qwen2moe", shared_intermediate=64)
    w = small.weights[0]
    x = inputs(small, 4)
    with mo.GgufFile(small.path) as f, mo.MoeLayer.from_gguf(f, 0) as layer:
        assert layer.config.shared == "sigmoid_gated"
        y, routing = layer(x, return_routing=True)
        want = moe_f64(x, routing.topk_ids, routing.topk_weights, w.gate, w.up, w.down)
        hidden = silu(x @ w.shared_gate.T) * (x @ w.shared_up.T)
        shared = hidden @ w.shared_down.T
        want += shared / (1 + np.exp(-(x @ w.shared_router)))[:, None]
        assert rel_l2(mo.moe_forward_cpu(x, routing, layer), want) < 1e-5
        assert rel_l2(y, want) < 2e-2


def test_no_tokens(layer, small):
    x = np.zeros((0, small.hidden), np.float32)
    y, routing = layer(x, return_routing=True)
    assert y.shape == x.shape and routing.topk_ids.shape == (0, small.top_k)


def test_report_and_memory(small, layer, caplog):
    assert [r.role for r in layer.report.roles] == ["gate", "up", "down"]
    assert layer.report.roles[2].stored == "Q6_K" and layer.report.roles[2].reason
    memory = layer.memory()
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert memory["down"] >= np.prod(small.weights[0].down.shape) // 256 * 210
    assert memory["router"] == small.weights[0].router.nbytes
    with caplog.at_level(logging.INFO, "moesaic"):
        mo.MoeLayer.from_gguf(mo.GgufFile(small.path), 1)
    assert sum("ffn_" in message for message in caplog.messages) == 3


def test_close(small):
    f = mo.GgufFile(small.path)
    with mo.MoeLayer.from_gguf(f, 0, layout="file") as layer:
        layer(inputs(small, 1))
        stack = layer.stack
        assert not layer.closed
    layer.close()
    assert layer.closed and "closed" in repr(layer)
    for use in (lambda: layer(inputs(small, 1)), lambda: layer.config, layer.memory):
        with pytest.raises(mo.DeviceError, match="closed"):
            use()
    with pytest.raises(mo.DeviceError):
        f.close()  # the stack still reads it
    del stack
    gc.collect()
    f.close()


def test_precision(small, layer):
    x = inputs(small, 64)
    exact, fast = layer(x, precision="exact"), layer(x, precision="fast")
    fixed = mo.MoeLayer.from_gguf(mo.GgufFile(small.path), 0, precision="exact")
    assert fixed.precision == "exact"
    with mo.tuning(precision="fast"):
        np.testing.assert_array_equal(layer(x), fast)
        np.testing.assert_array_equal(fixed(x), exact)
        np.testing.assert_array_equal(fixed(x, precision="fast"), fast)
    with pytest.raises(mo.ConfigError, match="precision: expected auto"):
        layer(x, precision="half")


def test_explain(layer):
    facts = mo.explain(layer, num_tokens=1)
    assert facts and all(isinstance(k, str) and isinstance(v, str) for k, v in facts.items())
    assert len(str(facts).splitlines()) >= len(facts)
    with mo.tuning(gemm="aligned"):
        assert "aligned" in str(mo.explain(layer, num_tokens=64))


def test_explained_kernels_exist(layer):
    names = [k.name for k in mo.backends()[0].kernels]
    assert names and len(set(names)) == len(names)

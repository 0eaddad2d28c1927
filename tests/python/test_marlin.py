"""Products with INT4 group experts, in every form of call, beside f64."""

import numpy as np
import pytest
from int4 import Checkpoint
from oracle import rel_l2
from values import normal, poisoned

import moesaic as mo

CASES = [
    {"E": 3, "K": 128, "N": 48, "group_size": 32},
    {"E": 2, "K": 256, "N": 64, "group_size": 128, "zeros": False},
    {"E": 2, "K": 256, "N": 64, "group_size": 64, "order": "shared"},
    {"E": 3, "K": 256, "N": 40, "group_size": 32, "order": "per_expert"},
    {"E": 3, "K": 104, "N": 24, "group_size": 32, "order": "random"},
    {"E": 2, "K": 96, "N": 16, "group_size": -1, "form": "gptq_v2", "scale_type": np.float32},
    {"E": 2, "K": 128, "N": 32, "group_size": 64, "form": "awq"},
    {"E": 2, "K": 96, "N": 20, "group_size": 32, "form": "pack_quantized", "order": "shared"},
]


@pytest.fixture(params=CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def checkpoint(request):
    return Checkpoint(**request.param)


def test_sizes_and_values(checkpoint):
    c, m = checkpoint, checkpoint.stack()
    assert (m.num_experts, m.k, m.n_per_expert) == (c.E, c.K, c.N)
    assert m.group_size == (c.K if c.group_size == -1 else c.group_size)
    assert m.act_order == (c.g_idx is not None)
    assert m.zero_workspace() is None
    for e in range(c.E):
        w = m.dequantize(e)
        assert w.shape == (c.N, c.K)
        np.testing.assert_allclose(w, c.weights[e].T, rtol=2e-7, atol=0)
        parts = m.unpack(e)
        np.testing.assert_array_equal(parts["codes"], c.codes[e])


def test_phases_agree_with_float64(checkpoint):
    c, m = checkpoint, checkpoint.stack()
    x = normal(12, c.K, seed=1)
    dispatches = [(1, 0, 7, 5), (0, 9, 0, 3)]
    want = np.concatenate([x[9:12] @ c.weights[0], np.zeros((4, c.N)), x[0:5] @ c.weights[1]])
    assert rel_l2(m.gemm_phase_batched(x, dispatches, precision="exact"), want) < 1e-4
    assert rel_l2(m.gemm_phase_batched(x, np.array(dispatches), precision="fast"), want) < 2e-2

    out = poisoned(12, c.N)
    assert m.gemm_phase_batched(x, dispatches, out=out, precision="exact") is out
    assert np.isnan(out[3:7]).all()
    assert rel_l2(out[7:], want[7:]) < 1e-4

    ids = np.array([[0, 1], [-1, 1], [1, 0], [-1, -1], [0, -1]], np.int32)
    routing = mo.Routing(ids, np.ones((5, 2), np.float32))
    pairs = np.zeros((10, c.N))
    for p, e in enumerate(ids.ravel()):
        if e >= 0:
            pairs[p] = x[p // 2] @ c.weights[e]
    for block in (4, 8, 16, 64):
        aligned = mo.align_block_size(routing, c.E, block)
        out = poisoned(10, c.N)
        m.gemm_phase_vllm(x[:5], aligned, 2, out=out, precision="exact")
        assert rel_l2(out, pairs) < 1e-4
        assert (out[[2, 6, 7, 9]] == 0).all()
        with pytest.raises(mo.ShapeError):
            m.gemm_phase_vllm(x[:5], aligned, 1)

    bias = normal(c.N, seed=2)
    lin = m.make_expert_linear(1, bias=bias)
    assert (lin.in_features, lin.out_features) == (c.K, c.N)
    assert rel_l2(lin(x, precision="exact"), x @ c.weights[1] + bias) < 1e-4


def test_expert_linear_offsets():
    c = Checkpoint(2, 64, 192, 32)
    m = c.stack()
    x = normal(3, 64)
    y = m.make_expert_linear(1, 64, 64)(x, precision="exact")
    assert rel_l2(y, x @ c.weights[1][:, 64:128]) < 1e-4
    for bad in ((0, 32, 64), (0, 0, 32), (0, 128, 128), (2, 0, 64), (0, 0, 0), (-1, 0, 64)):
        with pytest.raises(mo.ShapeError):
            m.make_expert_linear(*bad)
    with pytest.raises(mo.ShapeError):
        m.make_expert_linear(0, 0, 64, np.zeros(63, np.float32))


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_input_types(kind):
    c = Checkpoint(2, 64, 32, 32)
    x = normal(3, 64).astype(kind)
    y = c.stack().make_expert_linear(0)(x, precision="exact")
    assert y.dtype == np.float32
    assert rel_l2(y, x.astype(np.float64) @ c.weights[0]) < 1e-4


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"qweight": lambda c: c.qweight[0]}, "ShapeError"),
        ({"qweight": lambda c: c.qweight.astype(np.float32)}, "DTypeError"),
        ({"qweight": lambda c: np.asfortranarray(c.qweight)}, "ShapeError"),
        ({"scales": lambda c: c.scales[:, :1]}, "ShapeError"),
        ({"scales": lambda c: c.scales.astype(np.float64)}, "DTypeError"),
        ({"qzeros": lambda c: c.qzeros[:, :, :-1]}, "ShapeError"),
        ({"g_idx": lambda c: np.arange(63, dtype=np.int32)}, "ShapeError"),
        ({"g_idx": lambda c: np.full(64, 2, np.int32)}, "FormatError"),
        ({"g_idx": lambda c: np.full(64, -1, np.int32)}, "FormatError"),
        ({"group_size": lambda c: 0}, "ShapeError"),
        ({"group_size": lambda c: 64}, "ShapeError"),
        ({"checkpoint_format": lambda c: "gptq_v3"}, "ConfigError"),
    ],
)
def test_bad_tensors(change, error):
    c = Checkpoint(2, 64, 32, 32)
    arguments = {"qweight": c.qweight, "scales": c.scales, "qzeros": c.qzeros, "group_size": 32}
    mo.MarlinExpertStack.from_gptq(**arguments)
    arguments |= {name: make(c) for name, make in change.items()}
    with pytest.raises(getattr(mo, error)):
        mo.MarlinExpertStack.from_gptq(**arguments)


def test_bad_dispatches():
    m = Checkpoint(2, 64, 32, 32).stack()
    x = np.zeros((4, 64), np.float32)
    for bad in ((2, 0, 0, 1), (0, 4, 0, 1), (0, 0, 0, 5), (0, -1, 0, 1), (0, 0, 1 << 40, 1)):
        with pytest.raises(mo.ShapeError):
            m.gemm_phase_batched(x, [bad])
    with pytest.raises(mo.ShapeError):
        m.gemm_phase_batched(x, [(0, 0, 0, 2), (1, 2, 1, 1)])
    with pytest.raises(mo.ShapeError):
        m.gemm_phase_batched(x[:, :32], [(0, 0, 0, 1)])

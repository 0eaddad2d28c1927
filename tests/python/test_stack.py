import itertools

import numpy as np
import pytest
from files import write_small
from oracle import rel_l2, silu
from values import normal, poisoned

import moesaic as mo

IDS = np.array([[0, 4], [2, -1], [1, 1]], np.int32)


def test_sizes(stack):
    assert (stack.num_experts, stack.hidden_size, stack.intermediate_size) == (5, 24, 40)
    assert stack.kind == "stacked" and stack.gated
    assert stack.quants == {"gate": "F32", "up": "F32", "down": "F32"}
    assert "num_experts=5" in repr(stack)


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_gemv(stack, dense, role):
    weight = dense[("gate", "up", "down").index(role)]
    rows, cols = weight.shape[1:]
    per_slot = normal(3, 2, cols)
    inputs = [per_slot] if role == "down" else [per_slot, per_slot[:, 0], per_slot[0, 0]]
    for x in inputs:
        ids = IDS[0] if x.ndim == 1 else IDS
        out = poisoned(*ids.shape, rows)
        assert getattr(stack, f"gemv_{role}")(x, ids, out=out) is out
        want = np.zeros(out.shape)
        for at, e in np.ndenumerate(ids):
            row = x[at] if x.ndim == 3 else (x[at[0]] if x.ndim == 2 else x)
            if e >= 0:
                want[at] = weight[e].astype(np.float64) @ row
        assert rel_l2(out, want) < 1e-5
        np.testing.assert_array_equal(out[ids < 0], 0)


def test_gemv_gate_up_silu(stack):
    x = normal(3, 24)
    got = stack.gemv_gate_up_silu(x, IDS)
    want = silu(stack.gemv_gate(x, IDS).astype(np.float64)) * stack.gemv_up(x, IDS)
    assert rel_l2(got, want) < 1e-5


def test_gemm_is_gemv_per_pair(stack):
    x, h = normal(3, 24), normal(6, 40, seed=1)
    plan = mo.BucketPlan.build(mo.Routing(IDS, np.ones(IDS.shape, np.float32)), 5)
    valid = IDS.ravel() >= 0
    for role in ("gate", "up"):
        out = getattr(stack, f"gemm_{role}")(x, plan)
        want = getattr(stack, f"gemv_{role}")(x, IDS).reshape(6, 40)
        assert out.shape == (6, 40)
        assert rel_l2(out[valid], want[valid]) < 1e-5
    out = stack.gemm_down(h, plan)
    want = stack.gemv_down(h.reshape(3, 2, 40), IDS).reshape(6, 24)
    assert rel_l2(out[valid], want[valid]) < 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dense_dtypes(dense, dtype):
    stack = mo.ExpertStack.from_dense_stacks(*(w.astype(dtype) for w in dense))
    for role, weight in zip(("gate", "up", "down"), dense, strict=True):
        np.testing.assert_array_equal(stack.dequantize(role, 3), weight[3].astype(dtype))


def test_ungated(dense):
    stack = mo.ExpertStack.from_dense_stacks(None, *dense[1:])
    assert not stack.gated and set(stack.quants) == {"up", "down"}
    with pytest.raises(mo.Error):
        stack.gemv_gate(np.ones(24, np.float32), np.zeros(1, np.int32))


@pytest.mark.parametrize("types", [("Q4_K", "Q6_K"), ("Q8_0", "Q4_0"), ("F16", "BF16")])
@pytest.mark.parametrize("layout", ["auto", "file"])
def test_load_from_gguf(tmp_path, types, layout):
    file = write_small(tmp_path / "m.gguf", gate_type=types[0], down_type=types[1])
    with mo.GgufFile(file.path) as f:
        stack = mo.ExpertStack.load_from_gguf(f, 0, layout=layout)
        assert stack.quants == {"gate": types[0], "up": types[0], "down": types[1]}
        for role in ("gate", "up", "down"):
            want = getattr(file.weights[0], role)
            for e in (0, file.num_experts - 1):
                np.testing.assert_array_equal(stack.dequantize(role, e), want[e])
        if layout == "file":
            assert {r.decision for r in stack.report.roles} == {"mapped"}
            with pytest.raises(mo.DeviceError):
                f.close()
        assert "gate" in str(stack.report)
        del stack


def test_dequantize_on_request(small):
    stack = mo.ExpertStack.open_and_load(small.path, 1, dequantize="f32")
    assert set(stack.quants.values()) == {"F32"}
    np.testing.assert_array_equal(stack.dequantize("down", 2), small.weights[1].down[2])
    with pytest.raises(mo.ConfigError, match=r"dequantize: expected f32 \| f16 \| bf16, got 'q4'"):
        mo.ExpertStack.open_and_load(small.path, 1, dequantize="q4")


def test_fused_gate_up(tmp_path):
    file = write_small(tmp_path / "m.gguf", fused_gate_up=True)
    stack = mo.ExpertStack.open_and_load(file.path, 0)
    for role in ("gate", "up"):
        np.testing.assert_array_equal(stack.dequantize(role, 5), getattr(file.weights[0], role)[5])


def test_from_encoded(dense):
    roles = [(mo.testing.quantize(w, "F16"), "F16", w.shape) for w in dense]
    stack = mo.ExpertStack.from_encoded(*roles)
    np.testing.assert_array_equal(stack.dequantize("up", 1), dense[1][1].astype(np.float16))
    with pytest.raises(mo.ShapeError):
        mo.ExpertStack.from_encoded(roles[0], roles[1], (roles[2][0][:, :5], "F16", (5, 24, 40)))


def test_progress(small):
    seen = []
    mo.ExpertStack.open_and_load(small.path, 0, progress=seen.append)
    assert seen and seen[-1].done_bytes == seen[-1].total_bytes > 0 and seen[-1].what
    for before, after in itertools.pairwise(seen):
        # Reading and repacking are two passes over the same bytes.
        assert after.done_bytes > before.done_bytes or before.done_bytes == before.total_bytes
    with pytest.raises(mo.OperationCancelled):
        mo.ExpertStack.open_and_load(small.path, 0, progress=lambda p: False)

    def fail(progress):
        raise KeyError("from the callback")

    with pytest.raises(KeyError, match="from the callback"):
        mo.ExpertStack.open_and_load(small.path, 0, progress=fail)

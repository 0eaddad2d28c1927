"""Values of other float types and strides than a call reads: the same results as for f32 copies."""

import logging

import ml_dtypes
import numpy as np
import pytest
from values import expert_weights

import moesaic as mo

TYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
RNG = np.random.default_rng(5)
T, E, K, H = 6, 8, 2, 32
X = RNG.standard_normal((T, H), dtype=np.float32)
LOGITS = RNG.standard_normal((T, E), dtype=np.float32)
IDS = np.argsort(-LOGITS, axis=1)[:, :K]
WEIGHTS = RNG.random((T, K), dtype=np.float32)
PAIRS = RNG.standard_normal((T * K, H), dtype=np.float32)
PLAN = mo.BucketPlan.build(mo.Routing(IDS, WEIGHTS), E)
ROUTING = mo.Routing(IDS, WEIGHTS)


@pytest.fixture(scope="module")
def stack():
    return mo.ExpertStack.from_dense_stacks(*expert_weights(E, H, 48, seed=3))


def calls(stack):
    """Name of each call that reads values as f32: the call and its values."""
    return {
        "route": (lambda v: mo.route(v, top_k=K).topk_weights, LOGITS),
        "Routing": (lambda v: mo.Routing(IDS, v).topk_weights, WEIGHTS),
        "moe_forward": (lambda v: mo.moe_forward(X, v, stack, top_k=K), LOGITS),
        "silu_mul": (lambda v: mo.silu_mul(v), PAIRS),
        "combine": (lambda v: mo.combine(v, PLAN, ROUTING), PAIRS),
        "weighted_sum": (lambda v: mo.weighted_sum(v, ROUTING), PAIRS),
    }


NAMES = list(calls(None))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_narrow_values_count_as_f32(stack, name, dtype):
    call, values = calls(stack)[name]
    narrow = values.astype(dtype)
    got = call(narrow)
    np.testing.assert_array_equal(got, call(narrow.astype(np.float32)))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(call(mo.asarray(narrow)), got)


def strided(values):
    """The same values: columns apart, rows reversed in memory, both."""
    wide = np.zeros((values.shape[0], 3 * values.shape[1]), values.dtype)
    wide[:, ::3] = values
    return {
        "columns": wide[:, ::3],
        "transposed": np.asfortranarray(values),
        "backwards": np.ascontiguousarray(values[:, ::-1])[:, ::-1],
        "rows": np.ascontiguousarray(values[::-1])[::-1],
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", strided(X))
def test_strides_do_not_matter(stack, name, how):
    call, values = calls(stack)[name]
    np.testing.assert_array_equal(call(strided(values)[how]), call(values))


@pytest.mark.parametrize("how", strided(X))
@pytest.mark.parametrize("dtype", [np.float32, *TYPES.values()], ids=["f32", *TYPES])
def test_x_keeps_its_type(stack, how, dtype):
    x = X.astype(dtype)
    for call in (
        lambda v: mo.moe_forward(v, LOGITS, stack, top_k=K),
        lambda v: mo.moe_forward_cpu(v, ROUTING, stack),
        lambda v: mo.gather_rows(v, PLAN),
        lambda v: stack.gemm_gate(v, PLAN),
    ):
        want = call(x)
        got = call(strided(x)[how])
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_other_types_are_refused(stack, name, dtype):
    call, values = calls(stack)[name]
    with pytest.raises(mo.DTypeError):
        call(values.astype(dtype))


def test_copies_are_logged(stack, caplog):
    with caplog.at_level(logging.DEBUG, "moesaic"):
        mo.moe_forward(X, LOGITS, stack, top_k=K)
        assert not caplog.records
        mo.moe_forward(X, LOGITS.astype(np.float16), stack, top_k=K)
        mo.moe_forward(np.asfortranarray(X), LOGITS, stack, top_k=K)
    assert [r.getMessage().split(",")[0] for r in caplog.records if "copied" in r.getMessage()] == [
        "moe_forward: copied router_logits f16[6",
        "moe_forward: copied x f32[6",
    ]

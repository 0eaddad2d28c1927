import numpy as np
import pytest
from values import normal

import moesaic as mo

EXAMPLE = np.array([[0, 1, 1, -1], [2, 0, 0, 2], [-1, -1, 3, 0]], np.float32)


def softmax_topk(logits, top_k, renormalize):
    """An independent formula: stable sort by descending probability."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(p, ids, 1)
    return ids, weights / weights.sum(1, keepdims=True) if renormalize else weights


@pytest.mark.parametrize(
    ("renormalize", "weights"),
    [
        (True, [[0.5, 0.5], [0.5, 0.5], [0.952574, 0.047426]]),
        (False, [[0.399486, 0.399486], [0.440399, 0.440399], [0.920456, 0.045827]]),
    ],
)
def test_worked_example(renormalize, weights):
    routing = mo.route(EXAMPLE, top_k=2, renormalize=renormalize)
    assert routing.topk_ids.dtype == np.int32 and routing.topk_weights.dtype == np.float32
    np.testing.assert_array_equal(routing.topk_ids, [[1, 2], [0, 3], [2, 3]])
    np.testing.assert_allclose(routing.topk_weights, weights, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (32, 128, 8), (8, 64, 4), (5, 2048, 32), (3, 5, 5)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax(shape, renormalize):
    tokens, experts, top_k = shape
    logits = normal(tokens, experts)
    ids, weights = softmax_topk(logits, top_k, renormalize)
    routing = mo.route(logits, top_k=top_k, renormalize=renormalize)
    np.testing.assert_array_equal(routing.topk_ids, ids)
    np.testing.assert_allclose(routing.topk_weights, weights, atol=1e-6)


def test_default_renormalizes():
    np.testing.assert_array_equal(
        mo.route(EXAMPLE, top_k=2).topk_weights,
        mo.route(EXAMPLE, top_k=2, renormalize=True).topk_weights,
    )


def test_router_config():
    config = mo.RouterConfig(4, 2, score="sigmoid", renormalize=False, scale=2.5)
    routing = mo.route(EXAMPLE, config)
    want = 2.5 / (1 + np.exp(-np.take_along_axis(EXAMPLE, routing.topk_ids, 1)))
    np.testing.assert_allclose(routing.topk_weights, want, rtol=1e-6)
    np.testing.assert_array_equal(routing.topk_ids, [[1, 2], [0, 3], [2, 3]])
    with pytest.raises(mo.ConfigError, match="router"):
        mo.route(EXAMPLE, config, top_k=2)


def test_selection_bias_is_not_in_the_weights():
    config = mo.RouterConfig(4, 1, score="sigmoid", renormalize=False, selection_bias=[0, 0, 0, 9])
    routing = mo.route(EXAMPLE, config)
    np.testing.assert_array_equal(routing.topk_ids, [[3]] * 3)
    np.testing.assert_allclose(
        routing.topk_weights[:, 0], 1 / (1 + np.exp(-EXAMPLE[:, 3])), rtol=1e-6
    )


def test_nonfinite():
    nan, inf = np.nan, np.inf
    logits = np.array(
        [[nan, 1, 2, 3], [inf, 0, 0, 0], [-inf, nan, 5, 1], [nan] * 4, [-inf] * 4], np.float32
    )
    routing = mo.route(logits, top_k=2)
    ids, weights = routing.topk_ids, routing.topk_weights
    np.testing.assert_array_equal(ids, [[3, 2], [0, 1], [2, 3], [0, 1], [0, 1]])
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights[3:], 0.5)
    with mo.profile() as p:
        mo.route(logits, top_k=2)
    assert p.counters["nonfinite_rows"] == 5
    with mo.tuning(strict=True), pytest.raises(mo.Error, match="finite"):
        mo.route(logits, top_k=2)


def test_out_is_reused():
    routing = mo.route(EXAMPLE, top_k=2)
    address = routing.topk_ids.ctypes.data
    assert mo.route(EXAMPLE[::-1].copy(), top_k=2, out=routing) is routing
    assert routing.topk_ids.ctypes.data == address
    np.testing.assert_array_equal(routing.topk_ids, [[2, 3], [0, 3], [1, 2]])


def test_arrays_of_a_reused_routing_keep_their_values():
    routing = mo.route(EXAMPLE, top_k=2)
    before = routing.topk_ids
    kept = before.copy()
    mo.route(EXAMPLE[::-1].copy(), top_k=2, out=routing)
    np.testing.assert_array_equal(routing.topk_ids, [[2, 3], [0, 3], [1, 2]])
    np.testing.assert_array_equal(before, kept)
    mo.route(np.zeros((5000, 4), np.float32), top_k=2, out=routing)
    assert routing.num_tokens == 5000
    np.testing.assert_array_equal(before, kept)


def test_arrays_are_read_only():
    routing = mo.route(EXAMPLE, top_k=2)
    with pytest.raises(ValueError, match="read-only"):
        routing.topk_ids[0, 0] = 3


def test_no_tokens():
    routing = mo.route(np.zeros((0, 4), np.float32), top_k=2)
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, 2)


@pytest.mark.parametrize(
    ("logits", "arguments", "error"),
    [
        (EXAMPLE[0], {"top_k": 2}, mo.ShapeError),
        (EXAMPLE.astype(np.float64), {"top_k": 2}, mo.DTypeError),
        (EXAMPLE, {"top_k": 5}, mo.ConfigError),
        (EXAMPLE, {"top_k": 0}, mo.ConfigError),
        (EXAMPLE, {}, mo.ConfigError),
        (EXAMPLE, {"router": mo.RouterConfig(8, 2)}, mo.ShapeError),
    ],
)
def test_bad_arguments(logits, arguments, error):
    with pytest.raises(error):
        mo.route(logits, **arguments)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_another_skipped_id(stack, dtype):
    experts = stack.num_experts
    ids = np.array([[0, experts], [experts, 2], [experts, experts]], dtype)
    weights, x = np.ones((3, 2), np.float32), normal(3, stack.hidden_size)
    routing = mo.Routing(ids, weights, skipped=experts)
    np.testing.assert_array_equal(routing.topk_ids, np.where(ids == experts, -1, ids))
    want = mo.moe_forward(x, None, stack, routing=mo.Routing(routing.topk_ids, weights))
    np.testing.assert_array_equal(mo.moe_forward(x, None, stack, routing=routing), want)
    np.testing.assert_array_equal(want[2], 0)
    # It stays an error where nobody asked, as does any other id out of range.
    for bad in (mo.Routing(ids, weights), mo.Routing(ids + dtype(1), weights, skipped=experts)):
        with pytest.raises(mo.ShapeError, match=rf"-1 \(skipped\) or 0 to {experts - 1}"):
            mo.moe_forward(x, None, stack, routing=bad)
    assert ids.max() == experts  # a copy was changed
    with pytest.raises(TypeError):
        mo.Routing(ids, weights, experts)


def test_routing_from_arrays():
    ids = np.array([[3, -1], [0, 1]])
    routing = mo.Routing(ids, np.ones((4, 2), np.float32)[::2])
    np.testing.assert_array_equal(routing.topk_ids, ids)
    assert (routing.num_tokens, routing.top_k) == (2, 2)
    ids[:] = 0
    assert routing.topk_ids[0, 0] == 3
    with pytest.raises(mo.ShapeError, match="topk_weights"):
        mo.Routing(ids, np.ones((2, 3), np.float32))
    with pytest.raises(mo.DTypeError, match="topk_weights: expected f32, f16 or bf16, got f64"):
        mo.Routing(ids, np.ones((2, 2)))

"""Arrays with more dimensions than a call computes with: [B, S, H] in, the same out."""

import numpy as np
import pytest
from values import normal

import moesaic as mo

B, S, K = 2, 3, 2
T = B * S


@pytest.fixture(scope="module")
def x(small):
    return normal(B, S, small.hidden)


def flat(values):
    return values.reshape(T, *values.shape[2:])


def test_a_layer(layer, x):
    y, routing = layer(x, return_routing=True)
    assert y.shape == x.shape and routing.num_tokens == T
    want, flat_routing = layer(flat(x), return_routing=True)
    np.testing.assert_array_equal(flat(y), want)
    np.testing.assert_array_equal(routing.topk_ids, flat_routing.topk_ids)
    np.testing.assert_array_equal(layer(x, routing=routing), y)
    np.testing.assert_array_equal(layer(x[None]), y[None])


@pytest.mark.parametrize("deep", [False, True])
def test_logits_may_have_them_too(layer, small, x, deep):
    logits = normal(B, S, small.num_experts, seed=1)
    got = layer(x, logits if deep else flat(logits))
    np.testing.assert_array_equal(flat(got), layer(flat(x), flat(logits)))
    routing = mo.route(logits if deep else flat(logits), top_k=K)
    assert routing.num_tokens == T
    np.testing.assert_array_equal(
        routing.topk_weights, mo.route(flat(logits), top_k=K).topk_weights
    )


def test_the_free_forwards(layer, small, x):
    logits = normal(B, S, small.num_experts, seed=1)
    routing = mo.route(logits, top_k=K)
    stack = layer.stack
    for call in (
        lambda x, logits: mo.moe_forward(x, logits, stack, top_k=K),
        lambda x, _: mo.moe_forward_cpu(x, routing, stack),
        lambda x, _: mo.moe_forward_bucketed(x, None, stack, routing=routing),
    ):
        y = call(x, logits)
        assert y.shape == x.shape
        np.testing.assert_array_equal(flat(y), call(flat(x), flat(logits)))


def test_products(layer, small, x):
    stack = layer.stack
    routing = mo.route(normal(T, small.num_experts, seed=1), top_k=K)
    plan = mo.BucketPlan.build(routing, small.num_experts)
    ids = np.asarray(routing.topk_ids)
    deep = ids.reshape(B, S, K)
    np.testing.assert_array_equal(mo.gather_rows(x, plan), mo.gather_rows(flat(x), plan))
    np.testing.assert_array_equal(stack.gemm_up(x, plan), stack.gemm_up(flat(x), plan))
    up = stack.gemv_up(x, deep)
    assert up.shape == (B, S, K, small.intermediate)
    np.testing.assert_array_equal(flat(up), stack.gemv_up(flat(x), ids))
    out = np.full_like(up, np.nan)
    assert stack.gemv_up(x, deep, out=out) is out
    np.testing.assert_array_equal(out, up)
    down = stack.gemv_down(up, deep)
    assert down.shape == (B, S, K, small.hidden)
    np.testing.assert_array_equal(flat(down), stack.gemv_down(flat(up), ids))


def test_a_matrix(small, x):
    matrix = mo.QuantMatrix.from_dense(normal(48, small.hidden, seed=1), "Q8_0")
    y = matrix(x)
    assert y.shape == (B, S, 48)
    np.testing.assert_array_equal(flat(y), matrix(flat(x)))
    np.testing.assert_array_equal(matrix(far_apart(x)), y)
    with pytest.raises(mo.ShapeError, match=r"out: .*one distance"):
        matrix(x, out=far_apart(np.zeros_like(y)))


def far_apart(values):
    """The same values where no single stride walks the rows."""
    wide = np.zeros((B, S + 1, 2 * values.shape[2]), values.dtype)
    view = wide[:, :S, : values.shape[2]]
    view[:] = values
    return view


@pytest.mark.parametrize("how", ["apart", "transposed", "backwards"])
def test_strides_do_not_matter(layer, x, how):
    strided = {
        "apart": far_apart(x),
        "transposed": np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
        "backwards": np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    }[how]
    np.testing.assert_array_equal(strided, x)
    for given in (strided, mo.asarray(strided)):
        np.testing.assert_array_equal(np.asarray(layer(given)), layer(x))


def test_out(layer, x):
    out = np.full_like(x, np.nan)
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out, layer(x))
    assert layer(x, out=out, accumulate=True) is out
    np.testing.assert_allclose(out, 2 * layer(x), rtol=1e-5)
    every_other = np.full((B, S, 2 * x.shape[2]), np.nan, np.float32)[:, :, : x.shape[2]]
    np.testing.assert_array_equal(layer(x, out=every_other), layer(x))
    with pytest.raises(mo.ShapeError, match=r"out: expected \[2, 3, 256\]"):
        layer(x, out=flat(out))
    apart = far_apart(np.full_like(x, 7))
    with pytest.raises(mo.ShapeError, match=r"out: .*one distance"):
        layer(x, out=apart)
    np.testing.assert_array_equal(apart, 7)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens(layer, small, shape):
    y = layer(np.zeros((*shape, small.hidden), np.float32))
    assert y.shape == (*shape, small.hidden)


def test_router_input_and_token_ids(small):
    rng = np.random.default_rng(0)
    experts, hidden, vocabulary = 4, 32, 10
    stack = mo.ExpertStack.from_dense_stacks(
        *(rng.standard_normal((experts, hidden, hidden), np.float32) for _ in range(3))
    )
    x = rng.standard_normal((B, S, hidden), np.float32)
    weight = rng.standard_normal((experts, hidden), np.float32)
    config = mo.MoeConfig(hidden, hidden, experts, K, router_input="separate")
    other = rng.standard_normal((B, S, hidden), np.float32)
    with mo.MoeLayer(stack, config, weight) as layer:
        want = layer(flat(x), router_input=flat(other))
        np.testing.assert_array_equal(flat(layer(x, router_input=other)), want)
    router = mo.RouterConfig(experts, K, select_on="given")
    config = mo.MoeConfig(hidden, hidden, experts, K, router=router, vocab_size=vocabulary)
    table = np.arange(vocabulary * K, dtype=np.int32).reshape(vocabulary, K) % experts
    tokens = rng.integers(0, vocabulary, (B, S))
    with mo.MoeLayer(stack, config, weight, token_experts=table) as layer:
        want = layer(flat(x), token_ids=tokens.ravel())
        np.testing.assert_array_equal(flat(layer(x, token_ids=tokens)), want)
    config = mo.MoeConfig(hidden, hidden, experts, K, router=router)
    with mo.MoeLayer(stack, config, weight) as layer:
        ids = table[tokens]
        want = layer(flat(x), topk_ids=flat(ids))
        np.testing.assert_array_equal(flat(layer(x, topk_ids=ids)), want)


def test_torch_in_torch_out(layer, x):
    torch = pytest.importorskip("torch")
    y, routing = layer(torch.from_numpy(x), return_routing=True)
    assert isinstance(y, torch.Tensor) and y.shape == x.shape
    np.testing.assert_array_equal(y.numpy(), layer(x))
    for part in (routing.topk_ids, routing.topk_weights):
        assert isinstance(part, torch.Tensor) and part.shape == (T, routing.top_k)
    routing.topk_weights.zero_()  # a copy
    assert float(routing.topk_weights.sum()) > 0
    assert isinstance(mo.route(torch.zeros(3, 8), top_k=2).topk_ids, torch.Tensor)
    made = mo.Routing(routing.topk_ids, routing.topk_weights)
    assert torch.equal(made.topk_ids, routing.topk_ids)
    assert torch.equal(layer(torch.from_numpy(x), routing=made), y)


def test_jax_in_jax_out(layer, x):
    jax = pytest.importorskip("jax")
    y, routing = layer(jax.numpy.asarray(x), return_routing=True)
    assert isinstance(y, jax.Array) and y.shape == x.shape
    np.testing.assert_array_equal(np.asarray(y), layer(x))
    assert isinstance(routing.topk_ids, jax.Array) and isinstance(routing.topk_weights, jax.Array)
    assert isinstance(mo.route(jax.numpy.zeros((3, 8)), top_k=2).topk_ids, jax.Array)


def test_the_routing_has_the_kind_of_its_call(layer, x):
    _, routing = layer(mo.asarray(x), return_routing=True)
    _, want = layer(x, return_routing=True)
    ids = routing.topk_ids
    assert type(ids) is mo.Array and ids.readonly and type(want.topk_ids) is np.ndarray
    np.testing.assert_array_equal(np.asarray(ids), want.topk_ids)
    np.testing.assert_array_equal(np.asarray(mo.Routing(ids, want.topk_weights).topk_ids), ids)

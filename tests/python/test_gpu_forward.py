"""Forwards on a GPU beside f64: every format, size, routing and path."""

import numpy as np
import pytest
from gpu import (
    BOUNDS,
    DEVICE,
    DTYPES,
    K_TYPES,
    MARKS,
    SMALL_TYPES,
    TOKENS,
    check,
    error,
    expected,
    forward,
    inputs,
    make,
    make_int4,
    needs_gpu,
    on_host,
    routing_of,
    torch,
)

import moesaic as mo

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", K_TYPES + SMALL_TYPES)
def test_formats(quant, dtype):
    model = make(gate_up=quant, down=quant)
    for tokens in TOKENS if quant in ("Q4_K", "Q6_K", "MXFP4") else (1, 8, 33, 257):
        check(model, tokens, 2, dtype)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_int4(group, asymmetric, act_order):
    if group == -1 and act_order:
        pytest.skip("one group has no order")
    model = make_int4(8, 256, 384, group, asymmetric, act_order)
    for dtype in DTYPES:
        for tokens in (1, 9, 64, 257):
            check(model, tokens, 2, dtype)


@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [(2880, 2880), (2048, 704), (1856, 96), (96, 80 * 2), (32, 32), (4096, 1536)],
)
def test_sizes(hidden, intermediate):
    model = make(4, hidden, intermediate, "MXFP4", "Q8_0")
    for tokens in (1, 5, 65):
        check(model, tokens, 2)


@pytest.mark.parametrize(
    ("experts", "top_k"), [(1, 1), (8, 2), (60, 4), (128, 8), (256, 6), (512, 10), (4, 4)]
)
def test_experts(experts, top_k):
    model = make(experts, 64, 64, "Q8_0", "Q8_0")
    for tokens in (1, 16, 129):
        check(model, tokens, top_k)


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one", "empty", "skipped"])
def test_routings(routing):
    model = make(16)
    for tokens in (1, 33, 300):
        check(model, tokens, 4, routing=routing)


@pytest.mark.parametrize("gemm", ["bucketed", "aligned"])
@pytest.mark.parametrize("row_space", ["token_pairs", "packed_rows"])
@pytest.mark.parametrize("block_size", [8, 64])
def test_paths(gemm, row_space, block_size):
    model = make(16)
    for tokens in (1, 40, 513):
        x, ids, weights = inputs(model, tokens, 4, routing="skipped")
        with mo.tuning(block_size=block_size, poison=True):
            y = mo.moe_forward_bucketed(
                x,
                None,
                model.stack,
                routing=routing_of(ids, weights),
                gemm=gemm,
                row_space=row_space,
            )
        assert y.dtype == x.dtype
        assert error(y, expected(model, x, ids, weights)) <= BOUNDS["bf16"]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("experts", [8, 60, 128, 512, 4096])
def test_route(experts, renormalize):
    """The layer's own routing on the device against the host's."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((70, experts), dtype=np.float32)
    logits[0, :3] = 2.5  # ties go to the lower id
    logits[1, 1] = np.nan
    logits[2] = -np.inf
    logits[3, 5] = np.inf
    model = make(experts, 32, 32, "Q8_0", "Q8_0")
    x, _, _ = inputs(model, 70, 4)
    want = mo.route(logits, top_k=4, renormalize=renormalize)
    router = mo.RouterConfig(experts, 4, renormalize=renormalize)
    config = mo.MoeConfig(32, 32, experts, 4, router=router)
    layer = mo.MoeLayer(model.stack, config)
    y, routing = layer(x, torch.from_numpy(logits).to(DEVICE), return_routing=True)
    np.testing.assert_array_equal(on_host(routing.topk_ids), want.topk_ids)
    np.testing.assert_allclose(
        on_host(routing.topk_weights),
        want.topk_weights,
        rtol=1e-5,
        atol=1e-7,
    )
    assert error(y, expected(model, x, want.topk_ids, want.topk_weights)) <= BOUNDS["bf16"]


def test_whole_layer_with_shared_experts():
    rng = np.random.default_rng(5)
    model, shared = make(8), make(1, seed=9)
    router_weight = rng.standard_normal((8, 256), dtype=np.float32) * 0.1
    gate = rng.standard_normal(256, dtype=np.float32) * 0.1
    router = mo.RouterConfig(
        8, 2, score="sigmoid", selection_bias=list(rng.standard_normal(8) * 0.1)
    )
    config = mo.MoeConfig(
        256, 512, 8, 2, router=router, shared="sigmoid_gated", shared_intermediate_size=512
    )
    layer = mo.MoeLayer(model.stack, config, router_weight, shared=shared.stack, shared_gate=gate)
    x, _, _ = inputs(model, 50, 2, "f32")
    y, routing = layer(x, return_routing=True, precision="exact")
    ids = on_host(routing.topk_ids)
    weights = on_host(routing.topk_weights)
    want = mo.route(x.cpu().numpy() @ router_weight.T, router)
    assert (np.sort(ids, axis=1) == np.sort(want.topk_ids, axis=1)).mean() > 0.99
    share = torch.sigmoid(x.double() @ torch.from_numpy(gate).to(DEVICE).double())
    both = expected(model, x, ids, weights) + share[:, None] * expected(
        shared, x, np.zeros((50, 1), np.int32), np.ones((50, 1), np.float32)
    )
    assert error(y, both) <= BOUNDS["f32"]


def test_many_tokens():
    model = make(32, 512, 256)
    x, ids, weights = inputs(model, 8192, 8, routing="zipf")
    y = forward(model, x, ids, weights)
    some = np.arange(0, 8192, 37)
    rows = torch.from_numpy(some).to(DEVICE)
    assert error(y[rows], expected(model, x[rows], ids[some], weights[some])) <= BOUNDS["bf16"]


@needs_gpu
def test_ids_out_of_range_are_skipped_and_strict_says_so():
    model = make()
    x, ids, weights = inputs(model, 20, 2)
    ids[3, 1], ids[7, 0], ids[9] = 8, -1_000_000, 2**30
    assert (
        error(forward(model, x, ids, weights), expected(model, x, ids, weights)) <= BOUNDS["bf16"]
    )
    with mo.tuning(strict=True), pytest.raises(mo.ShapeError):
        forward(model, x, ids, weights)


def test_strided_rows_and_accumulate():
    model = make()
    x, ids, weights = inputs(model, 12, 2)
    wide = torch.zeros(12, 300, dtype=x.dtype, device=DEVICE)
    wide[:, :256] = x
    routing = routing_of(ids, weights)
    plain = mo.moe_forward(x, None, model.stack, routing=routing)
    assert torch.equal(mo.moe_forward(wide[:, :256], None, model.stack, routing=routing), plain)
    out = torch.ones(12, 256, dtype=torch.float32, device=DEVICE)
    mo.moe_forward(x, None, model.stack, routing=routing, out=out, accumulate=True)
    assert error(out - 1, expected(model, x, ids, weights)) <= BOUNDS["bf16"]


@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def test_runs_are_equal_to_the_bit(tokens):
    model = make(32)
    x, ids, weights = inputs(model, tokens, 4, routing="zipf")
    first = forward(model, x, ids, weights)
    with mo.tuning(poison=True):
        for _ in range(3):
            assert torch.equal(forward(model, x, ids, weights), first)

"""Correctness on a real GPU: ``pytest -m gpu``. Needs torch and a build with a CUDA plug-in.

Every result is compared with f64 products on the decoded weights, by torch on the same device.
``TEST_DEVICE=cpu`` runs what does not need a GPU on the CPU backend, to test this file itself.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import numpy as np
import pytest

import moesaic as mo

torch = pytest.importorskip("torch")

DEVICE = os.environ.get("TEST_DEVICE", "cuda:0")
ON_GPU = DEVICE != "cpu"


def _why_not() -> str:
    if not ON_GPU:
        return ""
    for backend in mo.backends():
        if backend.available and DEVICE in backend.devices:
            return "" if torch.cuda.is_available() else "torch sees no GPU"
    reasons = [b.reason for b in mo.backends() if b.name == DEVICE.split(":")[0]]
    return f"{DEVICE}: {'; '.join(reasons)}"


if reason := _why_not():
    pytest.skip(reason, allow_module_level=True)
pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="the CPU has no streams and graphs")

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
SMALL_TYPES = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "IQ4_NL",
    "MXFP4",
    "NVFP4",
    "F16",
    "BF16",
    "F32",
)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
#: |y - f64| / |f64|: 16-bit rounds x's type twice, exact f32 keeps 16 bits.
BOUNDS = {"f32": 1e-4, "f16": 5e-3, "bf16": 5e-3}
TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 127, 128, 257, 1024)


@pytest.fixture(autouse=True)
def _two_planes_on_the_cpu():
    """The CPU rounds activations to int8 planes where a GPU multiplies 16-bit ones exactly."""
    with contextlib.nullcontext() if ON_GPU else mo.tuning(precision="exact"):
        yield


@dataclass
class Model:
    """A stack on the device, and its weights as f64 tensors there."""

    stack: mo.ExpertStack
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    hidden: int


def _encoded(rng, quant, experts, rows, cols):
    values = rng.standard_normal((experts, rows, cols), dtype=np.float32) / np.float32(
        np.sqrt(cols)
    )
    data = mo.testing.quantize(values, quant)
    decoded = mo.testing.dequantize(data, quant, values.shape)
    return (data, quant, values.shape), torch.from_numpy(decoded).to(DEVICE, torch.float64)


def make(experts=8, hidden=256, intermediate=512, gate_up="Q4_K", down="Q6_K", seed=0) -> Model:
    rng = np.random.default_rng(seed)
    roles = [
        _encoded(rng, quant, experts, rows, cols)
        for quant, rows, cols in (
            (gate_up, intermediate, hidden),
            (gate_up, intermediate, hidden),
            (down, hidden, intermediate),
        )
    ]
    stack = mo.ExpertStack.from_encoded(*(r[0] for r in roles), device=DEVICE)
    return Model(stack, *(r[1] for r in roles), hidden)


def make_int4(experts, hidden, intermediate, group, asymmetric, act_order, seed=0) -> Model:
    rng = np.random.default_rng(seed)

    def role(k, n):
        size = k if group == -1 else group
        groups = k // size
        order = rng.permutation(np.arange(k) // size).astype(np.int32) if act_order else None
        of = order if order is not None else np.arange(k) // size
        codes = rng.integers(0, 16, (experts, k, n), dtype=np.uint32)
        zeros = (
            rng.integers(1, 16, (experts, groups, n))
            if asymmetric
            else np.full((experts, groups, n), 8)
        )
        scales = (rng.random((experts, groups, n)) * 0.02 + 0.01).astype(np.float16)
        nibbles = (
            codes.reshape(experts, k // 8, 8, n) << np.arange(0, 32, 4, dtype=np.uint32)[:, None]
        )
        qweight = np.bitwise_or.reduce(nibbles, axis=2).view(np.int32)
        stored = (zeros - 1).astype(np.uint32).reshape(experts, groups, n // 8, 8)
        qzeros = np.bitwise_or.reduce(stored << np.arange(0, 32, 4, dtype=np.uint32), axis=3).view(
            np.int32
        )
        values = (codes.astype(np.float64) - zeros[:, of]) * scales.astype(np.float64)[:, of]
        marlin = mo.MarlinExpertStack.from_gptq(
            qweight, scales, qzeros, g_idx=order, group_size=group
        )
        return marlin, torch.from_numpy(values.transpose(0, 2, 1).copy()).to(DEVICE)

    gate_up, both = role(hidden, 2 * intermediate)
    down, down_values = role(intermediate, hidden)
    stack = mo.ExpertStack.from_marlin(gate_up=gate_up, down=down, device=DEVICE)
    return Model(stack, both[:, :intermediate], both[:, intermediate:], down_values, hidden)


def inputs(model, tokens, top_k, dtype="bf16", routing="uniform", seed=1):
    """x on the device, host ids and weights."""
    rng = np.random.default_rng(seed + tokens)
    experts = model.gate.shape[0]
    x = torch.from_numpy(rng.standard_normal((tokens, model.hidden), dtype=np.float32))
    keys = rng.random((tokens, experts))
    if routing == "zipf":
        keys *= 1 + np.arange(experts)
    if routing == "one":
        keys[:, -1] = -1
    if routing == "empty":
        keys[:, experts // 2 :] += 2
    ids = np.argsort(keys, axis=1)[:, :top_k].astype(np.int32)
    if routing == "skipped":
        ids[rng.random(ids.shape) < 0.3] = -1
    weights = rng.random((tokens, top_k), dtype=np.float32) + 0.1
    return x.to(DEVICE, DTYPES[dtype]), ids, weights


def routing_of(ids, weights) -> mo.Routing:
    """On the device, as an engine would have it."""
    if not ON_GPU:
        return mo.Routing(ids, weights)
    return mo.Routing(torch.from_numpy(ids).to(DEVICE), torch.from_numpy(weights).to(DEVICE))


def expected(model, x, ids, weights) -> torch.Tensor:
    """The definition in f64; ids outside the experts are skipped."""
    x = x.double()
    y = torch.zeros_like(x)
    for e in range(model.gate.shape[0]):
        token, slot = np.nonzero(ids == e)
        if len(token) == 0:
            continue
        rows = torch.from_numpy(token).to(DEVICE)
        g, u = x[rows] @ model.gate[e].T, x[rows] @ model.up[e].T
        out = (torch.nn.functional.silu(g) * u) @ model.down[e].T
        y.index_add_(
            0, rows, out * torch.from_numpy(weights[token, slot]).to(DEVICE).double()[:, None]
        )
    return y


def error(y, want) -> float:
    difference = float(
        torch.linalg.norm(y.double() - want) / torch.linalg.norm(want).clamp(min=1e-30)
    )
    return float("inf") if np.isnan(difference) else difference


def on_host(array) -> np.ndarray:
    return array.cpu().numpy() if hasattr(array, "cpu") else array


def forward(model, x, ids, weights, **arguments):
    out = torch.full_like(x, float("nan"))
    precision = "exact" if x.dtype == torch.float32 else None
    return mo.moe_forward(
        x,
        None,
        model.stack,
        routing=routing_of(ids, weights),
        out=out,
        precision=precision,
        **arguments,
    )


def check(model, tokens, top_k, dtype="bf16", routing="uniform", **arguments):
    x, ids, weights = inputs(model, tokens, top_k, dtype, routing)
    y = forward(model, x, ids, weights, **arguments)
    found = error(y, expected(model, x, ids, weights))
    assert found <= BOUNDS[dtype], f"{tokens} tokens: {found:.2e}"


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


def make_marlin(experts, k, n, group=64):
    """GPTQ experts with zero points and group orders of their own: host stack, f64 [E, N, K]."""
    rng = np.random.default_rng(k + n)
    codes = rng.integers(0, 2**32, (experts, k // 8, n), dtype=np.uint32).view(np.int32)
    zeros = rng.integers(0, 2**32, (experts, k // group, n // 8), dtype=np.uint32).view(np.int32)
    scales = (rng.random((experts, k // group, n)) * 0.02 + 0.01).astype(np.float16)
    order = np.stack([rng.permutation(np.arange(k) // group) for _ in range(experts)])
    host = mo.MarlinExpertStack.from_gptq(
        codes, scales, zeros, g_idx=order.astype(np.int32), group_size=group
    )
    values = np.stack([host.dequantize(e) for e in range(experts)])
    return host, torch.from_numpy(values).to(DEVICE, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 65, 300])
def test_marlin_phases(tokens, dtype):
    host, weights = make_marlin(6, 256, 320)
    stack = host.to(DEVICE)
    x, ids, _ = inputs(make(6, 256, 64, "Q8_0", "Q8_0"), tokens, 2, dtype, "skipped")
    routing = mo.Routing(ids, np.ones(ids.shape, np.float32))
    flat = torch.from_numpy(ids.reshape(-1)).to(DEVICE).long()
    pairs = torch.zeros(2 * tokens, 320, dtype=torch.float64, device=DEVICE)
    for e in range(6):
        rows = torch.nonzero(flat == e)[:, 0]
        pairs[rows] = x.double()[rows // 2] @ weights[e].T
    for block in (8, 16, 64):
        aligned = mo.align_block_size(routing, 6, block)
        out = torch.full((2 * tokens, 320), float("nan"), device=DEVICE)
        stack.gemm_phase_vllm(x, aligned, 2, out=out, precision="exact")
        assert error(out, pairs) <= 1e-4
        assert (out[flat < 0] == 0).all()

    dispatches = [(e, e % tokens, 300 * e, tokens - e % tokens) for e in (5, 0, 2)]
    out = torch.full((1800, 320), 7.0, device=DEVICE)
    want = out.double()
    stack.gemm_phase_batched(x, dispatches, out=out, precision="exact")
    for e, first, to, rows in dispatches:
        want[to : to + rows] = x[first : first + rows].double() @ weights[e].T
    assert error(out, want) <= 1e-4
    bias = np.linspace(-1, 1, 256, dtype=np.float32)
    linear = stack.make_expert_linear(3, 64, bias=bias)
    want = x.double() @ weights[3, 64:].T + torch.from_numpy(bias).to(DEVICE)
    assert error(linear(x, precision="exact"), want) <= 1e-4


@pytest.mark.parametrize("tokens", [1, 40, 257])
def test_operations_over_a_host_plan(tokens):
    model = make(16, down="Q5_K")
    x, ids, weights = inputs(model, tokens, 4, "f32", "skipped")
    host, there = mo.Routing(ids, weights), routing_of(ids, weights)
    plan = mo.BucketPlan.build(host, 16)
    rows = mo.gather_rows(x, plan)
    gathered = torch.zeros_like(rows)
    gathered[: plan.num_rows] = x[torch.from_numpy(plan.row_token[: plan.num_rows].copy()).long()]
    assert torch.equal(rows, gathered)
    gate, up = (product(x, plan, precision="exact") for product in
                (model.stack.gemm_gate, model.stack.gemm_up))  # fmt: skip
    hidden = mo.silu_mul(torch.cat([gate, up], 1))
    pairs = model.stack.gemm_down(hidden, plan, precision="exact")
    want = expected(model, x, ids, weights)
    packed = torch.zeros_like(pairs)
    row_pair = torch.from_numpy(plan.row_pair[: plan.num_rows].copy()).long()
    packed[: plan.num_rows] = pairs[row_pair]
    for routing in (host, there):
        assert error(mo.weighted_sum(pairs, routing), want) <= BOUNDS["f32"]
        assert error(mo.combine(packed, plan, routing), want) <= BOUNDS["f32"]


@needs_gpu
def test_what_brings_host_arrays_cannot_be_captured():
    model, (host, _) = make(), make_marlin(8, 256, 64)
    marlin = host.to(DEVICE)
    x, ids, weights = inputs(model, 4, 2, "f32")
    routing, there = mo.Routing(ids, weights), routing_of(ids, weights)
    plan, aligned = mo.BucketPlan.build(routing, 8), mo.align_block_size(routing, 8, 16)
    pairs = torch.randn(8, 256, device=DEVICE)
    linear = marlin.make_expert_linear(0)
    calls = [
        lambda: mo.gather_rows(x, plan),
        lambda: mo.combine(pairs, plan, there),
        lambda: mo.weighted_sum(pairs, routing),
        lambda: model.stack.gemm_up(x, plan),
        lambda: marlin.gemm_phase_batched(x, [(0, 0, 0, 4)]),
        lambda: marlin.gemm_phase_vllm(x, aligned, 2),
        lambda: linear(x),
    ]
    for call in calls:
        want = call()
        with pytest.raises(mo.CaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
        torch.cuda.synchronize()
        assert torch.equal(call(), want)  # still usable

    out = torch.empty(4, 256, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mo.weighted_sum(pairs, there, out=out)
    pairs.normal_()
    graph.replay()
    assert torch.equal(out, mo.weighted_sum(pairs, there))


PARTS = ("norms", "latent", "identity", "input_weights", "table", "given")


def layers_with(kind, tokens):
    """The same layer on the host and on the device, and what its calls bring besides x."""
    rng = np.random.default_rng(6)
    hidden, intermediate, experts, top_k, latent = 256, 320, 8, 3, 128

    def normal(*shape, scale=1.0):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    facts, arrays, call = {}, {}, {}
    router = mo.RouterConfig(experts, top_k)
    if kind == "norms":
        facts = {"input_norm": True, "router_input": "norm", "norm_eps": 1e-3}
        arrays = {n: 1 + normal(hidden, scale=0.2) for n in ("input_norm", "router_norm")}
    if kind == "latent":
        facts = {"latent_size": latent, "latent_norm": True}
        arrays = {
            "latent": (normal(latent, hidden, scale=0.06), normal(hidden, latent, scale=0.09)),
            "latent_norm": 1 + normal(latent, scale=0.2),
        }
    if kind == "identity":
        router = mo.RouterConfig(experts + 4, top_k, identity_experts=4)
    if kind == "input_weights":
        router = mo.RouterConfig(
            experts, top_k, score="sigmoid", renormalize=False, weight_on="input"
        )
    if kind in ("table", "given"):
        router = mo.RouterConfig(experts, top_k, score="sigmoid", select_on="given")
        table = np.stack([rng.permutation(experts)[:top_k] for _ in range(99)]).astype(np.int32)
        token_ids = rng.integers(0, 99, tokens).astype(np.int32)
        if kind == "table":
            facts, arrays = {"vocab_size": 99}, {"token_experts": table}
            call = {"token_ids": token_ids}
        else:
            call = {"topk_ids": table[token_ids]}
    width = latent if kind == "latent" else hidden
    shapes = [(experts, intermediate, width)] * 2 + [(experts, width, intermediate)]
    weights = [normal(*s, scale=s[2] ** -0.5) for s in shapes]
    router_weight = normal(router.num_experts, hidden, scale=0.1)
    config = mo.MoeConfig(hidden, intermediate, experts, top_k, router=router, **facts)
    layers = [
        mo.MoeLayer(
            mo.ExpertStack.from_dense_stacks(*weights, device=device),
            config,
            router_weight,
            **arrays,
        )
        for device in ("cpu", DEVICE)
    ]
    return *layers, call


def on_device(call):
    return {name: torch.from_numpy(ids).to(DEVICE) for name, ids in call.items()}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_parts(kind, tokens):
    host, layer, call = layers_with(kind, tokens)
    x = torch.from_numpy(np.random.default_rng(tokens).standard_normal((tokens, 256), np.float32))
    y, routing = layer(x.to(DEVICE), return_routing=True, precision="exact", **on_device(call))
    # The device's own routing, as two experts can be as good as the same.
    chosen = mo.Routing(on_host(routing.topk_ids), on_host(routing.topk_weights))
    want = mo.moe_forward_cpu(x.numpy(), chosen, host)
    assert error(y, torch.from_numpy(want).to(DEVICE).double()) <= BOUNDS["f32"]
    mine = host(x.numpy(), return_routing=True, **call)[1]
    assert (chosen.topk_ids == mine.topk_ids).mean() > 0.99
    y = layer(x.to(DEVICE, torch.bfloat16), routing=routing)
    want = mo.moe_forward_cpu(x.bfloat16().float().numpy(), chosen, host)
    assert error(y, torch.from_numpy(want).to(DEVICE).double()) <= BOUNDS["bf16"]


@needs_gpu
@pytest.mark.parametrize("kind", PARTS)
def test_parts_are_captured_without_a_call_before(kind):
    _, layer, call = layers_with(kind, 7)
    x = torch.randn(7, 256, device=DEVICE)
    out = torch.empty_like(x)
    workspace = mo.Workspace.for_layer(layer, 7)
    arguments = {"out": out, "workspace": workspace} | on_device(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, **arguments)
    for _ in range(5):
        x.normal_()
        layer(x, **arguments)
        eager = out.clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)


def test_profile_waits_for_the_device():
    model = make()
    x, ids, weights = inputs(model, 20, 2)
    with mo.profile("sync") as p:
        forward(model, x, ids, weights)
    assert {"sync", "gate_up", "down"} <= set(p.zones)


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


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
def test_graph_replays_follow_new_inputs(tokens):
    model = make(32)
    x, _, _ = inputs(model, tokens, 4)
    logits = torch.randn(tokens, 32, device=DEVICE)
    out = torch.empty_like(x)
    workspace = mo.Workspace.for_stack(model.stack, 4, tokens)

    def call():
        return mo.moe_forward(x, logits, model.stack, top_k=4, out=out, workspace=workspace)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for i in range(100):
        x.normal_()
        logits.normal_()
        if i % 10 == 0:
            logits[:, : 1 + i // 10] += 100  # few experts get everything
        call()
        eager = out.clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager), i


@needs_gpu
def test_captures_need_a_workspace():
    model = make()
    x, ids, weights = inputs(model, 4, 2)
    routing = routing_of(ids, weights)
    mo.moe_forward(x, None, model.stack, routing=routing)
    with (
        pytest.raises(mo.CaptureError, match="workspace"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        mo.moe_forward(x, None, model.stack, routing=routing)
    torch.cuda.synchronize()
    check(model, 4, 2)  # still usable


@needs_gpu
def test_streams():
    model = make()
    x, ids, weights = inputs(model, 64, 2)
    want = forward(model, x, ids, weights)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = x * 1.0  # made on the side stream
        y = forward(model, late, ids, weights)
    side.synchronize()
    assert torch.equal(y, want)
    out = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    mo.moe_forward(x, None, model.stack, routing=routing_of(ids, weights), out=out, stream=side)
    side.synchronize()
    assert torch.equal(out, want)


@needs_gpu
def test_results_and_refusals():
    model = make()
    x, ids, weights = inputs(model, 4, 2)
    y = mo.moe_forward(x, None, model.stack, routing=mo.Routing(ids, weights))  # a host routing
    assert y.device == x.device and y.dtype == x.dtype and y.shape == x.shape
    routing = routing_of(ids, weights)
    with pytest.raises(mo.DeviceError, match="cuda:0"):
        mo.moe_forward(x.cpu(), None, model.stack, routing=routing)
    with pytest.raises(mo.DeviceError):
        mo.moe_forward(x.float().cpu().numpy(), None, model.stack, routing=routing)
    with pytest.raises(mo.DeviceError):
        mo.moe_forward(x, None, model.stack, routing=routing, out=torch.empty_like(x, device="cpu"))
    with pytest.raises(mo.WorkspaceError):
        mo.moe_forward(x, None, model.stack, routing=routing, workspace=mo.Workspace(1 << 24))
    with pytest.raises(mo.DTypeError):
        mo.moe_forward(x, None, model.stack, routing=routing, stream="main")
    assert torch.equal(mo.moe_forward(x, None, model.stack, routing=routing), y)


@needs_gpu
def test_memory_comes_back():
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        model = make(64, 1024, 1024)
        del model
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20

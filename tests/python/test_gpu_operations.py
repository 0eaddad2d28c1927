"""Products and operations on a GPU that take plans and dispatches from the host."""

import numpy as np
import pytest
from gpu import (
    BOUNDS,
    DEVICE,
    DTYPES,
    MARKS,
    error,
    expected,
    inputs,
    make,
    make_marlin,
    routing_of,
    torch,
)

import moesaic as mo

pytestmark = MARKS


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

"""Graphs and streams: what can be captured replays to the bit, what cannot says so."""

import subprocess
import sys

import pytest
from gpu import (
    DEVICE,
    MARKS,
    check,
    forward,
    inputs,
    make,
    make_marlin,
    needs_gpu,
    routing_of,
    torch,
)
from recordings import refusal

import moesaic as mo

pytestmark = MARKS

FIRST_CALL = """
import numpy as np, torch, moesaic as mo
rng = np.random.default_rng(0)
weights = [rng.standard_normal(s, np.float32) * 0.1
           for s in ((8, 512, 256), (8, 512, 256), (8, 256, 512))]
stack = mo.ExpertStack.from_dense_stacks(*weights, device="{device}")
workspace = mo.Workspace.for_stack(stack, 2, {tokens})
x = torch.randn({tokens}, 256, device="{device}").bfloat16()
logits = torch.randn({tokens}, 8, device="{device}")
out = torch.full_like(x, float("nan"))
call = lambda: mo.moe_forward(x, logits, stack, top_k=2, out=out, workspace=workspace)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    call()
graph.replay()
recorded = out.clone()
call()
assert torch.equal(recorded, out) and bool(out.isfinite().all())
"""


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 4, 512])
def test_a_graph_may_record_the_first_call_of_a_process(tokens):
    """Kernels are loaded at their first launch, unless they were before: a recording cannot."""
    script = FIRST_CALL.format(device=DEVICE, tokens=tokens)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


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
        refusal(call, torch.cuda.graph(torch.cuda.CUDAGraph()))
        torch.cuda.synchronize()
        assert torch.equal(call(), want)  # still usable

    out = torch.empty(4, 256, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mo.weighted_sum(pairs, there, out=out)
    pairs.normal_()
    graph.replay()
    assert torch.equal(out, mo.weighted_sum(pairs, there))


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
    refused = refusal(
        lambda: mo.moe_forward(x, None, model.stack, routing=routing),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    )
    assert "workspace" in str(refused)
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

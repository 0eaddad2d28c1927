"""Every path and row space against the reference, and the reference against f64."""

import numpy as np
import pytest
from files import write_small
from oracle import moe_f64, rel_l2
from values import normal, poisoned

import moesaic as mo

PATHS = {
    "gemv": ({"gemm": "auto"}, None),
    "any": ({}, None),
    "bucketed": ({}, {"gemm": "bucketed"}),
    "aligned_pairs": ({}, {"gemm": "aligned", "row_space": "token_pairs"}),
    "aligned_packed": ({}, {"gemm": "aligned", "row_space": "packed_rows"}),
    "tuned_packed": ({"gemm": "aligned", "row_space": "packed_rows", "block_size": 8}, None),
    "poisoned": ({"poison": True}, None),
}


def run(path, x, logits, stack, **arguments):
    """One path; out is poisoned. "gemv" goes one token at a time."""
    knobs, bucketed = PATHS[path]
    out = poisoned(*x.shape)
    with mo.tuning(**knobs):
        if path == "gemv":
            routing = arguments.pop("routing", None)
            for t in range(len(x)):
                one = slice(t, t + 1)
                if routing is not None:
                    arguments["routing"] = mo.Routing(
                        routing.topk_ids[one], routing.topk_weights[one]
                    )
                row = logits[one] if logits is not None else None
                mo.moe_forward(x[one], row, stack, out=out[one], **arguments)
        elif bucketed is None:
            mo.moe_forward(x, logits, stack, out=out, **arguments)
        else:
            mo.moe_forward_bucketed(x, logits, stack, out=out, **bucketed, **arguments)
    return out


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """H != I, E = 5, top_k = 3, I not a multiple of 256."""
    return write_small(
        tmp_path_factory.mktemp("odd") / "odd.gguf",
        num_experts=5, top_k=3, hidden=256, intermediate=96, gate_type="Q4_K", down_type="Q8_0",
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 40])
def test_paths(odd, path, tokens):
    stack = mo.ExpertStack.open_and_load(odd.path, 0)
    x, logits = normal(tokens, odd.hidden), normal(tokens, 5, seed=1)
    routing = mo.route(logits, top_k=3)
    w = odd.weights[0]
    want = moe_f64(x, routing.topk_ids, routing.topk_weights, w.gate, w.up, w.down)
    reference = mo.moe_forward_cpu(x, routing, stack)
    got = run(path, x, logits, stack, top_k=3)
    given = run(path, x, None, stack, routing=routing)
    assert got.shape == want.shape == reference.shape
    if tokens:
        assert rel_l2(reference, want) < 1e-5
        assert rel_l2(got, want) < (2e-3 if path == "gemv" or tokens == 1 else 2e-2)
    np.testing.assert_array_equal(given, got)


@pytest.mark.parametrize("path", PATHS)
def test_f32_weights_are_exact_on_every_path(stack, dense, path):
    x, logits = normal(9, 24), normal(9, 5, seed=1)
    routing = mo.route(logits, top_k=2, renormalize=False)
    want = moe_f64(x, routing.topk_ids, routing.topk_weights, *dense)
    assert rel_l2(run(path, x, logits, stack, top_k=2, renormalize=False), want) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_skipped_pairs(stack, dense, path):
    x = normal(4, 24)
    ids = np.array([[0, -1], [-1, -1], [3, 3], [-1, 2]])
    routing = mo.Routing(ids, np.abs(normal(4, 2, seed=1)))
    want = moe_f64(x, ids, routing.topk_weights, *dense)
    got = run(path, x, None, stack, routing=routing)
    assert rel_l2(got, want) < 1e-5
    np.testing.assert_array_equal(got[1], 0)


@pytest.mark.parametrize("path", PATHS)
def test_all_to_one_expert(stack, dense, path):
    x = normal(70, 24)
    routing = mo.Routing(np.full((70, 1), 4), np.ones((70, 1), np.float32))
    want = moe_f64(x, routing.topk_ids, routing.topk_weights, *dense)
    assert rel_l2(run(path, x, None, stack, routing=routing), want) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_nan_logits_route_somewhere(stack, path):
    x = np.ones((2, 24), np.float32)
    logits = np.array([[np.nan] * 5, [0, np.nan, 2, 1, -np.inf]], np.float32)
    routing = mo.route(logits, top_k=2)
    want = mo.moe_forward_cpu(x, routing, stack)
    got = run(path, x, logits, stack, top_k=2)
    assert np.isfinite(got).all() and rel_l2(got, want) < 1e-5
    with mo.tuning(strict=True), pytest.raises(mo.Error):
        mo.moe_forward(x, logits, stack, top_k=2)


def test_permuting_tokens_permutes_outputs(odd):
    stack = mo.ExpertStack.open_and_load(odd.path, 0)
    x, logits = normal(33, odd.hidden), normal(33, 5, seed=1)
    order = np.random.default_rng(0).permutation(33)
    y = mo.moe_forward(x, logits, stack, top_k=3)
    assert rel_l2(mo.moe_forward(x[order], logits[order], stack, top_k=3), y[order]) < 1e-6


def test_batch_invariant(odd):
    stack = mo.ExpertStack.open_and_load(odd.path, 0)
    x, logits = normal(33, odd.hidden), normal(33, 5, seed=1)
    with mo.tuning(batch_invariant=True):
        y = mo.moe_forward(x, logits, stack, top_k=3)
        for part in (slice(0, 1), slice(5, 20), slice(20, 33)):
            got = mo.moe_forward(x[part], logits[part], stack, top_k=3)
            np.testing.assert_array_equal(got, y[part])


def test_activation(stack, dense):
    gate, up, down = dense
    x = normal(2, 24)
    routing = mo.Routing(np.array([[1], [4]]), np.ones((2, 1), np.float32))
    for kind in ("reglu", mo.Activation("reglu")):
        got = mo.moe_forward(x, None, stack, routing=routing, activation=kind)
        for t, e in enumerate((1, 4)):
            want = down[e] @ (np.maximum(gate[e] @ x[t], 0) * (up[e] @ x[t]))
            assert rel_l2(got[t], want) < 1e-5


def test_operations_compose_to_the_forward(stack):
    x = normal(6, 24)
    routing = mo.route(normal(6, 5, seed=1), top_k=2)
    plan = mo.BucketPlan.build(routing, 5)
    want = mo.moe_forward_cpu(x, routing, stack)
    np.testing.assert_array_equal(mo.gather_rows(x, plan), x[plan.row_token])
    gate_up = np.concatenate([stack.gemm_gate(x, plan), stack.gemm_up(x, plan)], axis=1)
    pairs = stack.gemm_down(mo.silu_mul(gate_up), plan)
    assert rel_l2(mo.weighted_sum(pairs.reshape(6, 2, 24), routing), want) < 1e-5
    packed = pairs[plan.row_pair]
    out = poisoned(6, 24)
    assert mo.combine(packed, plan, routing, out=out) is out
    assert rel_l2(out, want) < 1e-5
    mo.combine(packed, plan, routing, out=out, accumulate=True)
    assert rel_l2(out, 2 * want) < 1e-5


def test_workspace_for_stack(odd):
    stack = mo.ExpertStack.open_and_load(odd.path, 0)
    x = np.ones((16, odd.hidden), np.float32)
    logits = np.zeros((16, 5), np.float32)
    workspace = mo.Workspace.for_stack(stack, 3, 16)
    want = mo.moe_forward(x, logits, stack, top_k=3)
    for tokens in (1, 16):
        got = mo.moe_forward(x[:tokens], logits[:tokens], stack, top_k=3, workspace=workspace)
        assert rel_l2(got, want[:tokens]) < 2e-2
    for gemm in ("bucketed", "aligned"):
        mo.moe_forward_bucketed(x, logits, stack, top_k=3, workspace=workspace, gemm=gemm)

"""Layers of INT4 group experts, on every path."""

import numpy as np
import pytest
from int4 import Checkpoint, layer_f64
from oracle import rel_l2
from values import normal, random_routing

import moesaic as mo


@pytest.mark.parametrize("order", [None, "shared", "per_expert", "random"])
@pytest.mark.parametrize("inter", [32, 24])
def test_layer(order, inter):
    H, E, T, k = 64, 6, 11, 3
    gate_up = Checkpoint(E, H, 2 * inter, 32, order=order, seed=1)
    down = Checkpoint(E, inter, H, -1, seed=2)
    m1, m2 = gate_up.stack(), down.stack()
    stack = mo.ExpertStack.from_marlin(gate_up=m1, down=m2)
    assert stack.kind == "marlin"
    assert stack.marlin("gate_up") is m1
    assert stack.marlin("up") is m1
    assert stack.marlin("down") is m2
    assert stack.quants == {"gate": "INT4", "up": "INT4", "down": "INT4"}
    x, routing = normal(T, H), random_routing(T, E, k, skipped=(2,))
    want = layer_f64(gate_up, down, routing, x)
    assert rel_l2(mo.moe_forward_cpu(x, routing, stack), want) < 1e-5
    logits = normal(T, E, seed=3)
    reference = mo.moe_forward_cpu(x, mo.route(logits, top_k=k), stack)
    for precision, bound in (("exact", 1e-4), ("fast", 2e-2)):
        y = mo.moe_forward(x, logits, stack, top_k=k, precision=precision)
        assert rel_l2(y, reference) < bound
        for gemm in ("bucketed", "aligned"):
            for row_space in ("token_pairs", "packed_rows"):
                for block in (None, 8, 48):
                    with mo.tuning(block_size=block):
                        again = mo.moe_forward_bucketed(
                            x,
                            logits,
                            stack,
                            top_k=k,
                            gemm=gemm,
                            row_space=row_space,
                            precision=precision,
                        )
                    np.testing.assert_array_equal(again, y)


def test_model_shape():
    """Qwen3-30B-A3B: 128 experts of which every fourth is the same."""
    H, inter, E, distinct = 2048, 768, 128, 4
    which = np.arange(E) % distinct
    halves = [
        Checkpoint(distinct, H, 2 * inter, 128, order="per_expert", seed=1),
        Checkpoint(distinct, inter, H, 128, seed=2),
    ]
    stacks = [
        mo.MarlinExpertStack.from_gptq(
            c.qweight[which],
            c.scales[which],
            c.qzeros[which],
            None if c.g_idx is None else c.g_idx[which],
            128,
        )
        for c in halves
    ]
    stack = mo.ExpertStack.from_marlin(*stacks)
    for T in (1, 6):
        x, routing = normal(T, H), random_routing(T, E, 8)
        same = mo.Routing(routing.topk_ids % distinct, routing.topk_weights)
        want = layer_f64(*halves, same, x)
        first = mo.moe_forward(x, None, stack, routing=routing, precision="exact")
        assert rel_l2(first, want) < 1e-4
        for gemm in ("bucketed", "aligned"):
            again = mo.moe_forward_bucketed(
                x, None, stack, routing=routing, gemm=gemm, precision="exact"
            )
            np.testing.assert_array_equal(again, first)
        assert rel_l2(mo.moe_forward(x, None, stack, routing=routing), want) < 2e-3
        assert (
            rel_l2(mo.moe_forward(x, None, stack, routing=routing, precision="fast"), want) < 2e-2
        )
        if T == 1:
            assert rel_l2(mo.moe_forward_cpu(x, routing, stack), want) < 1e-5


def test_other_stacks_have_no_marlin():
    w = np.zeros((2, 8, 8), np.float32)
    stack = mo.ExpertStack.from_dense_stacks(w, w, w)
    assert stack.marlin("gate_up") is None
    assert stack.marlin("down") is None
    with pytest.raises(mo.ConfigError):
        stack.marlin("side")

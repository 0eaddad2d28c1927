"""A forward in three calls is the forward, bit for bit, whatever the layer is made of."""

import numpy as np
import pytest
from files import write_small
from values import expert_weights, normal, poisoned, random_routing
from zoo_models import LAYER, architectures, files_of, inputs_of

import moesaic as mo

TUNINGS = ({"batch_invariant": True}, {"precision": "exact"}, {"precision": "fast"})


def composed(layer, x, **others):
    routing = layer.route(x, **others)
    rows = layer.expert_rows(x, routing)
    return layer.finish(rows, routing, x)


@pytest.mark.parametrize("pair", architectures(), ids="-".join)
def test_every_architecture(pair, tmp_path):
    for path in files_of(pair, tmp_path):
        with mo.MoeLayer.from_gguf(path, LAYER) as layer:
            for tokens in (0, 1, 3, 40):
                x, others = inputs_of(layer, tokens)
                for tuning in TUNINGS:
                    with mo.tuning(**tuning):
                        want, routing = layer(x, return_routing=True, **others)
                        mine = layer.route(x, **others)
                        np.testing.assert_array_equal(mine.topk_ids, routing.topk_ids)
                        np.testing.assert_array_equal(mine.topk_weights, routing.topk_weights)
                        assert np.isfinite(want).all()
                        np.testing.assert_array_equal(composed(layer, x, **others), want)


def layer_with_everything():
    """Identity experts, a low-rank delta, gated shared experts, biases: parts of few models."""
    gate, up, down = expert_weights(6, 32, 24)
    biases = {"gate": normal(6, 24, seed=1), "down": normal(6, 32, seed=2)}
    stack = mo.ExpertStack.from_dense_stacks(gate, up, down, biases=biases)
    stack = stack.with_deltas({"up": (normal(6, 2, 32, seed=3), normal(6, 24, 2, seed=4), 0.5)})
    shared = mo.ExpertStack.from_dense_stacks(*expert_weights(1, 32, 16, seed=5))
    router = mo.RouterConfig(8, 3, identity_experts=2)
    config = mo.MoeConfig(
        32, 24, 6, 3, router=router, shared="sigmoid_gated", shared_intermediate_size=16
    )
    return mo.MoeLayer(
        stack, config, normal(8, 32, seed=6), shared=shared, shared_gate=normal(32, seed=7)
    )


def test_parts_of_few_models():
    layer = layer_with_everything()
    for dtype in ("f32", "bf16"):
        for tokens in (1, 40):
            x = mo.asarray(normal(tokens, 32), dtype)
            for tuning in TUNINGS:
                with mo.tuning(**tuning):
                    want, routing = layer(x, return_routing=True)
                    assert tokens == 1 or (np.asarray(routing.topk_ids) >= 6).any()
                    rows = layer.expert_rows(x, routing)
                    assert len(rows) == (np.asarray(routing.topk_ids) < 6).sum()
                    y = layer.finish(rows, routing, x)
                    np.testing.assert_array_equal(np.asarray(y), np.asarray(want))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_types_and_outputs(layer, dtype, accumulate):
    x = mo.asarray(normal(5, layer.config.hidden_size), dtype)
    with mo.tuning(batch_invariant=True):
        routing = layer.route(x)
        rows = layer.expert_rows(x, routing)
        start = normal(5, layer.config.hidden_size, seed=3)
        outs = [mo.asarray(start, dtype, copy=True) for _ in range(2)]
        layer(x, out=outs[0], accumulate=accumulate)
        assert layer.finish(rows, routing, x, out=outs[1], accumulate=accumulate) is outs[1]
    np.testing.assert_array_equal(np.asarray(outs[1]), np.asarray(outs[0]))


def test_leading_dimensions(layer):
    x = normal(2, 3, layer.config.hidden_size)
    with mo.tuning(batch_invariant=True):
        y = composed(layer, x)
        assert y.shape == x.shape
        np.testing.assert_array_equal(y, layer(x))


@pytest.mark.parametrize("gemm", ["auto", "aligned"])
@pytest.mark.parametrize("row_space", ["token_pairs", "packed_rows"])
def test_rows_come_compact_and_in_order(gemm, row_space):
    stack = mo.ExpertStack.from_dense_stacks(*expert_weights(6, 24, 40))
    config = mo.MoeConfig(24, 40, 6, 3)
    layer = mo.MoeLayer(stack, config, normal(6, 24))
    x, routing = normal(7, 24), random_routing(7, 6, 3, skipped=(2, 5))
    ids = np.array(routing.topk_ids)
    ids[0, 1] = ids[6, 0] = -1
    routing = mo.Routing(ids, routing.topk_weights)
    with mo.tuning(precision="exact", gemm=gemm, row_space=row_space):
        out = poisoned(int((ids >= 0).sum()), 24)
        assert layer.expert_rows(x, routing, out=out) is out
        pairs = zip(*np.nonzero(ids >= 0), strict=True)
        for at, (token, slot) in enumerate(pairs):
            alone = mo.Routing(ids[token : token + 1, slot : slot + 1], np.ones((1, 1), np.float32))
            np.testing.assert_array_equal(out[at], layer(x[token : token + 1], routing=alone)[0])
        np.testing.assert_array_equal(layer.finish(out, routing, x), layer(x, routing=routing))


def test_layers_of_a_store(small):
    file = mo.GgufFile(small.path)
    x = normal(9, small.hidden)
    with mo.tuning(batch_invariant=True):
        want = mo.MoeLayer.from_gguf(file, 1)(x)
        for on_miss in ("compute", "stage"):
            store = mo.MoeExpertStore.from_gguf(file)
            layer = mo.MoeLayer.from_store(store, 1, mo.ExpertPool(8, 2), on_miss)
            np.testing.assert_array_equal(composed(layer, x), want)


def test_bad_arguments(layer):
    hidden = layer.config.hidden_size
    x = normal(2, hidden)
    routing = layer.route(x)
    rows = layer.expert_rows(x, routing)
    with pytest.raises(mo.ShapeError, match="rows"):
        layer.finish(rows[:-1], routing, x)
    with pytest.raises(mo.DTypeError, match="rows"):
        layer.finish(rows.astype(np.float64), routing, x)
    with pytest.raises(mo.ShapeError, match="routing"):
        layer.expert_rows(x[:1], routing)
    with pytest.raises(mo.ShapeError, match="out"):
        layer.expert_rows(x, routing, out=poisoned(1, hidden))
    with pytest.raises(mo.ShapeError, match="memory"):
        layer.finish(rows, routing, x, out=rows[:2])
    with pytest.raises(mo.DTypeError, match="x"):
        layer.route(x.astype(np.float64))
    closed = mo.MoeLayer(layer.stack, layer.config, layer.router_weight)
    closed.close()
    with pytest.raises(mo.DeviceError, match="route"):
        closed.route(x)


def test_usage_counts_what_is_computed(layer):
    x = normal(6, layer.config.hidden_size)
    mine = mo.MoeLayer(layer.stack, layer.config, layer.router_weight)
    with pytest.raises(mo.ConfigError, match="count_usage"):
        _ = mine.usage
    mine(x)
    mine.count_usage(coactivation=True)
    ids = np.array(mine.route(x).topk_ids)  # computes no expert
    mine(x)
    routing = mine.route(x)
    mine.finish(mine.expert_rows(x, routing), routing, x)
    skipped = np.where(np.arange(6)[:, None] < 2, ids, -1)
    mine(x, routing=mo.Routing(skipped, np.ones(ids.shape, np.float32)))
    counted = np.concatenate([ids, ids, ids[:2]])
    usage = mine.usage
    np.testing.assert_array_equal(usage.counts, np.bincount(counted.ravel(), minlength=8))
    assert usage.forwards == 3
    assert usage.coactivation.trace() == usage.counts.sum()
    mine.count_usage()
    assert mine.usage.counts.sum() == 0


def test_usage_of_a_store_is_its_pools(small):
    store = mo.MoeExpertStore.from_gguf(small.path)
    pool = mo.ExpertPool(8, 4)
    layer = mo.MoeLayer.from_store(store, 0, pool)
    layer(normal(3, small.hidden))
    assert layer.usage.counts.tolist() == pool.usage.counts.tolist()
    with pytest.raises(mo.UnsupportedError, match="pool"):
        layer.count_usage()


def test_skipped_pairs_do_not_change_the_precision(tmp_path):
    """A token beside skipped ones is computed as it is alone."""
    write_small(tmp_path / "m.gguf", num_experts=32, top_k=8, hidden=512, intermediate=256)
    layer = mo.MoeLayer.from_gguf(tmp_path / "m.gguf", 0)
    x = normal(64, 512)
    ids = np.full((64, 8), -1, np.int32)
    ids[0] = np.arange(8)
    weights = np.full((64, 8), 1 / 8, np.float32)
    alone = layer(x[:1], routing=mo.Routing(ids[:1], weights[:1]))
    beside = layer(x, routing=mo.Routing(ids, weights))
    np.testing.assert_array_equal(beside[:1], alone)
    assert not beside[1:].any()
    gemv = layer.stack.gemv_up(x[0], np.arange(8, dtype=np.int32))
    many = np.concatenate([np.arange(8, dtype=np.int32), np.full(504, -1, np.int32)])
    np.testing.assert_array_equal(layer.stack.gemv_up(x[0], many)[:8], gemv)

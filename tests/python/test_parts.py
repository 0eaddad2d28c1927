"""The rarer parts of a layer from Python: what the arguments mean, and what is refused."""

import numpy as np
import pytest
from oracle import expert_f64, rel_l2, silu
from values import expert_weights, normal

import moesaic as mo

H, I, E, K, T = 24, 40, 5, 2, 6


def values(*shape, seed=0):
    return normal(*shape, seed=seed, scale=0.3)


def make_stack(hidden=H, inter=I, experts=E, seed=1):
    arrays = expert_weights(experts, hidden, inter, seed=seed)
    return mo.ExpertStack.from_dense_stacks(*arrays), arrays


def expert(arrays, e, x):
    return expert_f64(x, *(role[e] for role in arrays))


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


@pytest.fixture
def x():
    return values(T, H, seed=9) * 3


def config(**changes):
    router = changes.pop("router", None) or mo.RouterConfig(E, K)
    return mo.MoeConfig(H, I, E, K, router=router, **changes)


def test_weights_on_the_input(x):
    stack, arrays = make_stack()
    router = mo.RouterConfig(
        E, 1, score="sigmoid", renormalize=False, select_on="logits", weight_on="input"
    )
    layer = mo.MoeLayer(stack, mo.MoeConfig(H, I, E, 1, router=router), values(E, H, seed=4))
    y, routing = layer(x, return_routing=True)
    pairs = zip(x, routing.topk_ids[:, 0], routing.topk_weights[:, 0], strict=True)
    assert rel_l2(y, [expert(arrays, e, w * row) for row, e, w in pairs]) < 1e-5


def test_identity_experts(x):
    stack, arrays = make_stack()
    router = mo.RouterConfig(E + 3, K, identity_experts=3, renormalize=False)
    layer = mo.MoeLayer(stack, config(router=router), values(E + 3, H, seed=4))
    assert layer.router_weight.shape == (E + 3, H)
    y, routing = layer(x, return_routing=True)
    assert routing.topk_ids.max() >= E
    want = np.zeros((T, H))
    for t in range(T):
        for e, w in zip(routing.topk_ids[t], routing.topk_weights[t], strict=True):
            want[t] += w * (x[t] if e >= E else expert(arrays, e, x[t]))
    assert rel_l2(y, want) < 1e-5
    np.testing.assert_array_equal(layer(x, routing=routing), y)
    with pytest.raises(mo.ConfigError, match="identity_experts"):
        mo.RouterConfig(4, 2, identity_experts=4)


def test_latent_experts_and_norms(x):
    latent, eps = 8, 1e-3
    stack, arrays = make_stack(hidden=latent)
    down, up = values(latent, H, seed=5), values(H, latent, seed=6)
    weights = {n: 1 + values(s, seed=i) for i, (n, s) in enumerate(
        {"latent_norm": latent, "input_norm": H, "router_norm": H}.items())}  # fmt: skip
    facts = {"latent_size": latent, "latent_norm": True, "input_norm": True, "norm_eps": eps}
    router_weight = values(E, H, seed=4)
    layer = mo.MoeLayer(
        stack, config(router_input="norm", **facts), router_weight, latent=(down, up), **weights
    )
    assert layer.config.latent_size == latent and layer.config.router_input == "norm"
    y, routing = layer(x, return_routing=True)
    logits = norm(x, weights["router_norm"], eps) @ router_weight.T
    np.testing.assert_array_equal(routing.topk_ids, mo.route(logits, top_k=K).topk_ids)
    want = []
    for t, row in enumerate(norm(x.astype(np.float64), weights["input_norm"], eps)):
        pairs = zip(routing.topk_ids[t], routing.topk_weights[t], strict=True)
        inner = sum(w * expert(arrays, e, down @ row) for e, w in pairs)
        want.append(up @ norm(inner, weights["latent_norm"], eps))
    assert rel_l2(y, want) < 1e-5
    assert rel_l2(mo.moe_forward_cpu(x, routing, layer), want) < 1e-5
    memory = layer.memory()
    assert memory["latent"] >= down.nbytes + up.nbytes and memory["other"] == 2 * 4 * H
    assert "latent" in mo.explain(layer, 4)["parts"]


@pytest.mark.parametrize("latent", [3, "ab", {0: 1, 1: 2}, (np.zeros((8, H), "f4"),)])
def test_latent_projections_that_are_no_pair(latent):
    stack, _ = make_stack(hidden=8)
    with pytest.raises(
        mo.DTypeError, match="latent: expected an ExpertStack or a tuple of two arrays"
    ):
        mo.MoeLayer(stack, config(latent_size=8), values(E, H), latent=latent)


def test_token_ids_and_topk_ids(x):
    stack, arrays = make_stack()
    router = mo.RouterConfig(E, K, score="sigmoid", select_on="given")
    table = np.array([[0, 1], [2, 3], [4, 0]], np.int64)
    tokens = np.array([2, 0, 1, 1, 0, 2], np.int32)
    router_weight = values(E, H, seed=4)
    layer = mo.MoeLayer(
        stack, config(router=router, vocab_size=3), router_weight, token_experts=table
    )
    y, routing = layer(x, token_ids=tokens, return_routing=True)
    np.testing.assert_array_equal(routing.topk_ids, table[tokens])
    scores = 1 / (1 + np.exp(-np.take_along_axis(x @ router_weight.T, table[tokens], 1)))
    weights = scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(routing.topk_weights, weights, atol=1e-5)
    want = [sum(w * expert(arrays, e, row) for e, w in zip(table[t], ws, strict=True))
            for row, t, ws in zip(x, tokens, weights, strict=True)]  # fmt: skip
    assert rel_l2(y, want) < 1e-5
    np.testing.assert_array_equal(layer(x, topk_ids=table[tokens]), y)
    logits = x @ router_weight.T
    again = mo.route(logits, router, topk_ids=table[tokens])
    np.testing.assert_allclose(again.topk_weights, weights, atol=1e-5)

    for arguments, match in (
        ({}, "token_ids or topk_ids"),
        ({"token_ids": tokens, "topk_ids": table[tokens]}, "both"),
        ({"token_ids": tokens, "routing": routing}, "routing"),
        ({"topk_ids": table[tokens], "routing": routing}, "routing"),
    ):
        with pytest.raises(mo.ConfigError, match=match):
            layer(x, **arguments)
    for arguments, match in (
        ({"token_ids": tokens + 1}, r"token_ids\[0\]: expected 0 to 2, got 3"),
        ({"token_ids": tokens[:2]}, "token_ids"),
        ({"topk_ids": table[tokens] + 4}, "topk_ids"),
        ({"topk_ids": table[tokens][:, :1]}, "topk_ids"),
    ):
        with pytest.raises(mo.ShapeError, match=match):
            layer(x, **arguments)
    with pytest.raises(mo.DTypeError, match="token_ids"):
        layer(x, token_ids=tokens.astype(np.float32))
    with pytest.raises(mo.ConfigError, match="topk_ids"):
        mo.route(logits, router)
    with pytest.raises(mo.ConfigError, match="select_on"):
        mo.route(logits, top_k=K, topk_ids=table[tokens])
    with pytest.raises(mo.ConfigError, match="this router selects"):
        mo.MoeLayer(stack, config(), router_weight)(x, token_ids=tokens)


def test_router_input(x):
    stack, _ = make_stack()
    router_weight, other = values(E, H, seed=4), values(T, H, seed=8)
    layer = mo.MoeLayer(stack, config(router_input="separate"), router_weight)
    _, routing = layer(x, router_input=other, return_routing=True)
    np.testing.assert_array_equal(
        routing.topk_ids, mo.route(other @ router_weight.T, top_k=K).topk_ids
    )
    # A router that reads x may be given something else.
    free = mo.MoeLayer(stack, config(), router_weight)
    np.testing.assert_array_equal(free(x, router_input=other), layer(x, router_input=other))
    assert rel_l2(layer(x, other @ router_weight.T), layer(x, router_input=other)) < 1e-5
    with pytest.raises(mo.ConfigError, match="router_input"):
        layer(x)
    with pytest.raises(mo.ConfigError, match="router_input and routing"):
        layer(x, router_input=other, routing=routing)
    with pytest.raises(mo.ShapeError, match="router_input"):
        layer(x, router_input=other[:2])


def test_shared_experts_with_their_own_activation(x):
    stack, arrays = make_stack()
    shared, shared_arrays = make_stack(inter=16, experts=1, seed=7)
    clamp = mo.Activation("swiglu_clamp_output", limit=0.25)
    facts = {"shared": "plain", "shared_intermediate_size": 16, "shared_activation": clamp}
    layer = mo.MoeLayer(stack, config(**facts), values(E, H, seed=4), shared=shared)
    assert layer.config.shared_activation == clamp and layer.config.activation.kind == "swiglu"
    y, routing = layer(x, return_routing=True)
    gate, up, down = (a[0].astype(np.float64) for a in shared_arrays)
    hidden = np.minimum(silu(x @ gate.T), 0.25) * np.clip(x @ up.T, -0.25, 0.25)
    want = hidden @ down.T
    for t in range(T):
        for e, w in zip(routing.topk_ids[t], routing.topk_weights[t], strict=True):
            want[t] += w * expert(arrays, e, x[t])
    assert rel_l2(y, want) < 1e-5


@pytest.mark.parametrize(
    ("facts", "parts", "match"),
    [
        ({"latent_size": 8}, {}, "latent_size|hidden_size"),
        ({"input_norm": True}, {}, "input norm"),
        ({}, {"input_norm": np.ones(H, np.float32)}, "input norm"),
        ({"input_norm": True}, {"input_norm": np.ones(H - 1, np.float32)}, "input_norm"),
        ({"router_input": "norm"}, {}, "router norm"),
        ({"vocab_size": 3}, {}, "token_experts"),
        ({"shared": "plain", "shared_intermediate_size": 8}, {}, "shared experts"),
    ],
)
def test_parts_that_disagree(facts, parts, match):
    stack, _ = make_stack()
    with pytest.raises(mo.ShapeError, match=match):
        mo.MoeLayer(stack, config(**facts), values(E, H), **parts)


def test_layer_kinds_and_table(small):
    assert mo.layer_kinds(mo.GgufFile(small.path)) == ["moe", "moe"]
    table = {row["architecture"]: row for row in mo.architecture_table()}
    assert set(mo.known_architectures()) == {n for n, row in table.items() if not row["missing"]}
    assert table["llama4"]["notes"] == "weights on the input"
    assert table["grovemoe"]["missing"]

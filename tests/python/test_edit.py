"""Stacks and layers made of the experts of others: exactly those experts, and nothing lost."""

import itertools

import numpy as np
import pytest
from files import write_small
from int4 import Checkpoint
from oracle import rel_l2
from rebuild import ROLES, assert_same_bits, inputs_of
from test_round_trip import MADE, E, H, I, K, epilogues
from values import expert_weights, normal, random_routing

import moesaic as mo

BIASES, SCALES = epilogues()
WEIGHTS = expert_weights(E, H, I)


def make_stack(quant="Q8_0", layout="auto", **parts):
    parts = parts or {"biases": BIASES, "scales": SCALES}
    roles = [(mo.testing.quantize(w, quant), quant) for w in WEIGHTS]
    return mo.ExpertStack.from_encoded(*roles, **parts, layout=layout)


def run(stack, ids, weights, x):
    routing = mo.Routing(np.asarray(ids, np.int32), weights)
    return mo.moe_forward(x, None, stack, routing=routing, precision="exact")


def assert_experts(stack, sources):
    """Expert i of the stack is (another stack, its expert) i, with all that belongs to it."""
    assert stack.num_experts == len(sources)
    for role in stack.quants:
        for part in ("encoded", "biases", "scales"):
            for e, (other, expert) in enumerate(sources):
                if part == "encoded":
                    got, want = stack.encoded(role)[e], other.encoded(role)[expert]
                else:
                    mine, theirs = getattr(stack, part), getattr(other, part)
                    missing = 0 if part == "biases" else 1
                    got = mine[role][e] if role in mine else missing
                    want = theirs[role][expert] if role in theirs else missing
                np.testing.assert_array_equal(got, want, f"{part} of {role}, expert {e}")


@pytest.mark.parametrize("quant", ["Q8_0", "F32", "F16"])
@pytest.mark.parametrize("layout", ["auto", "file"])
def test_select(quant, layout):
    stack = make_stack(quant, layout)
    ids = [4, 1, 4]
    few = stack.select(ids)
    assert few.quants == stack.quants and few.kind == "per_expert"
    assert_experts(few, [(stack, e) for e in ids])
    x, weights = normal(7, H), np.full((7, 2), 0.5, np.float32)
    for pair in ((0, 1), (1, 2)):
        got = run(few, [pair] * 7, weights, x)
        want = run(stack, [[ids[i] for i in pair]] * 7, weights, x)
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(stack.select(np.array(ids)).encoded("up"), few.encoded("up"))


def test_select_keeps_its_source():
    stack = make_stack()
    want = stack.dequantize("down", 3)
    few = stack.select(range(2, 4)).select((1,))
    del stack
    np.testing.assert_array_equal(few.dequantize("down", 0), want)


def test_permute():
    stack = make_stack()
    order = np.random.default_rng(0).permutation(E)
    other = stack.permute(order)
    assert_experts(other, [(stack, e) for e in order])
    assert_experts(other.permute(np.argsort(order)), [(stack, e) for e in range(E)])
    for bad in ([0] * E, range(E - 1), range(1, E + 1)):
        with pytest.raises(mo.ShapeError, match="order: expected each of 0 to 5 once"):
            stack.permute(bad)


def test_concat_fills_up_what_one_lacks():
    full, plain = make_stack(), make_stack(scales={})
    both = mo.ExpertStack.concat([plain, full])
    assert_experts(both, [(plain, e) for e in range(E)] + [(full, e) for e in range(E)])
    assert set(both.biases) == set(both.scales) == set(ROLES)
    x, routing = normal(9, H), random_routing(9, E, K)
    later = mo.Routing(routing.topk_ids + E, routing.topk_weights)
    for stack, over in ((plain, routing), (full, later)):
        want = mo.moe_forward(x, None, stack, routing=routing, precision="exact")
        got = mo.moe_forward(x, None, both, routing=over, precision="exact")
        np.testing.assert_array_equal(got, want)


def test_concat_refuses():
    stack = make_stack()
    with pytest.raises(
        mo.DTypeError, match="gate: expected one type for all experts, Q8_0, got F16"
    ):
        mo.ExpertStack.concat([stack, make_stack("F16")])
    with pytest.raises(mo.UnsupportedError, match="lie in one way"):
        mo.ExpertStack.concat([stack, make_stack(layout="file")])
    with pytest.raises(mo.ShapeError, match="H 32, I 64, got H 32, I 32"):
        mo.ExpertStack.concat([stack, mo.ExpertStack.from_dense_stacks(*expert_weights(2, H, 32))])
    dense = mo.ExpertStack.from_dense_stacks
    with pytest.raises(mo.ShapeError, match="gated"):
        mo.ExpertStack.concat([dense(*WEIGHTS), dense(None, *WEIGHTS[1:])])
    with pytest.raises(mo.ShapeError, match="at least one"):
        mo.ExpertStack.concat([])
    for ids in ([6], [-1]):
        with pytest.raises(mo.ShapeError, match="expected 0 to 5"):
            stack.select(ids)
    with pytest.raises(mo.ShapeError, match="at least one"):
        stack.select([])
    with pytest.raises(mo.DTypeError, match="whole numbers"):
        stack.select([0.5])


@pytest.mark.parametrize("order", [None, "shared", "per_expert"])
def test_int4(order):
    stack = mo.ExpertStack.from_marlin(
        Checkpoint(4, 64, 128, 32, order=order, seed=1).stack(),
        Checkpoint(4, 64, 64, 32, order=order, seed=2).stack(),
    )
    other = mo.ExpertStack.from_marlin(
        Checkpoint(4, 64, 128, 32, seed=3).stack(), Checkpoint(4, 64, 64, 32, seed=4).stack()
    )
    ids = [3, 0, 3]
    few = mo.ExpertStack.concat([stack.select(ids), other])
    assert few.marlin("down") is None
    for role in ROLES:
        want = np.concatenate([stack.dequantize(role)[ids], other.dequantize(role)])
        np.testing.assert_array_equal(few.dequantize(role), want)
    x, weights = normal(5, 64), np.full((5, 2), 0.5, np.float32)
    np.testing.assert_array_equal(
        run(few, [[0, 1]] * 5, weights, x), run(stack, [[3, 0]] * 5, weights, x)
    )
    np.testing.assert_array_equal(
        run(few, [[4, 6]] * 5, weights, x), run(other, [[1, 3]] * 5, weights, x)
    )
    with pytest.raises(mo.UnsupportedError, match="INT4"):
        stack.with_expert(0, up=np.ones((64, 64), np.float32))


@pytest.mark.parametrize("layout", ["auto", "file"])
def test_with_expert(layout):
    stack = make_stack(layout=layout)
    matrix, bias = normal(I, H, seed=20), normal(H, seed=21)
    other = stack.with_expert(2, up=matrix, biases={"down": bias}, scales={"gate": 3})
    for role in ROLES:
        want = stack.encoded(role)
        if role == "up":
            want[2] = mo.testing.quantize(matrix / SCALES["up"][2], "Q8_0")
        np.testing.assert_array_equal(other.encoded(role), want)
    assert other.quants == stack.quants
    np.testing.assert_array_equal(other.biases["down"][2], bias)
    assert other.scales["gate"][2] == 3
    assert rel_l2(other.dequantize("up", 2), matrix) < 1e-2
    for part in ("biases", "scales"):
        for role in ROLES:
            want = np.array(getattr(stack, part)[role])
            if (part, role) == ("biases", "down"):
                want[2] = bias
            elif (part, role) == ("scales", "gate"):
                want[2] = 3
            np.testing.assert_array_equal(getattr(other, part)[role], want)
    # The other experts are untouched, and so is the stack itself.
    np.testing.assert_array_equal(stack.encoded("up"), make_stack().encoded("up"))
    x, weights = normal(3, H), np.full((3, 2), 0.5, np.float32)
    np.testing.assert_array_equal(
        run(other, [[0, 5]] * 3, weights, x), run(stack, [[0, 5]] * 3, weights, x)
    )


def test_with_expert_takes_encoded_bytes():
    stack = make_stack()
    one = mo.testing.quantize(normal(H, I, seed=9), "Q8_0")
    other = stack.with_expert(1, down=(one, "Q8_0"))
    np.testing.assert_array_equal(other.encoded("down")[1], one)
    np.testing.assert_array_equal(other.scales["down"], stack.scales["down"])
    copy = stack.with_expert(0, **{r: (stack.encoded(r)[3], "Q8_0") for r in ROLES})
    np.testing.assert_array_equal(copy.encoded("gate")[0], stack.encoded("gate")[3])


def test_with_expert_where_the_others_have_no_bias():
    stack = make_stack(biases={})
    other = stack.with_expert(1, biases={"up": np.ones(I, np.float32)}, scales={"up": 2})
    np.testing.assert_array_equal(other.biases["up"], np.eye(E)[1][:, None] * np.ones(I))
    np.testing.assert_array_equal(other.scales["up"], [1, 2, 1, 1, 1, 1])
    assert set(other.biases) == {"up"}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"expert": 6}, mo.ShapeError, "expected 0 to 5"),
        ({"up": normal(H, I)}, mo.ShapeError, r"up: expected \[64, 32\]"),
        ({"up": (np.zeros(8, np.uint8), "Q8_0")}, mo.ShapeError, "up bytes"),
        ({"up": (np.zeros(8, np.uint8), "Q4_0")}, mo.DTypeError, "the types of its stack"),
        ({"biases": {"up": normal(H)}}, mo.ShapeError, r"biases\['up'\]: expected \[64\]"),
        ({"biases": {"side": normal(H)}}, mo.ConfigError, "gate"),
        ({"scales": {"up": "2"}}, mo.DTypeError, "a number"),
    ],
)
def test_with_expert_refuses(changes, error, match):
    with pytest.raises(error, match=match):
        make_stack().with_expert(**{"expert": 0, **changes})


def test_with_expert_needs_an_encoder():
    types = mo.testing.quant_types()
    name = next((n for n, t in types.items() if t["decodes"] and not t["encodes"]), None)
    if name is None:
        pytest.skip("every type has an encoder")
    rows = np.zeros((2, 256, 256 // types[name]["block_elems"] * types[name]["block_bytes"]), "u1")
    stack = mo.ExpertStack.from_encoded((rows, name), (rows, name), (rows, name))
    with pytest.raises(mo.UnsupportedError, match=name):
        stack.with_expert(0, up=np.ones((256, 256), np.float32))
    assert stack.with_expert(0, up=(rows[1], name)).quants["up"] == name


# --- whole layers ----------------------------------------------------------------------------


def test_replace(small):
    layer = mo.MoeLayer.from_gguf(small.path, 0, precision="exact")
    same = layer.replace()
    assert same.stack is layer.stack and same.precision == "exact"
    assert_same_bits(layer, same)
    x = normal(4, small.hidden)
    fewer = layer.config.replace(top_k=1, router=layer.config.router.replace(top_k=1))
    _, routing = layer.replace(config=fewer)(x, return_routing=True)
    assert routing.topk_ids.shape == (4, 1)
    assert layer.replace(router_weight=None).router_weight is None
    with pytest.raises(mo.ShapeError, match="router_weight"):
        layer.replace(router_weight=normal(3, small.hidden))
    with pytest.raises(mo.ShapeError, match="shared experts"):
        layer.replace(shared=layer.stack.select([0]))
    with pytest.raises(TypeError):
        layer.replace(colour=1)


@pytest.mark.parametrize("name", MADE)
def test_replace_keeps_every_part(name):
    assert_same_bits(MADE[name], MADE[name].replace())


def test_replace_loses_no_bias_and_no_scale():
    layer = MADE["biases"]
    plain = mo.ExpertStack.from_dense_stacks(*WEIGHTS)
    with pytest.raises(mo.ConfigError, match=r"gate bias.*drop_biases=True"):
        layer.replace(stack=plain)
    # The scales of dense weights may be in the weights.
    assert layer.replace(stack=plain, drop_biases=True).stack.biases == {}
    layer = layer.replace(stack=make_stack())
    bare = make_stack(biases=BIASES)
    with pytest.raises(mo.ConfigError, match=r"gate scale.*drop_scales=True"):
        layer.replace(stack=bare)
    assert layer.replace(stack=bare, drop_scales=True).stack.scales == {}


def test_replace_the_gate_of_the_shared_experts():
    layer = MADE["identity, shared, norms"]
    other = layer.replace(shared_gate=np.zeros(H, np.float32))
    np.testing.assert_array_equal(other.shared.gate, 0)
    assert other.shared.scale == layer.shared.scale
    np.testing.assert_array_equal(
        other.shared.stack.scales["down"], layer.shared.stack.scales["down"]
    )


@pytest.mark.parametrize("name", [n for n in MADE if n != "table"])
def test_select_experts(name):
    """The chosen experts, run over a routing by old numbers, give what the new layer gives."""
    layer = MADE[name]
    ids = [5, 0, 3]
    few = layer.select_experts(ids)
    assert few.config.num_experts == 3 and few.precision == layer.precision
    x, more = inputs_of(few, 6)
    # The choice between exact and fast depends on the number of experts.
    y, routing = few(x, **more, return_routing=True, precision="exact")
    identity = layer.config.router.identity_experts
    old = np.array(ids + list(range(E, E + identity)))
    by_old = mo.Routing(old[routing.topk_ids].astype(np.int32), routing.topk_weights)
    np.testing.assert_array_equal(layer(x, routing=by_old, precision="exact"), y)
    if layer.router_weight is not None:
        np.testing.assert_array_equal(few.router_weight, layer.router_weight[old])
    if layer.config.router.selection_bias:
        for bias in ("router_bias", "selection_bias"):
            want = np.array(getattr(layer.config.router, bias))[old]
            np.testing.assert_array_equal(getattr(few.config.router, bias), want)


@pytest.mark.parametrize("name", MADE)
def test_permute_experts_changes_nothing(name):
    layer = MADE[name]
    order = np.random.default_rng(1).permutation(E)
    other = layer.permute_experts(order)
    back = other.permute_experts(np.argsort(order))
    assert_same_bits(layer, back)
    x, more = inputs_of(layer, 8)
    if "router_logits" in more:
        more = {"router_logits": more["router_logits"][:, order]}
        want = layer(x, router_logits=more["router_logits"][:, np.argsort(order)])
    else:
        want = layer(x, **more)
    assert rel_l2(other(x, **more), want) < 1e-6


def test_select_experts_of_a_table():
    layer = MADE["table"]
    order = [3, 1, 0, 2, 5, 4]
    other = layer.permute_experts(order)
    np.testing.assert_array_equal(np.array(order)[other.token_experts], layer.token_experts)
    twice = layer.select_experts([*range(E), 0])
    np.testing.assert_array_equal(twice.token_experts, layer.token_experts)
    with pytest.raises(mo.ConfigError, match="token id"):
        layer.select_experts([0, 1, 2])


def test_groups_stay_together():
    router = mo.RouterConfig(E, K, num_groups=3, groups_used=2)
    stack = mo.ExpertStack.from_dense_stacks(*WEIGHTS)
    layer = mo.MoeLayer(stack, mo.MoeConfig(H, I, E, K, router=router), normal(E, H))
    assert layer.select_experts([3, 1, 5]).config.router.num_groups == 3
    layer.permute_experts([2, 3, 1, 0, 4, 5])
    with pytest.raises(mo.ConfigError, match="3 groups"):
        layer.select_experts([0, 1, 2, 3])
    for ids in ([0, 1, 2], [0, 2, 1, 3, 4, 5]):
        with pytest.raises(mo.ConfigError, match="side by side"):
            layer.select_experts(ids)


def test_select_experts_refuses(small):
    layer = MADE["biases"]
    with pytest.raises(mo.ConfigError, match="top_k"):
        layer.select_experts([1])
    with pytest.raises(mo.ShapeError, match="expected 0 to 5"):
        layer.select_experts([0, 6])
    store = mo.MoeExpertStore.from_gguf(small.path)
    cold = mo.MoeLayer.from_store(store, 0)
    for edit in (lambda: cold.select_experts([0, 1, 2]), lambda: cold.replace(router_weight=None)):
        with pytest.raises(mo.UnsupportedError, match="store"):
            edit()


# --- low-rank deltas -------------------------------------------------------------------------


def deltas(rank=3, roles=ROLES, scale=0.5, hidden=H, inter=I, experts=E):
    made = {}
    for i, role in enumerate(roles):
        rows, cols = (hidden, inter) if role == "down" else (inter, hidden)
        made[role] = (
            normal(experts, rank + i, cols, seed=30 + i, scale=cols**-0.5),
            normal(experts, rows, rank + i, seed=40 + i),
            scale + i,
        )
    return made


def dense_delta(delta):
    a, b, scale = (np.asarray(part, np.float64) for part in delta)
    return scale * (b @ a)


def merged(stack, given):
    """The layer's matrices in f64 with the deltas in them, for a stack without biases."""
    return [
        stack.dequantize(role).astype(np.float64)
        + (dense_delta(given[role]) if role in given else 0)
        for role in ROLES
    ]


def forward_f64(x, routing, weights, biases):
    y = np.zeros((len(x), H))
    for t, row in enumerate(x.astype(np.float64)):
        for e, w in zip(routing.topk_ids[t], routing.topk_weights[t], strict=True):
            if e < 0:
                continue
            g, u, d = (m[e] for m in weights)
            bg, bu, bd = (biases.get(r, np.zeros((E, 1)))[e] for r in ROLES)
            gate, up = g @ row + bg, u @ row + bu
            y[t] += w * (d @ (gate / (1 + np.exp(-gate)) * up) + bd)
    return y


WAYS = [None, *itertools.product(("bucketed", "aligned"), ("token_pairs", "packed_rows"))]


def run_way(way, x, stack, routing, **options):
    options |= {"routing": routing, "precision": "exact"}
    if way is None:
        return mo.moe_forward(x, None, stack, **options)
    return mo.moe_forward_bucketed(x, None, stack, gemm=way[0], row_space=way[1], **options)


@pytest.mark.parametrize("roles", [ROLES, ("gate",), ("up",), ("down",)], ids="-".join)
@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_delta_in_f64(roles, quant):
    stack = make_stack(quant, biases=BIASES, scales=SCALES)
    given = deltas(roles=roles)
    with_delta = stack.with_deltas(given)
    weights = merged(stack, given)
    for tokens in (1, 4, 200):
        x, routing = (
            normal(tokens, H, seed=tokens),
            random_routing(tokens, E, K, skipped=(0,)[: tokens - 1]),
        )
        want = forward_f64(x, routing, weights, BIASES)
        bound = 1e-5 if quant == "F32" else 2e-3
        assert rel_l2(mo.moe_forward_cpu(x, routing, with_delta), want) < 1e-5
        for way in WAYS:
            out = np.full_like(x, np.nan)
            with mo.tuning(poison=True):
                run_way(way, x, with_delta, routing, out=out)
            assert rel_l2(out, want) < bound
            for threads in (1, 3):
                with mo.tuning(threads=threads):
                    np.testing.assert_array_equal(run_way(way, x, with_delta, routing), out)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_delta_in_products(dtype):
    given = deltas()
    stack = mo.ExpertStack.from_dense_stacks(*WEIGHTS)
    with_delta = stack.with_deltas(given)
    x = {"down": normal(5, I).astype(dtype)}
    ids = np.array([[0, 3], [5, -1], [2, 2], [1, 0], [4, 4]], np.int32)
    plan = mo.BucketPlan.build(mo.Routing(ids, np.ones(ids.shape, np.float32)), E)
    valid = ids.ravel() >= 0
    for role, weights in zip(ROLES, merged(stack, given), strict=True):
        rows = x.get(role, normal(5, H).astype(dtype))
        want = np.einsum("tkrc,tc->tkr", weights[ids], rows.astype(np.float64))
        got = getattr(with_delta, f"gemv_{role}")(rows, ids).reshape(10, -1)
        assert rel_l2(got[valid], want.reshape(10, -1)[valid]) < 1e-5
        np.testing.assert_array_equal(got[~valid], 0)
        packed = np.repeat(rows, 2, 0) if role == "down" else rows
        again = getattr(with_delta, f"gemm_{role}")(packed, plan)
        assert rel_l2(again[valid], want.reshape(10, -1)[valid]) < 1e-5


def test_delta_with_weights_on_the_input():
    router = mo.RouterConfig(
        E, 1, score="sigmoid", renormalize=False, select_on="logits", weight_on="input"
    )
    given = deltas()
    stack = mo.ExpertStack.from_dense_stacks(*WEIGHTS)
    config = mo.MoeConfig(H, I, E, 1, router=router)
    layer = mo.MoeLayer(stack.with_deltas(given), config, normal(E, H))
    baked = mo.MoeLayer(stack.with_deltas(given).bake(), config, normal(E, H))
    for tokens in (1, 40):
        x = normal(tokens, H)
        assert rel_l2(layer(x), baked(x)) < 1e-5


def test_deltas_are_accounted_for():
    layer = mo.MoeLayer(make_stack(), mo.MoeConfig(H, I, E, K), normal(E, H))
    other = layer.replace(stack=layer.stack.with_deltas(deltas()))
    extra = sum(a.nbytes + b.nbytes for a, b, _ in deltas().values())
    assert other.stack.nbytes == layer.stack.nbytes + extra
    assert other.memory()["total"] >= layer.memory()["total"] + extra
    facts = mo.explain(other, 4)
    assert "low-rank deltas" in facts["parts"] and facts["down low-rank delta"] == "rank 5"
    assert "low-rank" in str(other.report) and "low-rank" not in str(layer.report)
    x = normal(20, H)
    workspace = mo.Workspace.for_layer(other, max_tokens=20)
    np.testing.assert_array_equal(other(x, workspace=workspace), other(x))
    small = mo.Workspace.for_layer(layer, max_tokens=20)
    assert workspace.nbytes > small.nbytes
    with pytest.raises(mo.WorkspaceError):
        other(x, workspace=small)


def test_deltas_come_back_and_go():
    given = deltas()
    stack = make_stack()
    other = stack.with_deltas(given)
    for role in ROLES:
        a, b, scale = other.deltas[role]
        np.testing.assert_array_equal(a, given[role][0])
        np.testing.assert_array_equal(b, given[role][1])
        assert scale == given[role][2] and not a.flags.writeable
    np.testing.assert_array_equal(other.dequantize("up"), stack.dequantize("up"))
    assert other.with_deltas({}).deltas == other.with_deltas(None).deltas == {}
    assert set(other.with_deltas({"up": given["up"][:2]}).deltas) == {"up"}
    assert other.with_deltas({"up": given["up"][:2]}).deltas["up"][2] == 1
    layer = mo.MoeLayer(other, mo.MoeConfig(H, I, E, K), normal(E, H))
    assert_same_bits(layer, layer.replace(stack=other.select(range(E))))


def test_deltas_move_with_their_experts():
    stack = make_stack()
    first, second = stack.with_deltas(deltas()), stack.with_deltas(deltas(rank=1, scale=2.0))
    both = mo.ExpertStack.concat([first, stack, second]).select([2, 7, 15])
    for role in ROLES:
        dense = dense_delta(both.deltas[role])
        np.testing.assert_allclose(dense[0], dense_delta(first.deltas[role])[2], atol=1e-5)
        np.testing.assert_array_equal(dense[1], 0)
        np.testing.assert_allclose(dense[2], dense_delta(second.deltas[role])[3], atol=1e-5)
    alone = first.with_expert(0, biases={"up": np.zeros(I, np.float32)})
    for mine, theirs in zip(alone.deltas["up"], first.deltas["up"], strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("quant", [None, "F32", {"up": "Q8_0", "gate": "F32", "down": "F16"}])
def test_bake(quant):
    stack = make_stack("Q8_0")
    given = deltas()
    other = stack.with_deltas(given)
    baked = other.bake(quant)
    assert baked.deltas == {}
    want = {None: dict.fromkeys(ROLES, "Q8_0"), "F32": dict.fromkeys(ROLES, "F32")}
    assert baked.quants == (quant if isinstance(quant, dict) else want[quant])
    bounds = {"F32": 1e-6, "F16": 1e-3, "Q8_0": 1e-2}
    for role, dense in zip(ROLES, merged(stack, given), strict=True):
        assert rel_l2(baked.dequantize(role), dense) < bounds[baked.quants[role]]
        np.testing.assert_array_equal(baked.biases[role], stack.biases[role])
    x, routing = normal(30, H), random_routing(30, E, K)
    got, run_beside = (mo.moe_forward(x, None, s, routing=routing) for s in (baked, other))
    assert rel_l2(got, run_beside) < 2e-2


def test_bake_leaves_other_roles_and_takes_a_scale_of_zero():
    stack = make_stack(scales={"up": np.array([0, 1, 2, 3, 4, 5], np.float32)})
    other = stack.with_deltas(deltas(roles=("up",)))
    baked = other.bake()
    for role in ("gate", "down"):
        np.testing.assert_array_equal(baked.encoded(role), stack.encoded(role))
    want = stack.dequantize("up") + dense_delta(other.deltas["up"])
    assert rel_l2(baked.dequantize("up"), want) < 1e-2
    assert stack.bake().quants == stack.quants
    with pytest.raises(mo.ConfigError, match="quant"):
        other.bake("Q9")
    with pytest.raises(mo.UnsupportedError, match="encoder"):
        other.bake("Q8_K")
    with pytest.raises(mo.ShapeError):
        other.bake("Q4_K")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"up": (normal(E, 2, H + 1), normal(E, I, 2))}, mo.ShapeError, r"\[6, 2, 32\]"),
        ({"up": (normal(E, 2, H), normal(E, I, 3))}, mo.ShapeError, r"\[6, 64, 2\]"),
        ({"up": (normal(E, 0, H), normal(E, I, 0))}, mo.ShapeError, "r, 32"),
        ({"up": normal(E, 2, H)}, mo.DTypeError, "a tuple"),
        ({"up": (normal(E, 2, H), normal(E, I, 2), "1")}, mo.DTypeError, "a number"),
        ({"side": (normal(E, 2, H), normal(E, I, 2))}, mo.ConfigError, "gate"),
    ],
)
def test_with_deltas_refuses(changes, error, match):
    with pytest.raises(error, match=match):
        make_stack().with_deltas(changes)
    ungated = mo.ExpertStack.from_dense_stacks(None, *WEIGHTS[1:])
    with pytest.raises(mo.ShapeError, match="ungated"):
        ungated.with_deltas({"gate": (normal(E, 2, H), normal(E, I, 2))})


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_delta_beside_shared_experts(tmp_path, scale):
    file = write_small(tmp_path / "m.gguf", hidden=256, intermediate=256)
    layer = mo.MoeLayer.from_gguf(file.path, 0)
    shared = layer.stack.select([0]).with_deltas(
        deltas(hidden=256, inter=256, experts=1, roles=("up", "down"))
    )
    config = layer.config.replace(shared="plain", shared_intermediate_size=256, shared_scale=scale)
    other = layer.replace(config=config, shared=shared)
    baked = layer.replace(config=config, shared=shared.bake("F32"))
    assert "low-rank deltas" in mo.explain(other, 1)["parts"]
    for tokens in (1, 30):
        x = normal(tokens, 256)
        with mo.tuning(poison=True):
            assert rel_l2(other(x), baked(x)) < 2e-2

"""Stacks that hold some experts of a file, by their ids in it."""

import copy
import pickle

import numpy as np
import pytest
from files import write_small, write_small_checkpoint
from int4_files import LAYER, H
from int4_files import Model as Int4Model
from test_gguf_layers import Model, fuse, split_experts
from values import expert_weights, normal

import moesaic as mo

KEPT = [1, 4, 6]


def routing_of(ids, tokens, top_k, seed=0):
    rng = np.random.default_rng(seed)
    table = rng.choice(ids, (tokens, top_k)).astype(np.int32)
    return mo.Routing(table, rng.random((tokens, top_k), np.float32))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("layout", ["auto", "file"])
@pytest.mark.parametrize("fused", [False, True])
def test_results_are_those_of_the_whole_layer(tmp_path, mmap, layout, fused):
    path = tmp_path / "m.gguf"
    types = {"gate_type": "Q6_K", "down_type": "Q6_K"} if fused else {}
    write_small(path, fused_gate_up=fused, **types)
    with mo.GgufFile(path, mmap=mmap) as file:
        whole = mo.MoeLayer.from_gguf(file, 0, layout=layout)
        some = mo.MoeLayer.from_gguf(file, 0, experts=KEPT, layout=layout)
        assert some.stack.experts == KEPT
        assert some.stack.num_experts == 8
        assert some.stack.nbytes * 8 == whole.stack.nbytes * 3
        assert some.memory()["up"] * 8 == whole.memory()["up"] * 3
        for tokens in (1, 5, 200):
            x = normal(tokens, 256)
            routing = routing_of([-1, *KEPT], tokens, 3)
            with mo.tuning(batch_invariant=True):
                want = whole(x, routing=routing)
                np.testing.assert_array_equal(some(x, routing=routing), want)
                np.testing.assert_array_equal(
                    mo.moe_forward_cpu(x, routing, some), mo.moe_forward_cpu(x, routing, whole)
                )
        for e in KEPT:
            for role in ("gate", "up", "down"):
                np.testing.assert_array_equal(
                    some.stack.dequantize(role, e), whole.stack.dequantize(role, e)
                )
        whole.close()
        some.close()
        del whole, some


def test_an_expert_that_is_not_kept_is_an_error_before_anything_is_written(small):
    some = mo.MoeLayer.from_gguf(small.path, 0, experts=KEPT)
    x = normal(4, small.hidden)
    out = np.full_like(x, 7.0)
    bad = mo.Routing(
        np.array([[1, 4, -1]] * 3 + [[6, 5, 1]], np.int32), np.ones((4, 3), np.float32)
    )
    for call in (
        lambda: some(x, routing=bad, out=out),
        lambda: some(x, out=out),  # the router asks for all
        lambda: mo.moe_forward_cpu(x, bad, some, out=out),
        lambda: some.expert_rows(x, bad),
        lambda: some.stack.gemv_up(x[0], np.array([1, 5], np.int32)),
        lambda: some.stack.gemm_up(x, mo.BucketPlan.build(bad, 8)),
    ):
        with pytest.raises(mo.DeviceError, match=r"not kept|in memory"):
            call()
    assert (out == 7.0).all()
    # Its router and the end of the layer need no experts.
    routing = some.route(x)
    whole = mo.MoeLayer.from_gguf(small.path, 0)
    with mo.tuning(batch_invariant=True):
        rows = whole.expert_rows(x, routing)
        np.testing.assert_array_equal(some.finish(rows, routing, x), whole(x))


def test_refused_and_allowed_edits(small, tmp_path):
    some = mo.MoeLayer.from_gguf(small.path, 0, experts=KEPT)
    whole = mo.ExpertStack.open_and_load(small.path, 0)
    stack = some.stack
    for call in (
        lambda: stack.dequantize("up"),
        lambda: stack.dequantize("up", 0),
        lambda: stack.encoded("down"),
        lambda: stack.select([0]),
        lambda: mo.ExpertStack.concat([stack, stack]),
        lambda: stack.with_expert(1, up=normal(512, 256)),
        lambda: some.save(tmp_path / "some.gguf"),
        lambda: some.select_experts([0, 1, 4]),
    ):
        with pytest.raises(mo.UnsupportedError, match=r"expert"):
            call()
    assert not (tmp_path / "some.gguf").exists()
    chosen = stack.select([6, 1])
    assert chosen.experts == [0, 1]
    np.testing.assert_array_equal(
        chosen.dequantize("down"), whole.select([6, 1]).dequantize("down")
    )
    assert mo.explain(some, 2)["experts in memory"] == "3 of 8"


def test_bad_ids(small):
    for experts, match in (([8], "0 to 7"), ([-1], "0 to 7"), ([1, 1], "once")):
        for load in (mo.ExpertStack.open_and_load, mo.MoeLayer.from_gguf):
            with pytest.raises(mo.ShapeError, match=match):
                load(small.path, 0, experts=experts)
    with pytest.raises(mo.DTypeError, match="experts"):
        mo.MoeLayer.from_gguf(small.path, 0, experts=["a"])


@pytest.mark.parametrize("experts", [range(2, 5), (3, 2), np.array([7, 0]), []])
def test_ids_of_any_kind(small, experts):
    some = mo.MoeLayer.from_gguf(small.path, 0, experts=experts)
    assert some.stack.experts == sorted(int(e) for e in experts)
    x = normal(2, small.hidden)
    nothing = mo.Routing(np.full((2, 3), -1, np.int32), np.ones((2, 3), np.float32))
    assert not some(x, routing=nothing).any()
    for other in (pickle.loads(pickle.dumps(some)), copy.copy(some)):
        assert other.stack.experts == some.stack.experts
    assert pickle.loads(pickle.dumps(some.stack)).experts == some.stack.experts
    assert "in memory" in repr(some.stack)


@pytest.mark.parametrize("change", [split_experts, fuse, lambda model: None])
def test_forms_of_files_with_biases_and_scales(tmp_path, change):
    rng = np.random.default_rng(0)
    model = Model.small("llama")
    model.tensors["ffn_down_exps.scale"] = np.linspace(0.5, 2, 4).astype(np.float32)
    if change is split_experts:
        scales = model.tensors.pop("ffn_down_exps.scale")
        model.tensors |= {f"ffn_down.{e}.scale": scales[e : e + 1] for e in range(4)}
    change(model)
    path = model.path(tmp_path)
    x = normal(5, 32)
    for mmap in (True, False):
        file = mo.GgufFile(path, mmap=mmap)
        whole = mo.MoeLayer.from_gguf(file, 0)
        some = mo.MoeLayer.from_gguf(file, 0, experts=[0, 3])
        routing = mo.Routing(
            rng.choice([0, 3, -1], (5, 2)).astype(np.int32), rng.random((5, 2), np.float32)
        )
        with mo.tuning(batch_invariant=True):
            np.testing.assert_array_equal(some(x, routing=routing), whole(x, routing=routing))
        np.testing.assert_array_equal(
            some.stack.scales["down"][[0, 3]], whole.stack.scales["down"][[0, 3]]
        )


def test_only_those_bytes_are_read(tmp_path):
    """A file whose other experts are gone serves as well."""
    path = tmp_path / "m.gguf"
    write_small(path, num_experts=8)
    file = mo.GgufFile(path, mmap=False)
    whole = mo.MoeLayer.from_gguf(file, 0)
    last = file.tensors["blk.0.ffn_down_exps.weight"]
    assert last.name == max(file.tensors.values(), key=lambda t: t.offset).name
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.truncate(size - last.nbytes // 2)
    with pytest.raises((mo.FormatError, OSError)):
        mo.MoeLayer.from_gguf(file, 0)
    some = mo.MoeLayer.from_gguf(file, 0, experts=[0, 1])
    x = normal(3, 256)
    routing = routing_of([0, 1], 3, 2)
    with mo.tuning(batch_invariant=True):
        np.testing.assert_array_equal(some(x, routing=routing), whole(x, routing=routing))


def test_checkpoints(tmp_path):
    folder = write_small_checkpoint(tmp_path)
    whole = mo.MoeLayer.from_safetensors(folder, 0)
    x = normal(9, 64)
    for kept in (KEPT, range(8), []):
        seen = []
        some = mo.MoeLayer.from_safetensors(
            folder, 0, experts=kept, progress=lambda p, seen=seen: seen.append(p.what)
        )
        assert some.stack.experts == list(kept)
        assert len({name for name in seen if "proj" in name}) == 3 * len(kept)
        routing = routing_of([-1, *kept], 9, 2)
        with mo.tuning(batch_invariant=True):
            np.testing.assert_array_equal(some(x, routing=routing), whole(x, routing=routing))
        assert pickle.loads(pickle.dumps(some)).stack.experts == list(kept)
    stack = mo.ExpertStack.load_from_safetensors(folder, 0, experts=[7])
    _, up, _ = expert_weights(8, 64, 32)  # as they are in the folder
    np.testing.assert_array_equal(stack.dequantize("up", 7), up[7])
    with pytest.raises(mo.ShapeError, match="0 to 7"):
        mo.MoeLayer.from_safetensors(folder, 0, experts=[9])
    with pytest.raises(mo.ShapeError, match="once"):
        mo.ExpertStack.load_from_safetensors(folder, 0, experts=[2, 2])


@pytest.mark.parametrize("recipe", [{}, {"order": "per_expert"}, {"form": "awq"}], ids=str)
def test_int4(tmp_path, recipe):
    folder = Int4Model(**recipe).write(tmp_path)
    whole = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    x = normal(40, H)
    for kept in ([1, 3], [2], []):
        some = mo.ExpertStack.load_from_safetensors(folder, LAYER, experts=kept)
        assert some.experts == kept
        assert some.marlin("down") is None
        routing = routing_of([-1, *kept], 40, 2)
        with mo.tuning(batch_invariant=True):
            np.testing.assert_array_equal(
                mo.moe_forward(x, None, some, routing=routing),
                mo.moe_forward(x, None, whole, routing=routing),
            )
        for e in kept:
            np.testing.assert_array_equal(some.dequantize("up", e), whole.dequantize("up", e))

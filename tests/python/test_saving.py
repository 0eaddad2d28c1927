"""Layers to files and back: every kind of layer, bit by bit, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ZOO
from files import write_small
from test_gguf_layers import E, H, I, K, Model, S, hashed_file, latent_file
from values import expert_weights, normal

import moesaic as mo
from moesaic.safetensors import read_header
from moesaic.saving import container, layers
from moesaic.saving.facts import facts_of

gguf = pytest.importorskip("gguf")


def open_layer(path, block: int = 0) -> mo.MoeLayer:
    return mo.MoeLayer.from_gguf(path, block, precision="exact")


def assert_same_stack(a: mo.ExpertStack, b: mo.ExpertStack) -> None:
    assert a.quants == b.quants
    for role in a.quants:
        np.testing.assert_array_equal(a.encoded(role), b.encoded(role))
    for found, wanted in ((a.biases, b.biases), (a.scales, b.scales)):
        assert found.keys() == wanted.keys()
        for role in wanted:
            np.testing.assert_array_equal(found[role], wanted[role])


def assert_same(a: mo.MoeLayer, b: mo.MoeLayer) -> None:
    """All that a layer is made of, bit by bit."""
    assert facts_of(a.config) == facts_of(b.config)
    assert_same_stack(a.stack, b.stack)
    np.testing.assert_array_equal(a.router_weight, b.router_weight)
    assert (a.shared is None) == (b.shared is None)
    if a.shared is not None:
        assert_same_stack(a.shared.stack, b.shared.stack)
        assert (a.shared.gate is None) == (b.shared.gate is None)
        if a.shared.gate is not None:
            np.testing.assert_array_equal(a.shared.gate, b.shared.gate)
    assert (a.latent is None) == (b.latent is None)
    if a.latent is not None:
        assert_same_stack(a.latent, b.latent)
    assert a.norms.keys() == b.norms.keys()
    for name in a.norms:
        np.testing.assert_array_equal(a.norms[name], b.norms[name])
    assert (a.token_experts is None) == (b.token_experts is None)
    if a.token_experts is not None:
        np.testing.assert_array_equal(a.token_experts, b.token_experts)


# --- every architecture

ROWS = {row["architecture"]: row for row in mo.architecture_table() if not row["missing"]}


def model_of(row: dict[str, str]) -> Model:
    """A file of an architecture with everything that it may have, at values of their own."""
    name = row["architecture"]
    score = 1 if "softmax" in row["score"] else 4 if name == "deepseek4" else 2
    shared = bool(row["shared"])
    model = Model.small(
        name, shared=shared, expert_gating_func=score, expert_weights_norm=True,
        expert_weights_scale=2.5, expert_group_count=2, expert_group_used_count=1,
        swiglu_clamp_exp=4.0, swiglu_clamp_shexp=3.0, expert_shared_count=1,
        expert_shared_feed_forward_length=S,
    )  # fmt: skip
    model.keys |= {
        "attention.layer_norm_rms_epsilon": 1e-5, "activation.situ_beta": 2.0,
        "activation.situ_linear_beta": 0.5,
    }  # fmt: skip
    tensors = model.tensors
    if "bias" in row["selection"]:
        tensors["exp_probs_b.bias"] = normal(E, seed=1)
    if "router bias" in row["notes"]:
        tensors["ffn_gate_inp.bias"] = normal(E, seed=2)
    if row["shared"].startswith("sigmoid"):
        tensors["ffn_gate_inp_shexp.weight"] = normal(H, seed=3)
    if row["activation"] in ("relu_squared", "gelu_tanh"):
        del tensors["ffn_gate_exps.weight"]
        tensors.pop("ffn_gate_shexp.weight", None)
    if "input norm" in row["notes"].split("; "):
        norm = "ffn_norm_exps" if name == "arctic" else "pre_ffw_norm_2"
        tensors[f"{norm}.weight"] = normal(H, seed=4)
    if "router norm" in row["notes"]:
        tensors["ffn_gate_inp.scale"] = normal(H, seed=5)
    for role in tensors.keys() & {f"ffn_{r}_exps.weight" for r in ("gate", "up", "down")}:
        tensors[role.replace("weight", "scale")] = np.linspace(0.5, 2, E).astype(np.float32)
        rows = tensors[role].shape[1]
        tensors[role.replace("weight", "bias")] = normal(E, rows, seed=6)
    return model


@pytest.mark.parametrize("name", ROWS)
def test_every_architecture_comes_back(name, tmp_path):
    old = open_layer(model_of(ROWS[name]).path(tmp_path))
    old.save(tmp_path / "new.gguf", metadata={"general.name": "new"})
    new = open_layer(tmp_path / "new.gguf")
    assert_same(old, new)
    assert new.config == old.config
    if not old.config.vocab_size and old.config.router_input != "separate":
        x = normal(3, H)
        np.testing.assert_array_equal(new(x), old(x))


def kimi_file() -> Model:
    """Latent experts under the other names, with a norm and scales of the projections."""
    model = latent_file()
    model.architecture = "kimi-k3"
    model.keys |= {
        "expert_latent_length": model.keys.pop("moe_latent_size"), "expert_gating_func": 2,
        "activation.situ_beta": 2.0, "activation.situ_linear_beta": 0.5,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    model.tensors = {
        name.replace("ffn_latent", "ffn_routed"): array for name, array in model.tensors.items()
    }
    model.tensors |= {
        "ffn_gate_exps.weight": normal(E, I, 16), "ffn_routed_norm.weight": normal(16),
        "ffn_routed_down.scale": np.array([0.3], np.float32),
        "ffn_routed_up.scale": np.array([1.7], np.float32),
    }  # fmt: skip
    return model


def shared_scales_file() -> Model:
    """Cohere's mean, whose half is in the scale of the shared down matrix beside a stored one."""
    model = Model.small("cohere2moe", shared=True, expert_gating_func=1)
    model.tensors["ffn_down_shexp.scale"] = np.array([0.3], np.float32)
    return model


def one_per_expert_file() -> Model:
    model = Model.small("llama")
    for role in ("gate", "up", "down"):
        for e, matrix in enumerate(model.tensors.pop(f"ffn_{role}_exps.weight")):
            model.tensors[f"ffn_{role}.{e}.weight"] = matrix
            model.tensors[f"ffn_{role}.{e}.scale"] = np.array([1 + e / 3], np.float32)
    return model


KINDS = {
    "latent": latent_file,
    "latent, normed": kimi_file,
    "hashed": hashed_file,
    "averaged": shared_scales_file,
    "one tensor per expert": one_per_expert_file,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_comes_back(kind, tmp_path):
    old = open_layer(KINDS[kind]().path(tmp_path))
    old.save(tmp_path / "new.gguf")
    assert_same(old, open_layer(tmp_path / "new.gguf"))


@pytest.mark.parametrize("path", sorted(ZOO.parent.glob("zoo-*.gguf")), ids=lambda path: path.stem)
@pytest.mark.parametrize("layout", ["auto", "file"])
def test_zoo_files_come_back(path, layout, tmp_path):
    """All layers of every file, whatever they were repacked to."""
    file = mo.GgufFile(path)
    old = {
        block: mo.MoeLayer.from_gguf(file, block, layout=layout, precision="exact")
        for block in file.moe_layers
    }
    target = tmp_path / "new.gguf"
    mo.write_gguf(target, old)
    new = mo.GgufFile(target)
    assert new.moe_layers == file.moe_layers
    for block, layer in old.items():
        again = mo.MoeLayer.from_gguf(new, block, precision="exact")
        assert_same(layer, again)
        assert again.config == layer.config
        # Some files have gate and up fused, which these have not.
        for name in new.tensors.keys() & file.tensors.keys():
            assert new.tensors[name].quant == file.tensors[name].quant, name
    x = normal(2, layer.config.hidden_size)
    np.testing.assert_array_equal(again(x), layer(x))


# --- fused


@pytest.mark.parametrize("scales", ["one", "two", "gate alone", "up alone", "none"])
def test_fused(scales, tmp_path):
    model = Model.small("gpt-oss")
    some, others = np.linspace(0.5, 2, E), np.linspace(3, 4, E)
    model.tensors["ffn_gate_inp.bias"] = normal(E)
    model.tensors["ffn_gate_exps.bias"] = normal(E, I, seed=1)
    model.tensors["ffn_up_exps.bias"] = normal(E, I, seed=2)
    if scales in ("one", "two", "gate alone"):
        model.tensors["ffn_gate_exps.scale"] = some.astype(np.float32)
    if scales in ("one", "two", "up alone"):
        up = others if scales == "two" else some
        model.tensors["ffn_up_exps.scale"] = up.astype(np.float32)
    old = open_layer(model.path(tmp_path))
    old.save(tmp_path / "new.gguf", fused=True)
    file = mo.GgufFile(tmp_path / "new.gguf")
    assert file.tensors["blk.0.ffn_gate_up_exps.weight"].shape == (E, 2 * I, H)
    assert "blk.0.ffn_up_exps.weight" not in file.tensors
    assert ("blk.0.ffn_gate_exps.scale" in file.tensors) == (scales not in ("one", "none"))
    new = open_layer(file)
    x = normal(3, H)
    np.testing.assert_array_equal(new(x), old(x))
    for role in ("gate", "up", "down"):
        np.testing.assert_array_equal(new.stack.encoded(role), old.stack.encoded(role))


def test_fused_has_one_type(tmp_path):
    path = write_small(tmp_path / "m.gguf", gate_type="Q4_K", up_type="Q5_K").path
    with pytest.raises(
        mo.ConfigError, match="one type for gate and up, got Q4_K and Q5_K"
    ) as caught:
        open_layer(path).save(tmp_path / "new.gguf", fused=True)
    error = caught.value
    assert [error.operation, error.what] == ["MoeLayer.save", "block 0: fused"]
    assert [error.expected, error.got] == ["one type for gate and up", "Q4_K and Q5_K"]
    ungated = open_layer(latent_file().path(tmp_path))
    with pytest.raises(mo.ConfigError, match="fused"):
        ungated.save(tmp_path / "new.gguf", fused=True)


# --- the file as others see it


def test_the_gguf_package_reads_it(tmp_path):
    small = write_small(tmp_path / "m.gguf", layers=3)
    chosen = {5: open_layer(small.path, 2), 2: open_layer(small.path, 0)}
    given = {
        "general.name": "two", "a.list": [1, 2], "a.texts": ["x", "y"], "a.flag": True, "a.int": -1,
        "a.big": 2**40, "a.float": 0.5, "a.double": 0.1, "general.alignment": 64,
    }  # fmt: skip
    mo.write_gguf(tmp_path / "new.gguf", chosen, metadata=given)
    reader = gguf.GGUFReader(tmp_path / "new.gguf")
    values = {name: entry.contents() for name, entry in reader.fields.items()}
    for key, value in given.items():
        assert values[key] == value
    assert reader.fields["a.float"].types == [gguf.GGUFValueType.FLOAT32]
    assert reader.fields["a.double"].types == [gguf.GGUFValueType.FLOAT64]
    want = {
        "block_count": 6, "embedding_length": small.hidden, "expert_count": small.num_experts,
        "expert_used_count": small.top_k, "expert_feed_forward_length": small.intermediate,
        "feed_forward_length": small.intermediate,
    }  # fmt: skip
    assert {key: values[f"qwen3moe.{key}"] for key in want} == want
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert all(tensor.data_offset % 64 == 0 for tensor in tensors.values())
    assert {name.split(".")[1] for name in tensors} == {"2", "5"}
    down = tensors["blk.5.ffn_down_exps.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q6_K
    assert list(down.shape) == [small.intermediate, small.hidden, small.num_experts]  # as ggml
    decoded = gguf.dequantize(down.data, down.tensor_type)
    np.testing.assert_allclose(decoded, small.weights[2].down, rtol=1e-5, atol=1e-6)
    router = tensors["blk.2.ffn_gate_inp.weight"]
    np.testing.assert_array_equal(router.data, small.weights[0].router)


def test_ggml_computes_the_same(tmp_path):
    """The experts of a written file in ggml's own graph."""
    pytest.importorskip("ggml")
    from moesaic.bench.peers.ggml_peer import GgmlPeer
    from moesaic.bench.shapes import BenchShape
    from moesaic.bench.weights import BenchLayer, BenchWeight

    small = write_small(tmp_path / "m.gguf")
    open_layer(small.path).save(tmp_path / "new.gguf")
    reader = gguf.GGUFReader(tmp_path / "new.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def weight(role: str) -> BenchWeight:
        tensor = tensors[f"blk.0.ffn_{role}_exps.weight"]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        data = np.array(tensor.data).reshape(-1)
        return BenchWeight(
            tensor.tensor_type.name, int(tensor.tensor_type), shape, data, np.empty(0)
        )

    shape = BenchShape("small", small.hidden, small.intermediate, small.num_experts, small.top_k)
    peer = GgmlPeer()
    peer.load([BenchLayer(shape, weight("gate"), weight("up"), weight("down"))])
    x = normal(4, small.hidden)
    y, routing = open_layer(tmp_path / "new.gguf")(x, return_routing=True)
    peer.prepare(len(x), 1)
    got = peer.run(0, x, np.array(routing.topk_ids), np.array(routing.topk_weights))
    # ggml rounds activations to 8 bits.
    assert np.linalg.norm(got - y) < 2e-2 * np.linalg.norm(y)
    peer.close()


def test_layers_of_several_kinds_in_one_file(tmp_path):
    """What differs between blocks is one number for each of them."""
    model = Model.small("qwen3moe", block_count=2, expert_count=[E, 2], expert_used_count=[K, 1])
    model.tensors |= {f"blk.1.{name}": array[:2] for name, array in model.tensors.items()}
    path = model.path(tmp_path)
    old = [open_layer(path, 0), open_layer(path, 1)]
    mo.write_gguf(tmp_path / "new.gguf", old)
    file = mo.GgufFile(tmp_path / "new.gguf")
    assert file.metadata["qwen3moe.expert_used_count"] == [K, 1]
    for block, layer in enumerate(old):
        assert_same(layer, open_layer(file, block))


# --- layers that were made here


def made(**changes) -> mo.MoeLayer:
    stack = mo.ExpertStack.from_dense_stacks(*expert_weights(E, H, I))
    config = mo.MoeConfig(hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
    return mo.MoeLayer(stack, config.replace(**changes), normal(E, H))


def router(**fields) -> mo.RouterConfig:
    return mo.RouterConfig(num_experts=E, top_k=K, **fields)


REFUSED = [
    ("qwen3moe", {"router": router(score="sigmoid")}, r"router\.score: expected 'sigmoid'"),
    ("qwen3moe", {"router": router(renormalize=False)}, r"router\.renormalize"),
    ("qwen3moe", {"router": router(scale=2.5)}, r"router\.scale: expected 2\.5"),
    ("qwen3moe", {"router": router(guard="add_eps", guard_eps=1e-6)}, r"router\.guard"),
    ("qwen3moe", {"router": router(select_on="logits")}, r"router\.select_on"),
    ("qwen3moe", {"router": router(weight_on="input")}, r"router\.weight_on"),
    ("qwen3moe", {"router": router(selection_bias=[0.5] * E)}, r"exp_probs_b\.bias"),
    ("qwen3moe", {"router": router(router_bias=[0.5] * E)}, r"ffn_gate_inp\.bias"),
    ("qwen3moe", {"activation": mo.Activation("geglu_tanh")}, r"activation\.kind"),
    ("qwen3moe", {"activation": mo.Activation("swiglu_clamp_input", limit=3)}, r"activation\.kind"),
    ("qwen2moe", {}, "block 0"),
    ("deepseek2", {"router": router(num_groups=2, groups_used=1)}, r"router\.group_"),
    ("gpt-oss", {"activation": mo.Activation("swiglu_oai", limit=3.0)}, "gpt-oss"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes", "message"), REFUSED)
def test_what_an_architecture_cannot_say_is_named(architecture, changes, message, tmp_path):
    layer = made(**changes)
    with pytest.raises(mo.UnsupportedError, match=message):
        layer.save(tmp_path / "new.gguf", architecture=architecture)
    assert list(tmp_path.iterdir()) == []


def test_what_another_architecture_can_say(tmp_path):
    layer = made(
        router=router(score="sigmoid", scale=2.5, guard="add_eps", guard_eps=1e-20),
        activation=mo.Activation("swiglu"),
    )
    layer.save(tmp_path / "new.gguf", architecture="glm_moe_dsa")  # a model type of glm-dsa
    assert mo.GgufFile(tmp_path / "new.gguf").metadata["general.architecture"] == "glm-dsa"
    assert_same(layer, open_layer(tmp_path / "new.gguf"))


def identity_layer() -> mo.MoeLayer:
    stack = mo.ExpertStack.from_dense_stacks(*expert_weights(E, H, I))
    config = mo.MoeConfig(
        hidden_size=H, intermediate_size=I, num_experts=E, top_k=K, architecture="qwen3moe",
        router=mo.RouterConfig(num_experts=E + 1, top_k=K, identity_experts=1),
    )  # fmt: skip
    return mo.MoeLayer(stack, config, normal(E + 1, H))


def test_what_gguf_has_no_place_for(tmp_path):
    to = tmp_path / "new.gguf"
    with pytest.raises(mo.UnsupportedError, match="identity_experts"):
        identity_layer().save(to)
    bare = mo.MoeLayer(made().stack, made(architecture="qwen3moe").config)
    with pytest.raises(mo.UnsupportedError, match="router_weight"):
        bare.save(to)
    with pytest.raises(mo.ConfigError, match=r"architecture: expected one of .* got none"):
        made().save(to)
    with pytest.raises(mo.UnsupportedError, match=r"grovemoe.*chunk experts"):
        made().save(to, architecture="grovemoe")
    assert list(tmp_path.iterdir()) == []


def test_low_rank_terms_are_not_left_out(tmp_path):
    layer = made(architecture="qwen3moe")
    a, b = normal(E, 2, H), normal(E, I, 2)
    changed = layer.replace(stack=layer.stack.with_deltas({"up": (a, b, 0.5)}))
    for save in (lambda: changed.save(tmp_path / "new.gguf"),
                 lambda: mo.save_safetensors(tmp_path / "new", changed)):  # fmt: skip
        with pytest.raises(mo.UnsupportedError, match=r"deltas\['up'\].*bake"):
            save()
    assert list(tmp_path.iterdir()) == []
    changed.replace(stack=changed.stack.bake()).save(tmp_path / "new.gguf")
    want = layer.stack.dequantize("up") + 0.5 * b @ a
    got = open_layer(tmp_path / "new.gguf").stack.dequantize("up")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bad_arguments_name_themselves(tmp_path, layer):
    to = tmp_path / "new.gguf"
    for layers_, message in (
        (3, "layers: expected a MoeLayer"), ([], "at least one"), ([3], r"layers\[0\]"),
        ({-1: layer}, "blocks of 0"), ({"a": layer}, "blocks of 0"),
    ):  # fmt: skip
        with pytest.raises(mo.Error, match=message):
            mo.write_gguf(to, layers_)
    for metadata, message in (
        ({"a": None}, r"metadata\['a'\]"), ({"a": []}, r"metadata\['a'\]"),
        ({"a": [1, "x"]}, r"metadata\['a'\]"), ({"general.architecture": "llama"}, "architecture="),
        ({"a": 2**70}, "64 bits"),
    ):  # fmt: skip
        with pytest.raises(mo.Error, match=message):
            layer.save(to, metadata=metadata)
    with pytest.raises(mo.DTypeError, match="progress"):
        layer.save(to, progress=3)
    with pytest.raises(FileNotFoundError):
        layer.save(tmp_path / "no" / "new.gguf")
    with pytest.raises(IsADirectoryError):
        layer.save(tmp_path)
    closed = open_layer(Model.small().path(tmp_path))
    closed.close()
    with pytest.raises(mo.DeviceError):
        closed.save(to)
    assert not to.exists()


# --- whole or not at all


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path) -> Path:
    path = tmp_path / "new.gguf"
    path.write_text("old")
    return path


def test_errors_name_files_whose_names_are_no_text(layer, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.gguf"
    try:
        Path(os.fsdecode(path)).write_text("old")
    except OSError:
        pytest.skip("a file system of names that are text")
    with pytest.raises(mo.ConfigError) as caught:
        layer.save(path)
    assert caught.value.what.endswith("\\xff.gguf")
    assert caught.value.hint == "overwrite=True replaces it"


def test_a_file_that_is_there_is_kept(layer, target):
    with pytest.raises(mo.ConfigError, match="overwrite"):
        layer.save(target)
    assert target.read_text() == "old"
    target.chmod(0o640)
    layer.save(target, overwrite=True)
    assert_same(layer, open_layer(target))
    assert target.stat().st_mode & 0o777 == 0o640
    assert names_in(target.parent) == ["new.gguf"]


def test_a_link_stays_a_link(layer, tmp_path, target):
    link = tmp_path / "link.gguf"
    link.symlink_to(target.name)
    layer.save(link, overwrite=True)
    assert link.is_symlink()
    assert_same(layer, open_layer(target))


def test_a_new_file_has_the_usual_mode(layer, tmp_path):
    (tmp_path / "usual").touch()
    layer.save(tmp_path / "new.gguf")
    assert (tmp_path / "new.gguf").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_progress_is_told_and_may_cancel(layer, target):
    steps: list[mo.Progress] = []
    layer.save(target, overwrite=True, progress=steps.append)
    done = [step.done_bytes for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1].total_bytes
    assert {step.what for step in steps} == set(mo.GgufFile(target).tensors)
    written = target.read_bytes()
    with pytest.raises(mo.OperationCancelled):
        layer.save(target, overwrite=True, progress=lambda _: False)

    def interrupt(_: mo.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer.save(target, overwrite=True, progress=interrupt)
    assert target.read_bytes() == written and names_in(target.parent) == ["new.gguf"]


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_leaves_the_old_file(layer, target, monkeypatch, after):
    count = 0
    write_at = container.write_at

    def full(*arguments):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(*arguments)

    monkeypatch.setattr(layers, "write_at", full)
    with pytest.raises(OSError, match="No space") as caught:
        layer.save(target, overwrite=True)
    assert caught.value.filename == str(target)
    assert target.read_text() == "old" and names_in(target.parent) == ["new.gguf"]


def test_a_limit_on_file_sizes_leaves_the_old_file(target):
    code = (
        "import resource, sys, moesaic as mo\n"
        "mo.testing.write_moe_gguf('m.gguf')\n"
        "layer = mo.MoeLayer.from_gguf('m.gguf', 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "layer.save(sys.argv[1], overwrite=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, target], cwd=target.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert f"[Errno {errno.EFBIG}]" in done.stderr and "new.gguf" in done.stderr
    assert target.read_text() == "old" and names_in(target.parent) == ["m.gguf", "new.gguf"]


def test_the_bytes_are_on_the_disk_before_the_name(layer, tmp_path, monkeypatch):
    events = []
    fsync, link = os.fsync, Path.hardlink_to

    def spy_fsync(handle):
        events.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def spy_link(self, other):
        events.append(("name", self.name))
        link(self, other)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "hardlink_to", spy_link)
    layer.save(tmp_path / "new.gguf")
    assert [kind for kind, _ in events] == ["fsync", "name", "fsync"]
    assert events[0][1].endswith(".tmp") and events[2][1] == tmp_path.name


# --- checkpoint folders

PAIRS = [
    ("llama", "mixtral"), ("olmoe", "olmoe"), ("qwen2moe", "qwen2_moe"), ("qwen3moe", "qwen3_moe"),
    ("qwen3next", "qwen3_next"), ("deepseek2", "deepseek_v3"), ("glm4moe", "glm4_moe"),
    ("dots1", "dots1"), ("minimax-m2", "minimax_m2"), ("ernie4_5-moe", "ernie4_5_moe"),
    ("hunyuan-moe", "hunyuan_v1_moe"), ("jamba", "jamba"), ("lfm2moe", "lfm2_moe"),
    ("mimo2", "mimo_v2_flash"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "model_type"), PAIRS, ids=lambda name: name)
@pytest.mark.parametrize("floats", ["F32", "F16", "BF16"])
def test_checkpoints_come_back(architecture, model_type, floats, tmp_path):
    row = ROWS[architecture]
    model = model_of(row)
    if architecture == "deepseek2":
        model.keys["expert_gating_func"] = 2
    if architecture in ("llama", "ernie4_5-moe", "hunyuan-moe", "jamba", "lfm2moe", "minimax-m2"):
        model.keys.pop("expert_group_count")
    if "swiglu_clamp" in row["activation"]:
        model.keys["swiglu_clamp_exp"] = 0.0
    for name in [name for name in model.tensors if "_exps.scale" in name or "_exps.bias" in name]:
        del model.tensors[name]
    if architecture in ("llama", "qwen2moe", "olmoe", "qwen3moe", "qwen3next"):
        model.keys.pop("expert_group_count", None)
    if architecture == "llama":  # Mixtral has none
        for name in [name for name in model.tensors if "shexp" in name]:
            del model.tensors[name]
    source = open_layer(model.path(tmp_path))
    roles = [
        (mo.testing.quantize(source.stack.dequantize(role), floats), floats)
        for role in ("gate", "up", "down")
    ]
    old = source.replace(stack=mo.ExpertStack.from_encoded(*roles)) if floats != "F32" else source
    folder = tmp_path / "folder"
    mo.save_safetensors(folder, {2: old}, config={"torch_dtype": "float32"})
    assert names_in(folder) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == (model_type, "float32")
    if model_type == "ernie4_5_moe":
        header = read_header(folder / "model.safetensors")
        bias = header["model.layers.2.mlp.moe_statics.e_score_correction_bias"]
        assert bias.shape == (1, E)
    new = mo.MoeLayer.from_safetensors(folder, 2, precision="exact")
    assert new.stack.quants == dict.fromkeys(("gate", "up", "down"), floats)
    assert_same(old, new)


def test_safetensors_reads_it(layer, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    mo.save_safetensors(tmp_path / "folder", layer, dequantize="f16")
    tensors = safetensors.load_file(tmp_path / "folder" / "model.safetensors")
    start = "model.layers.0.mlp"
    np.testing.assert_array_equal(tensors[f"{start}.gate.weight"], layer.router_weight)
    for name, role in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
        want = layer.stack.dequantize(role, 3).astype(np.float16)
        np.testing.assert_array_equal(tensors[f"{start}.experts.3.{name}.weight"], want)


@pytest.mark.parametrize("options", [{"metadata": "x"}, {"metadata": 3}, {"architecture": 1.5}])
def test_arguments_of_another_kind(layer, tmp_path, options):
    (name,) = options
    with pytest.raises(mo.DTypeError, match=rf"MoeLayer\.save: {name}: expected a"):
        layer.save(tmp_path / "new.gguf", **options)
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize("options", [{"model_type": 3}, {"dequantize": []}, {"config": "x"}])
def test_checkpoints_take_no_arguments_of_another_kind(layer, tmp_path, options):
    (name,) = options
    with pytest.raises(mo.DTypeError, match=rf"save_safetensors: {name}: expected a"):
        mo.save_safetensors(tmp_path / "folder", layer, **options)
    assert not (tmp_path / "folder").exists()


def test_checkpoints_refuse_what_they_cannot_say(layer, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(mo.UnsupportedError, match=r"gate: expected F32, F16 or BF16, got Q4_K"):
        mo.save_safetensors(folder, layer)
    with pytest.raises(mo.ConfigError, match="dequantize: expected f32"):
        mo.save_safetensors(folder, layer, dequantize="F32")
    with pytest.raises(mo.ConfigError, match=r"model_type: expected one of mixtral.*got 'gemma4'"):
        mo.save_safetensors(folder, layer, model_type="gemma4", dequantize="f32")
    with pytest.raises(mo.UnsupportedError, match=r"router\.selection_bias: expected one"):
        mo.save_safetensors(folder, layer, model_type="minimax_m2", dequantize="f32")
    with pytest.raises(mo.UnsupportedError, match=r"router\.renormalize: expected True"):
        mo.save_safetensors(folder, layer, model_type="jamba", dequantize="f32")
    biased = open_layer(model_of(ROWS["gpt-oss"]).path(tmp_path))
    with pytest.raises(mo.Error):
        mo.save_safetensors(folder, biased)
    scaled = Model.small()
    scaled.tensors["ffn_down_exps.scale"] = np.linspace(1, 2, E).astype(np.float32)
    with pytest.raises(mo.UnsupportedError, match=r"down: .*F32 with scales"):
        mo.save_safetensors(folder, open_layer(scaled.path(tmp_path)))
    assert not folder.exists()


def test_checkpoints_appear_whole(layer, tmp_path):
    folder = tmp_path / "folder"
    mo.save_safetensors(folder, layer, dequantize="bf16")
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(mo.ConfigError, match="overwrite"):
        mo.save_safetensors(folder, layer, dequantize="f32")
    with pytest.raises(mo.OperationCancelled):
        mo.save_safetensors(
            folder, layer, dequantize="f32", overwrite=True, progress=lambda _: False
        )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    mo.save_safetensors(folder, layer, dequantize="f32", overwrite=True)
    assert mo.MoeLayer.from_safetensors(folder, 0).stack.quants["up"] == "F32"
    with pytest.raises(mo.OperationCancelled):
        mo.save_safetensors(tmp_path / "no", layer, dequantize="f32", progress=lambda _: False)
    assert not (tmp_path / "no").exists()

"""What is not saved: what an architecture or GGUF cannot say, and arguments that are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from saved import assert_same, open_layer
from test_gguf_layers import E, H, I, K, Model
from values import expert_weights, normal

import moesaic as mo

pytest.importorskip("gguf")


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


@pytest.mark.parametrize("options", [{"metadata": "x"}, {"metadata": 3}, {"architecture": 1.5}])
def test_arguments_of_another_kind(layer, tmp_path, options):
    (name,) = options
    with pytest.raises(mo.DTypeError, match=rf"MoeLayer\.save: {name}: expected a"):
        layer.save(tmp_path / "new.gguf", **options)
    assert not (tmp_path / "new.gguf").exists()

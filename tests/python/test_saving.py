"""Layers to GGUF files and back: every kind of layer, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ZOO
from files import write_small
from saved import ROWS, assert_same, model_of, open_layer
from test_gguf_layers import E, H, I, K, Model, hashed_file, latent_file
from values import normal

import moesaic as mo

pytest.importorskip("gguf")


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


@pytest.mark.parametrize(
    "quant",
    sorted(
        name
        for name, facts in mo.testing.quant_types().items()
        if facts["encodes"] and facts["gguf"]
    ),
)
def test_every_type_comes_back(quant, tmp_path):
    mo.testing.write_moe_gguf(tmp_path / "old.gguf", gate_type=quant, down_type=quant)
    old = open_layer(tmp_path / "old.gguf")
    old.save(tmp_path / "new.gguf")
    new = open_layer(tmp_path / "new.gguf")
    assert new.stack.quants == dict.fromkeys(("gate", "up", "down"), quant)
    assert_same(old, new)


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


def test_numbers_of_numpy_name_blocks(tmp_path):
    mo.testing.write_moe_gguf(tmp_path / "model.gguf", layers=2)
    layers = {np.int32(i): mo.MoeLayer.from_gguf(tmp_path / "model.gguf", i) for i in (1, 0)}
    mo.write_gguf(tmp_path / "again.gguf", layers)
    assert mo.GgufFile(tmp_path / "again.gguf").moe_layers == [0, 1]
    with pytest.raises(mo.ConfigError, match="expected blocks of 0 to"):
        mo.write_gguf(tmp_path / "again.gguf", {np.int64(-1): layers[0]}, overwrite=True)

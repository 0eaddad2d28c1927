"""INT4 layers to GPTQ checkpoints and back: every code, scale, zero point and order of columns."""

from __future__ import annotations

import json

import numpy as np
import pytest
from files import bf16_bits, write_checkpoint
from int4 import Checkpoint
from int4_files import Model
from values import normal

import moesaic as mo
from moesaic.safetensors import read_header

pytest.importorskip("gguf")

E, H, INTER, LAYER = 4, 64, 32, 3
BASE = f"model.layers.{LAYER}.mlp"
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": INTER, "num_experts": E,
    "num_experts_per_tok": 2, "num_hidden_layers": LAYER + 1, "norm_topk_prob": True,
}  # fmt: skip


def stored(folder, model: Model):
    """A checkpoint of one layer."""
    tensors = {**model.tensors, f"{BASE}.gate.weight": normal(E, H)}
    return write_checkpoint(folder, tensors, {**CONFIG, "quantization_config": model.config})


def opened(folder) -> mo.MoeLayer:
    return mo.MoeLayer.from_safetensors(folder, LAYER, precision="exact")


def saved(folder, layer: mo.MoeLayer, **options) -> dict:
    """The configuration of what was written."""
    mo.save_safetensors(folder, {LAYER: layer}, **options)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def assert_same_int4(a: mo.ExpertStack, b: mo.ExpertStack) -> None:
    for role in ("gate_up", "down"):
        one, other = a.marlin(role), b.marlin(role)
        for expert in range(one.num_experts):
            mine, others = one.unpack(expert), other.unpack(expert)
            assert mine.keys() == others.keys()
            for kind, values in mine.items():
                np.testing.assert_array_equal(others[kind], values, err_msg=f"{role} {kind}")


def tensors_of(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    return {
        name: (entry.dtype, entry.shape, data[entry.begin : entry.end])
        for name, entry in read_header(path).items()
    }


def stack_of(gate_up: Checkpoint, down: Checkpoint, **parts) -> mo.ExpertStack:
    return mo.ExpertStack.from_marlin(gate_up.stack(), down.stack(), **parts)


def layer_of(stack: mo.ExpertStack) -> mo.MoeLayer:
    config = mo.MoeConfig(
        hidden_size=H, intermediate_size=INTER, num_experts=E, top_k=2, architecture="qwen3_moe"
    )
    return mo.MoeLayer(stack, config, normal(E, H))


RECIPES = {
    "zero points": {},
    "zero points as they are": {"form": "gptq_v2"},
    "symmetric": {"zeros": False, "group": 16},
    "columns of one order": {"order": "shared"},
    "columns in orders of their own": {"order": "per_expert"},
    "groups of any size": {"order": "any"},
    "one group": {"group": -1},
    "wide scales": {"scale_type": np.float32},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_gptq_checkpoints_are_written_as_they_were_read(recipe, tmp_path):
    """The tensors of the experts are those of the source, byte by byte."""
    (tmp_path / "old").mkdir()
    model = Model(**RECIPES[recipe])
    layer = opened(stored(tmp_path / "old", model))
    config = saved(tmp_path / "new", layer)
    said = {key: config[key] for key in ("bits", "group_size", "desc_act", "checkpoint_format")}
    assert said == {key: model.config.get(key) for key in said}
    assert config["quant_method"] == "gptq"
    assert config["sym"] == (recipe == "symmetric")
    assert "dynamic" not in config
    old, new = tensors_of(tmp_path / "old"), tensors_of(tmp_path / "new")
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        assert new[name] == tensor, name
    again = opened(tmp_path / "new")
    assert again.stack.kind == "marlin"
    assert_same_int4(layer.stack, again.stack)
    x = normal(5, H)
    np.testing.assert_array_equal(again(x), layer(x))


@pytest.mark.parametrize("form", ["awq", "pack_quantized"])
@pytest.mark.parametrize("zeros", [True, False])
def test_other_formats_become_gptq(form, zeros, tmp_path):
    """AWQ and compressed-tensors have zero points of 0, for which GPTQ's second form is."""
    (tmp_path / "old").mkdir()
    layer = opened(stored(tmp_path / "old", Model(form=form, zeros=zeros, group=16)))
    config = saved(tmp_path / "new", layer)
    assert config["checkpoint_format"] == ("gptq_v2" if zeros else "gptq")
    assert config["sym"] == layer.stack.marlin("up").symmetric  # AWQ keeps zero points of 8
    again = opened(tmp_path / "new")
    assert_same_int4(layer.stack, again.stack)
    x = normal(5, H)
    np.testing.assert_array_equal(again(x), layer(x))


def test_scales_keep_their_bits_in_the_narrowest_type(tmp_path):
    def bf16(scales):
        """Most are below what f16 has."""
        return (bf16_bits(scales / 2**20).astype(np.uint32) << 16).view(np.float32)

    for name, narrow, dtype in (
        ("f16", lambda scales: scales.astype(np.float16), "F16"),
        ("bf16", bf16, "BF16"),
        ("f32", lambda scales: scales, "F32"),
    ):
        sources = [
            Checkpoint(E, cols, rows, 32, seed=seed, scale_type=np.float32)
            for cols, rows, seed in ((H, 2 * INTER, 1), (INTER, H, 2))
        ]
        for one in sources:
            one.stored_scales = narrow(one.scales)
        stack = stack_of(*sources)
        saved(tmp_path / name, layer_of(stack))
        header = read_header(tmp_path / name / "model.safetensors")
        assert header[f"{BASE}.experts.1.up_proj.scales"].dtype == dtype
        assert_same_int4(stack, opened(tmp_path / name).stack)


def test_what_gptq_cannot_say(tmp_path):
    to = tmp_path / "new"
    gate_up, down = Checkpoint(E, H, 2 * INTER, 32), Checkpoint(E, INTER, H, 32)
    layer = layer_of(stack_of(gate_up, down))
    mixed = layer_of(stack_of(Checkpoint(E, H, 2 * INTER, 32), Checkpoint(E, INTER, H, 16)))
    with pytest.raises(mo.UnsupportedError, match=r"groups of one size.*got 16, 32"):
        mo.save_safetensors(to, mixed)
    wide = layer_of(stack_of(gate_up, Checkpoint(E, INTER, H, 32, form="gptq_v2")))
    with pytest.raises(mo.UnsupportedError, match=r"zero points of 0 to 15 or of 1 to 16"):
        mo.save_safetensors(to, wide)
    scaled = layer_of(stack_of(gate_up, down, scales={"down": np.full(E, 2, np.float32)}))
    with pytest.raises(mo.UnsupportedError, match=r"down: .*got INT4 with scales"):
        mo.save_safetensors(to, scaled)
    chosen = layer.replace(stack=layer.stack.select([1, 0, 2, 3]))
    with pytest.raises(mo.UnsupportedError, match=r"INT4 experts as they were loaded"):
        mo.save_safetensors(to, chosen)
    assert not to.exists()
    mo.save_safetensors(to, chosen, dequantize="f32")
    got = mo.MoeLayer.from_safetensors(to, 0).stack.dequantize("up", 0)
    np.testing.assert_array_equal(got, layer.stack.dequantize("up", 1))


def test_one_group_beside_several(tmp_path):
    """A size of groups that holds all columns of one matrix, but not of another."""
    layer = layer_of(stack_of(Checkpoint(E, H, 2 * INTER, 32), Checkpoint(E, INTER, H, -1)))
    assert saved(tmp_path / "new", layer)["group_size"] == 32
    assert_same_int4(layer.stack, opened(tmp_path / "new").stack)


def test_shared_experts_in_floats_are_excluded(tmp_path):
    (tmp_path / "old").mkdir()
    model = Model()
    shared = {
        f"{BASE}.shared_expert.{name}.weight": normal(*shape, seed=seed).astype(np.float16)
        for seed, (name, shape) in enumerate(
            (("gate_proj", (16, H)), ("up_proj", (16, H)), ("down_proj", (H, 16)))
        )
    }
    tensors = {
        **model.tensors, **shared, f"{BASE}.gate.weight": normal(E, H),
        f"{BASE}.shared_expert_gate.weight": normal(1, H),
    }  # fmt: skip
    config = {
        **CONFIG, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 2], "quantization_config": model.config,
    }  # fmt: skip
    layer = opened(write_checkpoint(tmp_path / "old", tensors, config))
    rules = saved(tmp_path / "new", layer)["dynamic"]
    assert rules == {rf"-:^model\.layers\.{LAYER}\.mlp\.shared_expert\.": {}}
    again = opened(tmp_path / "new")
    assert_same_int4(layer.stack, again.stack)
    assert again.shared.stack.quants["up"] == "F16"
    x = normal(5, H)
    np.testing.assert_array_equal(again(x), layer(x))


def test_decoded_on_request_and_never_otherwise(tmp_path):
    layer = layer_of(stack_of(Checkpoint(E, H, 2 * INTER, 32), Checkpoint(E, INTER, H, 32)))
    mo.save_safetensors(tmp_path / "new", layer, dequantize="f32")
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())
    again = mo.MoeLayer.from_safetensors(tmp_path / "new", 0)
    np.testing.assert_array_equal(again.stack.dequantize("up"), layer.stack.dequantize("up"))


def test_gguf_says_what_to_do_instead(tmp_path):
    layer = layer_of(stack_of(Checkpoint(E, H, 2 * INTER, 32), Checkpoint(E, INTER, H, 32)))
    with pytest.raises(mo.UnsupportedError, match="got INT4") as caught:
        layer.replace(config=layer.config.replace(architecture="qwen3moe")).save(tmp_path / "x")
    assert "save_safetensors" in caught.value.hint and "moesaic convert" in caught.value.hint
    assert list(tmp_path.iterdir()) == []

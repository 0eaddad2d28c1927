"""Layers to checkpoint folders of Hugging Face and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from saved import ROWS, assert_same, model_of, names_in, open_layer
from test_gguf_layers import E, Model

import moesaic as mo
from moesaic.safetensors import read_header

pytest.importorskip("gguf")

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


@pytest.mark.parametrize("options", [{"model_type": 3}, {"dequantize": []}, {"config": "x"}])
def test_checkpoints_take_no_arguments_of_another_kind(layer, tmp_path, options):
    (name,) = options
    with pytest.raises(mo.DTypeError, match=rf"save_safetensors: {name}: expected a"):
        mo.save_safetensors(tmp_path / "folder", layer, **options)
    assert not (tmp_path / "folder").exists()


def test_checkpoints_refuse_what_they_cannot_say(layer, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(
        mo.UnsupportedError, match=r"gate: expected F32, F16, BF16, E4M3 or INT4, got Q4_K"
    ):
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

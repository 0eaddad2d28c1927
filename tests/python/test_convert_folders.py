"""``moesaic convert`` from a checkpoint folder, in every form that opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from converting import (
    LAYERS,
    E,
    H,
    I,
    K,
    checkpoint,
    convert,
    encoded,
    expert_bytes,
    leftovers,
)
from files import write_checkpoint
from values import expert_weights, normal

import moesaic as mo
from moesaic.saving.convert import Types

gguf = pytest.importorskip("gguf")


def test_a_folder_becomes_moe_layers(tmp_path):
    folder = checkpoint(tmp_path)
    types = Types(experts="Q8_0", down="Q4_0")
    target = convert(folder, tmp_path / "target.gguf", types)
    x = normal(4, H)
    with mo.GgufFile(target) as file:
        assert file.moe_layers == list(LAYERS)
        assert file.metadata["moesaic.content"] == "moe_layers"
        assert file.metadata["general.architecture"] == "qwen2moe"
        assert not any("attn" in name for name in file.tensors)
        for layer in LAYERS:
            gate, up, down = expert_weights(E, H, I, seed=layer)
            for role, matrix, type in (
                ("gate", gate, "Q8_0"), ("up", up, "Q8_0"), ("down", down, "Q4_0"),
            ):  # fmt: skip
                data = expert_bytes(file, f"blk.{layer}.ffn_{role}_exps.weight")
                np.testing.assert_array_equal(data, encoded(matrix, type).reshape(-1))
            old = mo.MoeLayer.from_safetensors(folder, layer, precision="exact")
            new = mo.MoeLayer.from_gguf(file, layer, precision="exact")
            assert new.config == old.config.replace(architecture="qwen2moe")
            np.testing.assert_array_equal(new.router_weight, old.router_weight)
            difference = np.linalg.norm(new(x) - old(x)) / np.linalg.norm(old(x))
            assert 0 < difference < 0.1
            new.close()


def test_kept_types_are_equal_bit_by_bit(tmp_path):
    """Also the shared experts, which are no routed ones."""
    folder = checkpoint(tmp_path)
    target = convert(folder, tmp_path / "target.gguf", Types(experts="F32"), layers=[2])
    x = normal(4, H)
    with mo.GgufFile(target) as file:
        assert file.tensors["blk.2.ffn_up_shexp.weight"].quant == "F16"
        layer = mo.MoeLayer.from_gguf(file, 2, precision="exact")
        want = mo.MoeLayer.from_safetensors(folder, 2, precision="exact")(x)
        np.testing.assert_array_equal(layer(x), want)
        layer.close()


def test_other_tensors_of_a_folder(tmp_path):
    folder = checkpoint(tmp_path)
    target = convert(folder, tmp_path / "target.gguf", Types("Q8_0"), other="copy")
    with mo.GgufFile(target) as file:
        assert file.metadata["moesaic.content"] == "tensors"
        q = file.tensors["blk.2.attn_q.weight"]
        assert (q.quant, q.shape) == ("F32", (H, H))
        np.testing.assert_array_equal(q.data.view(np.float32), normal(H, H).reshape(-1))
        assert {"token_embd.weight", "output.weight"} <= file.tensors.keys()
        assert file.tensors["output_norm.weight"].quant == "F32"  # BF16 in the checkpoint
        mo.MoeLayer.from_gguf(file, 1).close()
    with pytest.raises(mo.ConfigError, match="layers: expected all"):
        convert(folder, tmp_path / "t.gguf", Types("Q8_0"), other="copy", layers=[1])
    with pytest.raises(mo.UnsupportedError, match=r"other: expected omit.*'gpt-oss'"):
        (tmp_path / "oss").mkdir()
        oss = folder_of("gpt_oss", tmp_path / "oss")
        convert(oss, tmp_path / "t.gguf", Types("Q8_0"), other="copy")


def test_a_tensor_without_a_name_is_not_left_out(tmp_path):
    folder = checkpoint(tmp_path, extra={"model.layers.1.novelty.weight": normal(4, 4)})
    with pytest.raises(mo.UnsupportedError, match=r"model\.layers\.1\.novelty\.weight"):
        convert(folder, tmp_path / "t.gguf", Types("Q8_0"), other="copy")
    convert(folder, tmp_path / "t.gguf", Types("Q8_0"))


def folder_of(name: str, folder: Path, width: int = I) -> Path:
    """Checkpoints in other layouts: fused and interleaved with biases; FP8; NVFP4; INT4."""
    rng = np.random.default_rng(7)
    experts, types = {}, {}
    base, config = "model.layers.0.mlp.experts", {}
    router = {"model.layers.0.mlp.gate.weight": normal(E, H)}
    if name == "gpt_oss":
        gate, up, down = expert_weights(E, H, width)
        both = np.stack([gate, up], axis=2).reshape(E, 2 * width, H)
        experts = {
            f"{base}.gate_up_proj": both.transpose(0, 2, 1),
            f"{base}.down_proj": down.transpose(0, 2, 1),
            f"{base}.gate_up_proj_bias": normal(E, 2 * width),
            f"{base}.down_proj_bias": normal(E, H),
        }
        router = {
            "model.layers.0.mlp.router.weight": normal(E, H),
            "model.layers.0.mlp.router.bias": normal(E),
        }
        config = {
            "model_type": "gpt_oss",
            "num_local_experts": E,
            "intermediate_size": width,
        }
    for e in range(E):
        for part, (n, k) in (
            ("gate_proj", (width, H)), ("up_proj", (width, H)), ("down_proj", (H, width)),
        ):  # fmt: skip
            one = f"{base}.{e}.{part}"
            if name == "fp8":
                experts[f"{one}.weight"] = rng.integers(0, 0x78, (n, k)).astype(np.uint8)
                experts[f"{one}.weight_scale_inv"] = np.full((1, 1), 0.01 + e, np.float32)
                types[f"{one}.weight"] = "F8_E4M3"
            if name == "nvfp4":
                experts[f"{one}.weight"] = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
                experts[f"{one}.weight_scale"] = rng.integers(40, 60, (n, k // 16)).astype(np.uint8)
                experts[f"{one}.weight_scale_2"] = np.array(0.25 * (e + 1), np.float32)
                types[f"{one}.weight_scale"] = "F8_E4M3"
            if name == "int4":
                words = rng.integers(0, 2**31, (k // 8, n)).astype(np.int32)
                experts[f"{one}.qweight"] = words
                experts[f"{one}.scales"] = (1 + rng.random((k // 32, n))).astype(np.float16)
                experts[f"{one}.qzeros"] = np.full((k // 32, n // 8), 0x77777777, np.int32)
    if name == "int4":
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        }  # fmt: skip
    base_config = {
        "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": width,
        "num_experts": E, "num_experts_per_tok": K, "num_hidden_layers": 1, "norm_topk_prob": True,
    }  # fmt: skip
    return write_checkpoint(folder, {**experts, **router}, {**base_config, **config}, types)


@pytest.mark.parametrize(
    ("name", "type"),
    [("gpt_oss", "F32"), ("fp8", "F32"), ("nvfp4", "F32"), ("nvfp4", "NVFP4"), ("int4", "F32"),
     ("int4", "Q4_0")],
)  # fmt: skip
def test_every_layout(tmp_path, name, type):
    # Rows of NVFP4 are multiples of 64 columns.
    folder = folder_of(name, tmp_path, 128 if name == "nvfp4" else I)
    target = convert(folder, tmp_path / "target.gguf", Types(experts=type))
    hidden = mo.MoeConfig.from_hf(folder).hidden_size
    x = normal(4, hidden)
    want = mo.MoeLayer.from_safetensors(folder, 0, "f32", precision="exact")
    with mo.GgufFile(target) as file:
        layer = mo.MoeLayer.from_gguf(file, 0, precision="exact")
        assert layer.stack.quants["down"] == type
        assert name != "gpt_oss" or "blk.0.ffn_up_exps.bias" in file.tensors
        assert (type == "NVFP4") == ("blk.0.ffn_up_exps.scale" in file.tensors)
        for role in ("gate", "up", "down"):
            for e in range(E):
                np.testing.assert_allclose(
                    layer.stack.dequantize(role, e), want.stack.dequantize(role, e), rtol=1e-6
                )
        np.testing.assert_allclose(layer(x), want(x), rtol=1e-4, atol=1e-4 * np.abs(want(x)).max())
        layer.close()


def test_factors_on_the_outputs_of_experts(tmp_path):
    """Gemma 4 keeps them beside its router; GGUF has them as scales of the down matrices."""
    factors = np.array([0.5, 1.7, -3], np.float32)
    gate, up, down = expert_weights(E, H, I)
    layer = "model.layers.0"
    tensors = {
        f"{layer}.router.proj.weight": normal(E, H),
        f"{layer}.router.scale": normal(H, seed=1),
        f"{layer}.router.per_expert_scale": factors,
        f"{layer}.pre_feedforward_layernorm_2.weight": normal(H, seed=2),
        f"{layer}.experts.gate_up_proj": np.concatenate([gate, up], axis=1),
        f"{layer}.experts.down_proj": down,
    }
    config = {
        "model_type": "gemma4_text", "hidden_size": H, "num_experts": E, "top_k_experts": K,
        "moe_intermediate_size": I, "num_hidden_layers": 1, "enable_moe_block": True,
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    folder = write_checkpoint(tmp_path, tensors, config)
    target = convert(folder, tmp_path / "t.gguf", Types("F32"))
    old = mo.MoeLayer.from_safetensors(folder, 0, precision="exact")
    with mo.GgufFile(target) as file:
        new = mo.MoeLayer.from_gguf(file, 0, precision="exact")
        np.testing.assert_array_equal(new.stack.scales["down"], factors)
        x = normal(3, H)
        np.testing.assert_array_equal(new(x), old(x))
        new.close()


def test_a_folder_that_gguf_cannot_say_is_refused(tmp_path):
    folder = checkpoint(tmp_path, norm_topk_prob=True)
    with pytest.raises(mo.UnsupportedError, match=r"router\.renormalize: expected True.*qwen2moe"):
        convert(folder, tmp_path / "target.gguf", Types("Q8_0"))
    assert leftovers(tmp_path) == [] and not (tmp_path / "target.gguf").exists()
    convert(folder, tmp_path / "target.gguf", Types("Q8_0"), architecture="qwen3next")

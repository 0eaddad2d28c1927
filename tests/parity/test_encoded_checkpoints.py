"""mt.from_pretrained: checkpoints that name a quantisation method of their own, as whole models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import MODELS, Model
from safetensors.torch import load_file, save_file
from test_hf_integers import GROUP, Ints
from test_quantizer import mxfp4
from whole import PROMPT, distance, logits_of, make_model

import moesaic as mo
import moesaic.transformers as mt

transformers.logging.disable_progress_bar()
BLOCK = 16
Tensors = dict[str, torch.Tensor]


def small(name: str = "qwen2_moe", **changes: Any) -> Any:
    """Its sizes fit the groups of integers."""
    case = next(case for case in MODELS if case.name == name)
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    sizes = {key: size for key, size in sizes.items() if key in case.changes}
    return make_model(Model(case.name, case.config, {**case.changes, **sizes, **changes}))


def is_encoded(name: str, values: torch.Tensor) -> bool:
    """What quantisers encode: products, but for routers, embeddings and the output."""
    kept = ("embed_tokens", "lm_head", ".gate.weight", "shared_expert_gate")
    return values.ndim == 2 and not any(part in name for part in kept)


def fp8(name: str, values: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Codes, and a power of two for each block: so BF16 has the values exactly."""
    rows, columns = values.shape
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    scales = torch.exp2(torch.randint(-8, -5, grid).float())
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    codes = (values / spread).clamp(-400, 400).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, codes.float() * spread


def gptq(name: str, values: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Other weights, of codes of 4 bits."""
    one = Ints(*values.shape, seed=len(name) + ord(name[-6]))
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in one.gptq(name).items()}
    return tensors, torch.from_numpy(one.values).float()


def awq(name: str, values: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Other weights, of codes of 4 bits with zero points, eight columns of the transpose a word."""
    one = Ints(*values.shape, seed=len(name) + ord(name[-6]), symmetric=False)
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in one.awq(name).items()}
    return tensors, torch.from_numpy(one.values).float()


METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
                  "activation_scheme": "dynamic"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False,
                    "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
                  "version": "gemm"}),
}  # fmt: skip


def name_method(folder: Path, method: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))


def write(folder: Path, method: str, model: Any) -> torch.Tensor:
    """The checkpoint of a model in an encoding, and the logits of what it decodes to."""
    encode, config = METHODS[method]
    torch.manual_seed(0)
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    stored, decoded = {}, {}
    for name, values in load_file(file).items():
        if is_encoded(name, values):
            tensors, decoded[name] = encode(name.removesuffix(".weight"), values.float())
            stored |= tensors
        else:
            stored[name] = decoded[name] = values
    save_file(decoded, file, {"format": "pt"})
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = logits_of(plain)
    save_file(stored, file, {"format": "pt"})
    name_method(folder, config)
    return want


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_logits(method, name, tmp_path):
    if method in ("gptq", "awq") and name == "deepseek_v3":
        pytest.skip("its projections of low rank have no whole groups")
    want = write(tmp_path, method, small(name))
    model = mt.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.dtype == torch.float32
    with mo.tuning(precision="exact"):
        assert distance(logits_of(model), want) < 1e-3
    assert not any("scale" in key or "qweight" in key for key in model.state_dict())
    out = model.generate(PROMPT[:, :6], max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 2


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_stay_encoded(method, tmp_path):
    write(tmp_path, method, small())
    model = mt.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.experts.stack.quants["down"] == "INT4"
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_encoded_anew(tmp_path):
    want = write(tmp_path, "fp8", small(hidden_size=256, moe_intermediate_size=256))
    model = mt.from_pretrained(tmp_path, dtype=torch.float32, gate_up="Q8_0", down="Q6_K")
    stack = model.model.layers[0].mlp.experts.stack
    assert stack.quants == {"gate": "Q8_0", "up": "Q8_0", "down": "Q6_K"}
    assert 1e-4 < distance(logits_of(model), want) < 0.1


def test_saved_and_loaded_again(tmp_path):
    write(tmp_path / "model", "fp8", small())
    model = mt.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    for load in (transformers.AutoModelForCausalLM.from_pretrained, mt.from_pretrained):
        again = load(tmp_path / "again", dtype=torch.float32)
        assert torch.equal(logits_of(again), logits_of(model))


def test_mxfp4_of_gpt_oss(tmp_path):
    model = small("gpt_oss", intermediate_size=32)
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith("_proj")}
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(layer.mlp.experts, name)
            blocks, scales, decoded = mxfp4(weights.detach().transpose(1, 2))
            key = f"model.layers.{i}.mlp.experts.{name}"
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            weights.data = decoded.transpose(1, 2)
    model.config.save_pretrained(tmp_path)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    name_method(tmp_path, {"quant_method": "mxfp4"})
    ours = mt.from_pretrained(tmp_path, dtype=torch.float32)
    assert ours.model.layers[0].mlp.experts.stack.quants["down"] == "MXFP4"
    with mo.tuning(precision="exact"):
        assert distance(logits_of(ours), logits_of(model)) < 1e-3


def test_a_checkpoint_without_a_method(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    ours = mt.from_pretrained(tmp_path, dtype=torch.float32)
    assert distance(logits_of(ours), logits_of(model)) < 1e-5


class TestRefusals:
    def test_a_matrix_of_another_shape(self, tmp_path):
        write(tmp_path, "fp8", small())
        (file,) = tmp_path.glob("*.safetensors")
        tensors = load_file(file)
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors[name] = tensors[name][:16].clone()
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][:1].clone()
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(mo.FormatError, match=r"q_proj\.weight: expected \[\d+, 32\]"):
            mt.from_pretrained(tmp_path, dtype=torch.float32)

    def test_scales_that_are_missing(self, tmp_path):
        write(tmp_path, "fp8", small())
        (file,) = tmp_path.glob("*.safetensors")
        tensors = load_file(file)
        del tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"]
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(mo.FormatError, match="weight_scale_inv"):
            mt.from_pretrained(tmp_path, dtype=torch.float32)

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            mt.from_pretrained(tmp_path / "nowhere")

"""Float experts from safetensors: fused or apart, either way round, under every name."""

import numpy as np
import pytest
from files import bf16_bits, write_safetensors
from hf_experts import BASE, LAYER, MIXTRAL, QWEN, E, H, I, check, per_expert, weights, write
from oracle import moe_f64, rel_l2, silu
from values import normal, random_routing

import moesaic as mo


@pytest.mark.parametrize("names", [QWEN, MIXTRAL])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_by_one(tmp_path, names, dtype):
    parts = [w.astype(dtype) for w in weights()]
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, per_expert(*parts, names)), LAYER)
    check(stack, [p.astype(np.float32) for p in parts])
    assert set(stack.quants.values()) == {"F32" if dtype is np.float32 else "F16"}
    assert "gate_proj" in str(stack.report) or "w1" in str(stack.report)
    x, routing = normal(4, H), random_routing(4, E, 2)
    want = moe_f64(x, routing.topk_ids, routing.topk_weights, *parts)
    assert rel_l2(mo.moe_forward_cpu(x, routing, stack), want) < 1e-5


def test_bf16_keeps_its_bits(tmp_path):
    tensors = {name: bf16_bits(w) for name, w in per_expert(*weights()).items()}
    parts = [(bf16_bits(w).astype(np.uint32) << 16).view(np.float32) for w in weights()]
    folder = write(tmp_path, tensors, types=dict.fromkeys(tensors, "BF16"))
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    check(stack, parts)
    assert set(stack.quants.values()) == {"BF16"}
    assert mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32").quants["up"] == "F32"


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "gpt_oss"])
def test_fused(tmp_path, suffix, transposed, model_type):
    """[E, 2I, H] or [E, H, 2I]; halves, or alternating as gpt-oss has them. With biases."""
    gate, up, down = weights()
    gate_bias, up_bias, down_bias = (normal(E, n, seed=i) for i, n in enumerate((I, I, H)))
    if model_type == "gpt_oss":
        both, bias = np.empty((E, 2 * I, H), np.float32), np.empty((E, 2 * I), np.float32)
        both[:, 0::2], both[:, 1::2] = gate, up
        bias[:, 0::2], bias[:, 1::2] = gate_bias, up_bias
    else:
        both = np.concatenate([gate, up], axis=1)
        bias = np.concatenate([gate_bias, up_bias], axis=1)
    stored = [both, down]
    if transposed:
        stored = [m.transpose(0, 2, 1) for m in stored]
    bias_name = "_bias" if suffix == "" else ".bias"
    tensors = {
        f"{BASE}.gate_up_proj{suffix}": stored[0], f"{BASE}.gate_up_proj{bias_name}": bias,
        f"{BASE}.down_proj{suffix}": stored[1], f"{BASE}.down_proj{bias_name}": down_bias,
    }  # fmt: skip
    folder = write(tmp_path, tensors, model_type)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    check(stack, (gate, up, down))
    x = normal(E, H, seed=7)
    ids = np.arange(E, dtype=np.int32)[:, None]
    np.testing.assert_allclose(
        stack.gemv_gate(x, ids)[:, 0],
        [gate[e] @ x[e] + gate_bias[e] for e in range(E)],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    got = mo.moe_forward_cpu(x, mo.Routing(ids, np.ones((E, 1), np.float32)), stack)
    want = [
        down[e] @ (silu(gate[e] @ x[e] + gate_bias[e]) * (up[e] @ x[e] + up_bias[e])) + down_bias[e]
        for e in range(E)
    ]
    assert rel_l2(got, want) < 1e-5
    (folder / "config.json").unlink()
    with pytest.raises(mo.FormatError, match=r"gate_up_proj.*config\.json"):
        mo.ExpertStack.load_from_safetensors(folder, LAYER)


def test_granite_names(tmp_path):
    gate, up, down = weights()
    block = f"model.layers.{LAYER}.block_sparse_moe"
    tensors = {
        f"{block}.input_linear.weight": np.concatenate([gate, up], axis=1),
        f"{block}.output_linear.weight": down,
        f"model.layers.{LAYER}.shared_mlp.input_linear.weight": np.zeros((4, H), np.float32),
    }
    check(
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, "granitemoe"), LAYER),
        (gate, up, down),
    )


def test_ungated(tmp_path):
    _, up, down = weights()
    tensors = {name: w for name, w in per_expert(up, up, down).items() if "gate_proj" not in name}
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)
    assert not stack.gated
    np.testing.assert_array_equal(stack.dequantize("up", 1), up[1])


def test_drafting_layers_are_others(tmp_path):
    """Qwen3-Next counts the layers of its drafter anew, from 0."""
    parts = weights()
    other = per_expert(*weights(9), base=f"mtp.layers.{LAYER}.mlp.experts")
    stack = mo.ExpertStack.load_from_safetensors(
        write(tmp_path, per_expert(*parts) | other, "qwen3_next"), LAYER
    )
    check(stack, parts)


def test_factors_on_outputs_belong_to_the_stack(tmp_path):
    """Gemma 4 keeps them beside its router; without a configuration, too."""
    factors = np.array([0.5, 1.7, -3], np.float32)
    block = f"model.layers.{LAYER}"
    tensors = per_expert(*weights(), base=f"{block}.experts")
    tensors[f"{block}.router.per_expert_scale"] = factors
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors)
    stack = mo.ExpertStack.load_from_safetensors(path, LAYER)
    for expert, factor in enumerate(factors):
        for role, want in zip(("gate", "up", "down"), weights(), strict=True):
            scale = factor if role == "down" else 1
            got = stack.dequantize(role, expert)
            np.testing.assert_allclose(got, want[expert] * scale, rtol=1e-7)
    tensors[f"{block}.router.per_expert_scale"] = factors[:2]
    write_safetensors(path, tensors)
    with pytest.raises(
        mo.FormatError, match=r"per_expert_scale' shape: expected \[\d\], got \[2\]"
    ):
        mo.ExpertStack.load_from_safetensors(path, LAYER)
    del tensors[f"{block}.router.per_expert_scale"]
    (tmp_path / "without").mkdir()
    folder = write(tmp_path / "without", tensors, "gemma4_text")
    with pytest.raises(mo.FormatError, match=r"per_expert_scale'.*no such tensor"):
        mo.ExpertStack.load_from_safetensors(folder, LAYER)

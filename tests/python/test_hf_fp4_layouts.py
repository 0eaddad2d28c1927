"""FP4 experts stacked in one tensor, transposed, beside floats, and FP8 routers."""

import numpy as np
import pytest
from files import write_checkpoint
from hf_experts import BASE, LAYER, QWEN, E, H, I, codes, e4m3, fp4, write
from oracle import rel_l2
from values import expert_weights, normal

import moesaic as mo


def nvfp4(n, k, seed):
    """Packed codes, codes of scales, and values without the factor of the matrix."""
    packed, plain = fp4(n, k, seed)
    scale = np.random.default_rng(seed).integers(0x20, 0x40, (n, k // 16)).astype(np.uint8)
    return packed, scale, plain * np.repeat(e4m3(scale), 16, 1)


def products(stack, gate, up, down):
    """The relative error of each role's products, which have the factor of the matrix."""
    ids = np.arange(E, dtype=np.int32)[:, None]
    for product, role, width in (
        (stack.gemv_gate, gate, H), (stack.gemv_up, up, H), (stack.gemv_down, down, I),
    ):  # fmt: skip
        x = normal(E, width)
        got = product(x, ids, precision="exact")
        want = np.stack([role[e] @ x[e] for e in range(E)])
        assert rel_l2(np.asarray(got).reshape(want.shape), want) < 1e-4


# Names of codes, scales and factor; the shape of the factors; whether all is transposed.
STACKED = {
    "modelopt": ("", "_weight_scale", "_weight_scale_2", (E,), False),
    "modelopt, transposed": ("", "_weight_scale", "_weight_scale_2", (E,), True),
    "names of a module": (".weight", ".weight_scale", ".weight_scale_2", (E, 1, 1), False),
    "one factor for all": (".weight", ".weight_scale", ".weight_scale_2", (), False),
    "compressed-tensors": (
        ".weight_packed", ".weight_scale", ".weight_global_scale", (E, 1), False,
    ),
    "llm-compressor": ("_packed", "_scale", "_global_scale", (E,), False),
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("case", STACKED)
def test_nvfp4_in_one_tensor(tmp_path, case, model_type):
    packed_name, scale_name, factor_name, shape, transposed = STACKED[case]
    tensors, types, values = {}, {}, {}
    for part, (n, k) in {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}.items():
        each = [nvfp4(n, k, e + n) for e in range(E)]
        packed, scale, real = (np.stack([one[i] for one in each]) for i in range(3))
        factors = np.float32(2.0) ** -(3 + np.arange(E)) if shape else np.full(E, 0.25)
        values[part] = real * factors[:, None, None]
        turn = (lambda t: np.moveaxis(t, 1, 2)) if transposed else (lambda t: t)
        tensors[f"{BASE}.{part}{packed_name}"] = turn(packed)
        tensors[f"{BASE}.{part}{scale_name}"] = turn(scale)
        types[f"{BASE}.{part}{scale_name}"] = "F8_E4M3"
        stored = 1 / factors if "global" in factor_name else factors
        stored = (stored if shape else stored[:1]).astype(np.float32).reshape(shape)
        tensors[f"{BASE}.{part}{factor_name}"] = stored
    folder = write(tmp_path, tensors, model_type, types, num_local_experts=E)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    assert set(stack.quants.values()) == {"NVFP4"}
    gate_up = values["gate_up_proj"]
    if model_type == "gpt_oss":
        products(stack, gate_up[:, 0::2], gate_up[:, 1::2], values["down_proj"])
    else:
        products(stack, gate_up[:, :I], gate_up[:, I:], values["down_proj"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", ["mxfp4", "nvfp4", "fp8"])
def test_an_expert_left_in_floats(tmp_path, form, dtype):
    tensors, types, values = {}, {}, []
    for name, (n, k) in zip(QWEN, ((I, H), (I, H), (H, I)), strict=True):
        role = []
        for e in range(E):
            base, seed = f"{BASE}.{e}.{name}", e + n
            if e == 1:
                tensors[f"{base}.weight"] = normal(n, k, seed=seed).astype(dtype)
                role.append(tensors[f"{base}.weight"].astype(np.float64))
            elif form == "nvfp4":
                packed, scale, real = nvfp4(n, k, seed)
                tensors |= {f"{base}.weight": packed, f"{base}.weight_scale": scale}
                tensors[f"{base}.weight_scale_2"] = np.array(0.125, np.float32)
                types[f"{base}.weight_scale"] = "F8_E4M3"
                role.append(real * 0.125)
            elif form == "mxfp4":
                packed, plain = fp4(n, k, seed)
                scale = np.random.default_rng(seed).integers(120, 130, (n, k // 32))
                tensors |= {f"{base}.weight_packed": packed}
                tensors[f"{base}.weight_scale"] = scale.astype(np.uint8)
                role.append(plain * np.repeat(2.0 ** (scale - 127), 32, 1))
            else:
                data = codes((n, k), seed)
                tensors |= {f"{base}.weight": data, f"{base}.weight_scale": np.float32(0.25)}
                types[f"{base}.weight"] = "F8_E4M3"
                role.append(e4m3(data) * 0.25)
        values.append(role)
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    assert set(stack.quants.values()) == {"F32"}
    products(stack, *values)


def test_a_divisor_that_is_a_factor(tmp_path):
    """compressed-tensors divides by 448 * 6 over the largest weight, never a number below 1."""
    tensors, types = {}, {}
    for name, (n, k) in zip(QWEN, ((I, H), (I, H), (H, I)), strict=True):
        for e in range(E):
            base = f"{BASE}.{e}.{name}"
            packed, scale, _ = nvfp4(n, k, e)
            tensors |= {f"{base}.weight_packed": packed, f"{base}.weight_scale": scale}
            tensors[f"{base}.weight_global_scale"] = np.array([1 / 64], np.float32)
            types[f"{base}.weight_scale"] = "F8_E4M3"
    with pytest.raises(mo.FormatError, match=r"weight_global_scale.*divisor"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


@pytest.mark.parametrize("grid", ["tensor", "rows", "blocks"])
def test_fp8_router_and_shared_gate(tmp_path, grid):
    count, rng = 8, np.random.default_rng(0)
    block = f"model.layers.{LAYER}.mlp"
    tensors, types, real = {}, {}, {}
    for name, (n, k) in {"gate": (count, H), "shared_expert_gate": (1, H)}.items():
        data = codes((n, k), n)
        shape = {"tensor": (), "rows": (n, 1), "blocks": (1, -(-k // 64))}[grid]
        scale = rng.uniform(0.001, 0.01, shape).astype(np.float32)
        spread = np.repeat(scale, 64, 1)[:, :k] if grid == "blocks" else scale
        tensors |= {f"{block}.{name}.weight": data, f"{block}.{name}.weight_scale_inv": scale}
        types[f"{block}.{name}.weight"] = "F8_E4M3"
        real[name] = e4m3(data) * spread.astype(np.float64)
    for expert in [f"experts.{e}" for e in range(count)] + ["shared_expert"]:
        for part, (n, k) in zip(QWEN, ((I, H), (I, H), (H, I)), strict=True):
            tensors[f"{block}.{expert}.{part}.weight"] = normal(n, k)
    config = {
        "model_type": "qwen2_moe", "hidden_size": H, "num_experts": count, "hidden_act": "silu",
        "num_experts_per_tok": 2, "moe_intermediate_size": I, "num_hidden_layers": LAYER + 1,
        "shared_expert_intermediate_size": I, "norm_topk_prob": False,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]},
    }  # fmt: skip
    layer = mo.MoeLayer.from_safetensors(write_checkpoint(tmp_path, tensors, config, types), LAYER)
    np.testing.assert_allclose(layer.router_weight, real["gate"], rtol=1e-6)
    x = normal(3, H)
    plain = dict(tensors)
    for name, values in real.items():
        plain[f"{block}.{name}.weight"] = values.astype(np.float32)
        del plain[f"{block}.{name}.weight_scale_inv"]
    same = mo.MoeLayer.from_safetensors(write_checkpoint(tmp_path, plain, config), LAYER)
    np.testing.assert_allclose(layer(x), same(x), rtol=1e-4, atol=1e-3)


def test_stacks_of_other_floats(tmp_path):
    """F64 becomes F32, and of two types of floats F32 holds both."""
    gate, up, down = expert_weights(E, H, I)
    tensors = {}
    for name, matrices in zip(QWEN, (gate, up, down), strict=True):
        for e, dtype in enumerate((np.float64, np.float32, np.float16)):
            tensors[f"{BASE}.{e}.{name}.weight"] = matrices[e].astype(dtype)
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)
    assert set(stack.quants.values()) == {"F32"}
    for role, name in zip(("gate", "up", "down"), QWEN, strict=True):
        for e in range(E):
            want = tensors[f"{BASE}.{e}.{name}.weight"].astype(np.float32)
            np.testing.assert_array_equal(stack.dequantize(role, e), want)


@pytest.mark.parametrize("inter", [80, 112])
def test_nvfp4_of_columns_that_blocks_of_64_do_not_hold(tmp_path, inter):
    """BF16 holds the products of codes and scales, so nothing is rounded."""
    tensors, types, want = {}, {}, {}
    for part, (n, k) in {"gate": (inter, H), "up": (inter, H), "down": (H, inter)}.items():
        want[part] = []
        for e in range(E):
            base = f"{BASE}.{e}.{part}_proj"
            packed, scale, real = nvfp4(n, k, n + e)
            factor = np.float32(0.011 * (e + 1))
            tensors |= {
                f"{base}.weight": packed, f"{base}.weight_scale": scale,
                f"{base}.weight_scale_2": factor,
            }  # fmt: skip
            types[f"{base}.weight_scale"] = "F8_E4M3"
            want[part].append((real.astype(np.float32) * factor).astype(np.float32))
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    assert stack.quants == {"gate": "NVFP4", "up": "NVFP4", "down": "BF16"}
    for part, matrices in want.items():
        for e in range(E):
            np.testing.assert_array_equal(stack.dequantize(part, e), matrices[e])

"""FP4 experts from safetensors: MXFP4 and NVFP4 in the forms of those who write them."""

import numpy as np
import pytest
from hf_experts import (
    BASE,
    LAYER,
    MIXTRAL,
    QWEN,
    E,
    H,
    I,
    check,
    codes,
    e4m3,
    e8m0_scales,
    fp4,
    write,
)
from oracle import rel_l2
from values import normal

import moesaic as mo


def test_gpt_oss_mxfp4(tmp_path):
    """Blocks of 16 bytes, rows of gate and up alternating: bit for bit in GGUF's order."""
    values, tensors = {}, {}
    for part, (n, k) in {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}.items():
        blocks, scales, real = [], [], []
        for e in range(E):
            packed, plain = fp4(n, k, e + n)
            scale, power = e8m0_scales((n, k // 32), e)
            blocks.append(packed.reshape(n, k // 32, 16))
            scales.append(scale)
            real.append(plain * np.repeat(power, 32, 1))
        tensors[f"{BASE}.{part}_blocks"] = np.stack(blocks)
        tensors[f"{BASE}.{part}_scales"] = np.stack(scales)
        tensors[f"{BASE}.{part}_bias"] = np.zeros((E, n), np.float32)
        values[part] = np.stack(real)
    folder = write(tmp_path, tensors, "gpt_oss", num_local_experts=E)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    assert set(stack.quants.values()) == {"MXFP4"}
    gate_up = values["gate_up_proj"]
    check(stack, (gate_up[:, 0::2], gate_up[:, 1::2], values["down_proj"]))
    tensors[f"{BASE}.down_proj_scales"][1, 3, 0] = 255
    write(tmp_path, tensors, "gpt_oss")
    with pytest.raises(mo.FormatError, match=r"down_proj_scales.*255"):
        mo.ExpertStack.load_from_safetensors(folder, LAYER)


@pytest.mark.parametrize("form", ["deepseek_v4", "compressed_tensors"])
def test_mxfp4_one_by_one(tmp_path, form):
    tensors, types, values = {}, {}, []
    names = MIXTRAL if form == "deepseek_v4" else QWEN
    base = BASE.replace("mlp", "ffn") if form == "deepseek_v4" else BASE
    for name, (n, k) in zip(names, ((I, H), (I, H), (H, I)), strict=True):
        role = []
        for e in range(E):
            packed, plain = fp4(n, k, e + n)
            scale, power = e8m0_scales((n, k // 32), e)
            start = f"{base}.{e}.{name}"
            if form == "deepseek_v4":
                tensors |= {f"{start}.weight": packed.view(np.int8), f"{start}.scale": scale}
                types[f"{start}.scale"] = "F8_E8M0"
            else:
                tensors |= {f"{start}.weight_packed": packed, f"{start}.weight_scale": scale}
            role.append(plain * np.repeat(power, 32, 1))
        values.append(role)
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    assert set(stack.quants.values()) == {"MXFP4"}
    check(stack, values)


@pytest.mark.parametrize("form", ["modelopt", "compressed_tensors"])
def test_nvfp4(tmp_path, form):
    """The scale of the matrix multiplies in one form and divides in the other."""
    tensors, types, values = {}, {}, []
    for name, (n, k) in zip(QWEN, ((I, H), (I, H), (H, I)), strict=True):
        role = []
        for e in range(E):
            packed, plain = fp4(n, k, e + n)
            scale = codes((n, k // 16), e) & 0x7F
            factor = np.float32(2.0 ** -(e + 3))
            start = f"{BASE}.{e}.{name}"
            if form == "modelopt":
                tensors |= {f"{start}.weight": packed, f"{start}.weight_scale_2": factor}
                tensors[f"{start}.input_scale"] = np.float32(3)  # of activations: not ours
            else:
                tensors |= {f"{start}.weight_packed": packed}
                tensors[f"{start}.weight_global_scale"] = np.array([1 / factor], np.float32)
            tensors[f"{start}.weight_scale"] = scale
            types[f"{start}.weight_scale"] = "F8_E4M3"
            role.append(plain * np.repeat(e4m3(scale), 16, 1) * factor)
        values.append(role)
    folder = write(tmp_path, tensors, types=types)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    assert set(stack.quants.values()) == {"NVFP4"}
    x = normal(E, H)
    ids = np.arange(E, dtype=np.int32)[:, None]
    for product, role in ((stack.gemv_gate, values[0]), (stack.gemv_up, values[1])):
        want = [role[e] @ x[e] for e in range(E)]
        assert rel_l2(product(x, ids, precision="exact")[:, 0], want) < 1e-4
    bad = next(name for name in tensors if name.endswith("1.up_proj.weight_scale"))
    tensors[bad][0, 0] = 0x80
    with pytest.raises(mo.FormatError, match=bad.replace(".", r"\.")):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)

"""Experts from safetensors in each form: floats, FP8, FP4; fused, apart, either way round."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import rel_l2, silu

import moesaic as mo
from moesaic import _core

writer = pytest.importorskip("safetensors.numpy")

E, H, I, LAYER = 3, 128, 192, 2
BASE = f"model.layers.{LAYER}.mlp.experts"
QWEN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((E, I, H), (E, I, H), (E, H, I))
    return [rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5 for shape in shapes]


def bf16(values):
    """Rounded to BF16 by dropping bits: values that a BF16 file can hold."""
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def write(folder, tensors, model_type="qwen3_moe", types=None, **config):
    """A file and its config; ``types`` names dtypes that numpy has no name for."""
    writer.save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()},
        folder / "model.safetensors",
    )
    retype(folder / "model.safetensors", types or {})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    return folder


def retype(path, types):
    """Changes dtypes in the header; the bytes stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, dtype in types.items():
        header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def check(stack, want, exact=True):
    """The three roles of every expert, and a forward."""
    tolerance = {"rtol": 0, "atol": 0} if exact is True else {"rtol": exact, "atol": 1e-9}
    for role, matrices in zip(("gate", "up", "down"), want, strict=True):
        for e in range(E):
            np.testing.assert_allclose(stack.dequantize(role, e), matrices[e], **tolerance)


def per_expert(gate, up, down, names=QWEN, base=BASE):
    return {
        f"{base}.{e}.{name}.weight": matrix[e]
        for name, matrix in zip(names, (gate, up, down), strict=True)
        for e in range(E)
    }


# --- floats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [QWEN, MIXTRAL])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_by_one(tmp_path, names, dtype):
    parts = [w.astype(dtype) for w in weights()]
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, per_expert(*parts, names)), LAYER)
    check(stack, [p.astype(np.float32) for p in parts])
    assert set(stack.quants.values()) == {"F32" if dtype is np.float32 else "F16"}
    assert "gate_proj" in str(stack.report) or "w1" in str(stack.report)
    x = np.random.default_rng(1).standard_normal((4, H)).astype(np.float32)
    ids = np.array([[0, 2], [1, 0], [2, 1], [1, 2]], np.int32)
    got = mo.moe_forward_cpu(x, mo.Routing(ids, np.full((4, 2), 0.5, np.float32)), stack)
    gate, up, down = (p.astype(np.float64) for p in parts)
    want = [
        sum(0.5 * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])) for e in ids[t])
        for t in range(4)
    ]
    assert rel_l2(got, want) < 1e-5


def test_bf16_keeps_its_bits(tmp_path):
    parts = [bf16(w) for w in weights()]
    tensors = {
        name: (w.view(np.uint32) >> 16).astype(np.uint16) for name, w in per_expert(*parts).items()
    }
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
    rng = np.random.default_rng(7)
    gate_bias, up_bias, down_bias = (
        rng.standard_normal((E, n)).astype(np.float32) for n in (I, I, H)
    )
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
    x = rng.standard_normal((3, H)).astype(np.float32)
    ids = np.array([[0], [1], [2]], np.int32)
    np.testing.assert_allclose(
        stack.gemv_gate(x, ids)[:, 0],
        [gate[e] @ x[e] + gate_bias[e] for e in range(E)],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    got = mo.moe_forward_cpu(x, mo.Routing(ids, np.ones((3, 1), np.float32)), stack)
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


# --- FP8 --------------------------------------------------------------------------------------


def e4m3(codes):
    """By a formula of its own: sign, 4 bits of exponent, 3 of mantissa."""
    out = np.empty(codes.shape)
    for at, code in np.ndenumerate(codes):
        exponent, mantissa = int(code) >> 3 & 15, int(code) & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        out[at] = -size if code & 0x80 else size
    return out


def codes(shape, seed):
    drawn = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    drawn[(drawn & 0x7F) == 0x7F] = 0
    return drawn


def fp8_experts(block, scale_of, suffix, shape_of=None, hidden=160, inter=72):
    """Tensors and true values; sizes with ragged last blocks."""
    tensors, values, types = {}, [], {}
    for name, (n, k) in zip(QWEN, ((inter, hidden), (inter, hidden), (hidden, inter)), strict=True):
        role = []
        for e in range(E):
            data = codes((n, k), e + n)
            rows, cols = (b or size for b, size in zip(block, (n, k), strict=True))
            grid = (-(-n // rows), -(-k // cols))
            scales, real = scale_of(grid, e)
            base = f"{BASE}.{e}.{name}"
            tensors[f"{base}.weight"] = data
            tensors[f"{base}.{suffix}"] = scales if shape_of is None else scales.reshape(shape_of)
            types[f"{base}.weight"] = "F8_E4M3"
            spread = np.repeat(np.repeat(real, rows, 0), cols, 1)[:n, :k]
            role.append(e4m3(data) * spread)
        values.append(role)
    return tensors, values, types


def f32_scales(grid, e):
    scales = np.random.default_rng(e).uniform(1e-4, 2e-3, grid).astype(np.float32)
    return scales, scales.astype(np.float64)


def e8m0_scales(grid, e):
    scales = np.random.default_rng(e).integers(100, 130, grid).astype(np.uint8)
    return scales, 2.0 ** (scales.astype(np.float64) - 127)


@pytest.mark.parametrize(
    ("block", "suffix", "shape", "config"),
    [
        ((128, 128), "weight_scale_inv", None, None),
        ((64, 32), "weight_scale_inv", None, [64, 32]),
        ((1, 0), "weight_scale", None, None),
        ((0, 0), "weight_scale", (), None),
    ],
    ids=["blocks", "other blocks", "rows", "tensor"],
)
def test_fp8(tmp_path, block, suffix, shape, config):
    tensors, values, types = fp8_experts(block, f32_scales, suffix, shape)
    quantization = {"quant_method": "fp8", "weight_block_size": config}
    folder = write(tmp_path, tensors, types=types, quantization_config=quantization)
    rounded = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    assert set(rounded.quants.values()) == {"BF16"}
    assert "F8_E4M3" in str(rounded.report)
    check(rounded, values, exact=2.0**-8)
    exact = mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32")
    check(exact, values, exact=2.0**-23)


def test_mxfp8_is_exact_in_bf16(tmp_path):
    tensors, values, types = fp8_experts((1, 32), e8m0_scales, "weight_scale_inv")
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    assert set(stack.quants.values()) == {"BF16"}
    check(stack, values)


def test_power_of_two_blocks(tmp_path):
    tensors, values, types = fp8_experts((128, 128), e8m0_scales, "scale")
    types |= {name: "F8_E8M0" for name in tensors if name.endswith(".scale")}
    check(
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER), values
    )


# --- FP4 --------------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp4(n, k, seed):
    """Packed neighbours [n, k/2] and their values without scales [n, k]."""
    nibbles = np.random.default_rng(seed).integers(0, 16, (n, k)).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, E2M1[nibbles]


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
    x = np.random.default_rng(3).standard_normal((E, H)).astype(np.float32)
    ids = np.arange(E, dtype=np.int32)[:, None]
    for product, role in ((stack.gemv_gate, values[0]), (stack.gemv_up, values[1])):
        want = [role[e] @ x[e] for e in range(E)]
        assert rel_l2(product(x, ids, precision="exact")[:, 0], want) < 1e-4
    bad = next(name for name in tensors if name.endswith("1.up_proj.weight_scale"))
    tensors[bad][0, 0] = 0x80
    with pytest.raises(mo.FormatError, match=bad.replace(".", r"\.")):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


# --- what is wrong with bad ones --------------------------------------------------------------


def fused_tensors():
    gate, up, down = weights()
    return {
        f"{BASE}.gate_up_proj": np.concatenate([gate, up], axis=1),
        f"{BASE}.down_proj": down,
    }


def fp8_tensors():
    tensors, _, types = fp8_experts((128, 128), f32_scales, "weight_scale_inv")
    return tensors, types


ONE = f"{BASE}.1.up_proj"
BAD_FLOATS = {
    "missing": (f"{ONE}.weight", None),
    "rows": (f"{ONE}.weight", lambda w: w[:-1]),
    "columns": (f"{ONE}.weight", lambda w: w[:, :-1]),
    "rank": (f"{ONE}.weight", lambda w: w[None]),
    "empty": (f"{ONE}.weight", lambda w: w[:0]),
    "dtype": (f"{ONE}.weight", lambda w: w.astype(np.float64)),
    "integers": (f"{ONE}.weight", lambda w: w.astype(np.int32)),
    "another type": (f"{ONE}.weight", lambda w: w.astype(np.float16)),
    "bias": (f"{ONE}.bias", lambda w: np.zeros(I + 1, np.float32)),
}


@pytest.mark.parametrize("case", BAD_FLOATS)
def test_bad_floats_are_named(tmp_path, case):
    name, change = BAD_FLOATS[case]
    tensors = per_expert(*weights())
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    with pytest.raises(mo.FormatError, match=name.replace(".", r"\.")):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


def test_all_down_matrices_missing(tmp_path):
    tensors = {n: w for n, w in per_expert(*weights()).items() if "down_proj" not in n}
    with pytest.raises(mo.FormatError, match="down"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


def test_bias_of_some_experts_only(tmp_path):
    tensors = per_expert(*weights()) | {f"{ONE}.bias": np.zeros(I, np.float32)}
    with pytest.raises(mo.ShapeError, match="up bias"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("gate_up_proj", lambda w: w[:-1]),
        ("gate_up_proj", lambda w: w[:, :-1]),
        ("gate_up_proj", lambda w: w[:, :, :-1]),
        ("gate_up_proj", lambda w: w[0]),
        ("gate_up_proj", lambda w: w[:0]),
        ("down_proj", lambda w: w[:-1]),
        ("down_proj", lambda w: w.transpose(0, 2, 1)),
    ],
)
def test_bad_fused_shapes(tmp_path, part, change):
    tensors = fused_tensors()
    tensors[f"{BASE}.{part}"] = change(tensors[f"{BASE}.{part}"])
    with pytest.raises(mo.FormatError, match=r"gate_up_proj|down_proj"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


def test_fused_and_apart_at_once(tmp_path):
    with pytest.raises(mo.FormatError, match="one set of experts"):
        mo.ExpertStack.load_from_safetensors(
            write(tmp_path, fused_tensors() | per_expert(*weights())), LAYER
        )
    tensors = per_expert(*weights())
    tensors[f"{BASE}.0.gate_up_proj.weight"] = np.zeros((2 * I, H), np.float32)
    with pytest.raises(mo.FormatError, match="either fused or apart"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("weight_scale_inv", None),
        ("weight_scale_inv", lambda s: s[:, :-1]),
        ("weight_scale_inv", lambda s: np.concatenate([s, s])),
        ("weight_scale_inv", lambda s: s.astype(np.int32)),
        ("weight_scale_inv", lambda s: s * np.float32(np.nan)),
        ("weight_scale_inv", lambda s: s * np.float32(np.inf)),
        ("weight", lambda w: w | 0x7F),
    ],
)
def test_bad_fp8_is_named(tmp_path, tensor, change):
    tensors, types = fp8_tensors()
    name = f"{ONE}.{tensor}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    with pytest.raises(mo.FormatError, match=name.replace(".", r"\.")):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


def test_unknown_float8(tmp_path):
    tensors, types = fp8_tensors()
    types[f"{ONE}.weight"] = "F8_E5M2"
    with pytest.raises(mo.FormatError, match=r"1\.up_proj\.weight.*F8_E5M2"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


def test_rows_that_are_no_whole_blocks(tmp_path):
    """MXFP4 of gpt-oss says 32 columns in 16 bytes."""
    tensors = {
        f"{BASE}.gate_up_proj_blocks": np.zeros((E, 2 * I, 4, 15), np.uint8),
        f"{BASE}.gate_up_proj_scales": np.zeros((E, 2 * I, 4), np.uint8),
        f"{BASE}.down_proj_blocks": np.zeros((E, H, 2, 16), np.uint8),
        f"{BASE}.down_proj_scales": np.zeros((E, H, 2), np.uint8),
    }
    with pytest.raises(mo.FormatError, match="gate_up_proj_blocks"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, "gpt_oss"), LAYER)


def test_progress_counts_bytes(tmp_path):
    folder, seen = write(tmp_path, per_expert(*weights())), []
    mo.ExpertStack.load_from_safetensors(folder, LAYER, progress=seen.append)
    reading = [p for p in seen if "experts" in p.what]
    assert len(reading) == 3 * E
    assert [p.done_bytes for p in reading] == [i * I * H * 4 for i in range(1, 3 * E + 1)]
    assert reading[-1].done_bytes == reading[-1].total_bytes
    with pytest.raises(mo.OperationCancelled):
        mo.ExpertStack.load_from_safetensors(folder, LAYER, progress=lambda p: False)


MEASURE = """
import sys
import moesaic as mo
from moesaic import _core
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
with mo.tuning(threads=1):
    mo.ExpertStack.load_from_safetensors(sys.argv[2], 0)   # code, buffers, imports
    before = peak()
    stack = mo.ExpertStack.load_from_safetensors(sys.argv[1], 0)
print((peak() - before) / stack.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_at_load(tmp_path):
    """Beside its result a load holds one role, while that is repacked, and one expert."""

    def save(folder, experts, hidden, inter):
        folder.mkdir()
        base = "model.layers.0.mlp.experts"
        tensors = {
            f"{base}.gate_up_proj": np.ones((experts, 2 * inter, hidden), np.float16),
            f"{base}.down_proj": np.ones((experts, hidden, inter), np.float16),
        }
        return write(folder, tensors, "qwen3_5_moe_text")

    large = save(tmp_path / "large", 16, 1024, 512)
    small = save(tmp_path / "small", 2, 64, 32)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), str(small)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert float(out) < 1.4


def test_builder():
    """What the loaders rely on: whole matrices, each once."""
    up, down = ("F32", "here", "read", ""), ("F16", "here", "read", "")
    builder = _core.StackBuilder(2, 4, 3, gate=None, up=up, down=down)
    rows = np.zeros((3, 16), np.uint8)
    builder.add("up", 0, rows)
    for call, match in (
        (("up", 0, rows), "up of expert 0.*again"),
        (("up", 2, rows), "expert 2"),
        (("up", 1, rows[:-1]), "48 bytes.*32"),
        (("gate", 0, rows), "gate"),
        (("up", 1, rows, 1.0, np.zeros(2, np.float32)), "bias.*3 values.*2"),
    ):
        with pytest.raises(mo.ShapeError, match=match):
            builder.add(*call)
    with pytest.raises(mo.ConfigError, match="role"):
        builder.add("other", 0, rows)
    with pytest.raises(mo.ConfigError, match="Q9_9"):
        _core.StackBuilder(1, 4, 3, gate=None, up=("Q9_9", "", "", ""), down=down)
    with pytest.raises(mo.ShapeError, match="32"):
        _core.StackBuilder(1, 4, 3, gate=None, up=("Q8_0", "", "", ""), down=down)
    with pytest.raises(mo.ShapeError, match="shape"):
        _core.StackBuilder(0, 4, 3, gate=None, up=up, down=down)

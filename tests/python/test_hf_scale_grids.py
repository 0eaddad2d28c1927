"""FP8 and INT8 experts: what each scale is for, in every arrangement that tools write."""

import numpy as np
import pytest
from hf_experts import BASE, LAYER, E, check, codes, write
from hf_experts import e4m3 as e4m3_of_each

import moesaic as mo
from moesaic.safetensors.scale_grid import find_grid

H, I = 256, 192
E4M3 = e4m3_of_each(np.arange(256))
SIZES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


def e4m3(data):
    return E4M3[data]


def scale_values(grid, seed):
    return np.random.default_rng(seed).uniform(1e-4, 2e-3, grid).astype(np.float32)


def spread(scales, rows, cols, n, k):
    return np.repeat(np.repeat(scales.astype(np.float64), rows, 0), cols, 1)[:n, :k]


def groups(**weights):
    """A configuration of compressed-tensors."""
    scheme = {"num_bits": 8, "type": "float", **weights}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": scheme, "targets": ["Linear"]}},
    }


def as_bf16(values):
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def blocks_of(rows, cols):
    return {"quant_method": "fp8", "weight_block_size": [rows, cols]}


# rows and columns of a scale (0: all), how the grid is stored, configuration.
APART = {
    "tensor, no dimension": ((0, 0), lambda s: s.reshape(()), None),
    "tensor [1]": ((0, 0), lambda s: s.reshape(1), None),
    "tensor [1, 1]": ((0, 0), lambda s: s, None),
    "tensor, block configured": ((0, 0), lambda s: s, blocks_of(128, 128)),
    "channels [n, 1]": ((1, 0), lambda s: s, groups(strategy="channel")),
    "channels [n]": ((1, 0), lambda s: s.reshape(-1), None),
    "blocks, nothing configured": ((128, 128), lambda s: s, None),
    "blocks, 4-D of ModelOpt": ((128, 128), lambda s: s[:, None, :, None], None),
    "blocks of compressed-tensors": (
        (64, 64), lambda s: s, groups(strategy="block", block_structure=[64, 64]),
    ),
    "blocks as a text": (
        (64, 32), lambda s: s, groups(strategy="block", block_structure="64x32"),
    ),
    "blocks of 96, which the configuration says": ((96, 128), lambda s: s, blocks_of(96, 128)),
    "blocks of 64, nothing configured": ((64, 64), lambda s: s, None),
    "blocks of 64, though 128 is configured": ((64, 64), lambda s: s, blocks_of(128, 128)),
    "groups of columns": ((1, 128), lambda s: s, None),
    "groups of columns, configured": (
        (1, 64), lambda s: s, groups(strategy="group", group_size=64),
    ),
    "groups of 32 columns": ((1, 32), lambda s: s, None),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_experts_apart(tmp_path, case):
    block, stored, config = APART[case]
    tensors, types, values = {}, {}, []
    for name, (n, k) in SIZES.items():
        rows, cols = block[0] or n, block[1] or k
        role = []
        for e in range(E):
            data, scales = codes((n, k), e + n), scale_values((-(-n // rows), -(-k // cols)), e)
            base = f"{BASE}.{e}.{name}"
            tensors |= {f"{base}.weight": data, f"{base}.weight_scale": stored(scales)}
            types[f"{base}.weight"] = "F8_E4M3"
            role.append(e4m3(data) * spread(scales, rows, cols, n, k))
        values.append(role)
    folder = write(tmp_path, tensors, types=types, quantization_config=config)
    check(mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32"), values, exact=2.0**-22)


def stacked(block, parts, seed):
    """Codes, scales and values of gate_up [E, 2I, H] and down [E, H, I]."""
    out = {}
    for name, (n, k) in {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}.items():
        count = parts if name == "gate_up_proj" else 1
        rows, cols = block[0] or n // count, block[1] or k
        part = n // count
        scales = scale_values((E, count, -(-part // rows), -(-k // cols)), seed + n)
        data = codes((E, n, k), seed + n)
        real = [
            np.concatenate([spread(s, rows, cols, part, k) for s in scales[e]]) for e in range(E)
        ]
        out[name] = data, scales.reshape(E, -1, scales.shape[-1]), e4m3(data) * np.stack(real)
    return out


# block, parts of the rows, how the scales are stored, whether all is transposed.
STACKED = {
    "tensor [E]": ((0, 0), 1, lambda s: s.reshape(E), False),
    "tensor [E, 1]": ((0, 0), 1, lambda s: s.reshape(E, 1), False),
    "tensor [E, 1, 1]": ((0, 0), 1, lambda s: s, False),
    "halves [E, 2, 1]": ((0, 0), 2, lambda s: s, False),
    "channels [E, n, 1]": ((1, 0), 1, lambda s: s, False),
    "blocks over both halves": ((128, 128), 1, lambda s: s, False),
    "blocks of each half": ((128, 128), 2, lambda s: s, False),
    "groups of columns": ((1, 64), 1, lambda s: s, False),
    "transposed, tensor [E, 1, 1]": ((0, 0), 1, lambda s: s, True),
    "transposed, channels [E, 1, n]": ((1, 0), 1, lambda s: s, True),
    "transposed, tensor [E]": ((0, 0), 1, lambda s: s.reshape(E), True),
    "transposed, channels [E, n]": ((1, 0), 1, lambda s: s.reshape(E, -1), True),
    "transposed, halves [E, 2]": ((0, 0), 2, lambda s: s.reshape(E, -1), True),
    "transposed, channels not transposed": ((1, 0), 1, lambda s: np.moveaxis(s, 1, 2), True),
    "transposed, blocks": ((128, 128), 1, lambda s: s, True),
    "transposed, blocks of each half": ((128, 128), 2, lambda s: s, True),
}


@pytest.mark.parametrize("configured", [True, False], ids=["configured", "not configured"])
@pytest.mark.parametrize("case", STACKED)
def test_experts_in_one_tensor(tmp_path, case, configured):
    block, parts, stored, transposed = STACKED[case]
    tensors, types, values = {}, {}, {}
    for name, (data, scales, real) in stacked(block, parts, seed=7).items():
        turn = (lambda t: np.moveaxis(t, 1, 2)) if transposed else (lambda t: t)
        shaped = stored(scales)
        tensors[f"{BASE}.{name}"] = turn(data)
        tensors[f"{BASE}.{name}_scale_inv"] = turn(shaped) if shaped.ndim == 3 else shaped
        # A scale of activations: the products here are with unrounded ones.
        tensors[f"{BASE}.{name}_activation_scale"] = np.full(E, 0.5, np.float32)
        types[f"{BASE}.{name}"] = "F8_E4M3"
        values[name] = real
    config = blocks_of(*block) if configured and 0 not in block else None
    folder = write(tmp_path, tensors, types=types, quantization_config=config)
    want = values["gate_up_proj"][:, :I], values["gate_up_proj"][:, I:], values["down_proj"]
    check(mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32"), want, exact=2.0**-22)


def e5m2(data):
    return (data.astype(np.uint16) << 8).view(np.float16).astype(np.float64)


def finite_e5m2(shape, seed):
    data = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    data[(data & 0x7F) >= 0x7C] = 0
    return data


def int8(shape, seed):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def e8m0(shape, seed):
    data = np.random.default_rng(seed).integers(100, 130, shape).astype(np.uint8)
    return data, 2.0 ** (data.astype(np.float64) - 127)


def bf16(shape, seed):
    data = as_bf16(scale_values(shape, seed))
    return data, (data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def f32(shape, seed):
    data = scale_values(shape, seed)
    return data, data.astype(np.float64)


def f64(shape, seed):
    data = scale_values(shape, seed).astype(np.float64)
    return data, data


def zeros_fp8(shape, seed):
    data = codes(shape, seed + 50)
    return data, e4m3(data)


def zeros_int8(shape, seed):
    data = int8(shape, seed + 50)
    return data, data.astype(np.float64)


# codes, their type and values; scales and their type; zero points and their type.
TYPES = {
    "E4M3, scales BF16": ((codes, "F8_E4M3", e4m3), (bf16, "BF16"), None),
    "E4M3, scales F64": ((codes, "F8_E4M3", e4m3), (f64, "F64"), None),
    "E4M3, E8M0 as U8": ((codes, "F8_E4M3", e4m3), (e8m0, "U8"), None),
    "E4M3, E8M0": ((codes, "F8_E4M3", e4m3), (e8m0, "F8_E8M0"), None),
    "E5M2": ((finite_e5m2, "F8_E5M2", e5m2), (f32, "F32"), None),
    "INT8": ((int8, "I8", lambda c: c.astype(np.float64)), (f32, "F32"), None),
    "E4M3, zero points": ((codes, "F8_E4M3", e4m3), (f32, "F32"), (zeros_fp8, "F8_E4M3")),
    "INT8, zero points": (
        (int8, "I8", lambda c: c.astype(np.float64)), (f32, "F32"), (zeros_int8, "I8"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("block", [(1, 0), (0, 0), (128, 128)], ids=["rows", "tensor", "blocks"])
@pytest.mark.parametrize("case", TYPES)
def test_types_of_codes_scales_and_zero_points(tmp_path, case, block):
    (draw, dtype, value_of), (scale_of, scale_type), zero = TYPES[case]
    tensors, types, values = {}, {}, []
    for name, (n, k) in SIZES.items():
        rows, cols = block[0] or n, block[1] or k
        grid, role = (-(-n // rows), -(-k // cols)), []
        for e in range(E):
            data, (stored, real) = draw((n, k), e + n), scale_of(grid, e)
            base = f"{BASE}.{e}.{name}"
            tensors |= {f"{base}.weight": data, f"{base}.weight_scale": stored}
            types |= {f"{base}.weight": dtype, f"{base}.weight_scale": scale_type}
            true = value_of(data)
            if zero is not None:
                tensors[f"{base}.weight_zero_point"], points = zero[0](grid, e)
                types[f"{base}.weight_zero_point"] = zero[1]
                true = true - spread(points, rows, cols, n, k)
            role.append(true * spread(real, rows, cols, n, k))
        values.append(role)
    folder = write(tmp_path, tensors, types=types)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32")
    for role, matrices in zip(("gate", "up", "down"), values, strict=True):
        for e in range(E):
            np.testing.assert_allclose(
                stack.dequantize(role, e), matrices[e], rtol=2.0**-21, atol=1e-6
            )


def test_a_zero_point_that_is_lost(tmp_path):
    """Without it the codes mean other values, and nothing else says that it was there."""
    tensors, types = {}, {}
    for name, (n, k) in SIZES.items():
        for e in range(E):
            base = f"{BASE}.{e}.{name}"
            tensors[f"{base}.weight"] = codes((n, k), e)
            tensors[f"{base}.weight_scale"] = np.ones((n, 1), np.float32)
            tensors[f"{base}.weight_zero_point"] = np.full((n, 1), 3, np.int8)
            types[f"{base}.weight"] = "F8_E4M3"
    for e, missing in ((0, "0.gate_proj"), (1, "1.down_proj")):
        kept = {n: t for n, t in tensors.items() if n != f"{BASE}.{missing}.weight_zero_point"}
        folder = tmp_path / str(e)
        folder.mkdir()
        match = rf"zero point of '{BASE}\.{missing}\.weight'"
        with pytest.raises(mo.FormatError, match=match):
            mo.ExpertStack.load_from_safetensors(write(folder, kept, types=types), LAYER)


@pytest.mark.parametrize(
    ("shape", "n", "k", "parts", "hint", "want"),
    [
        ((2, 2), 192, 256, 1, None, (128, 128, 1)),
        ((2, 2), 192, 256, 1, (96, 128), (96, 128, 1)),
        ((4, 2), 384, 256, 2, None, (128, 128, 2)),
        ((3, 2), 384, 256, 2, None, (128, 128, 1)),
        ((2, 1), 384, 256, 2, None, (192, 256, 1)),
        ((2, 1), 192, 128, 2, (128, 128), (128, 128, 1)),
        ((3, 1), 384, 256, 2, (128, 128), (128, 256, 1)),
        ((5, 2), 192, 256, 1, (128, 128), None),
        ((200, 1), 192, 256, 1, None, None),
        ((0, 2), 192, 256, 1, None, None),
        ((1, 64), 192, 256, 1, None, None),
    ],
)
def test_what_a_grid_means(shape, n, k, parts, hint, want):
    grid = find_grid(shape, n, k, parts, hint)
    assert (grid and (grid.rows, grid.cols, grid.parts)) == want

"""Checkpoints of one layer with float, FP8 and FP4 experts, and the values that they mean."""

from pathlib import Path

import numpy as np
from files import write_checkpoint
from values import expert_weights

E, H, I, LAYER = 3, 128, 192, 2
BASE = f"model.layers.{LAYER}.mlp.experts"
QWEN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


def weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return expert_weights(E, H, I, seed=seed)


def write(folder: Path, tensors: dict, model_type="qwen3_moe", types=None, **config) -> Path:
    return write_checkpoint(folder, tensors, {"model_type": model_type, **config}, types)


def check(stack, want, exact=True):
    """Every expert of the three roles has these values; ``exact`` may be a relative tolerance."""
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


def fused_tensors() -> dict:
    gate, up, down = weights()
    return {
        f"{BASE}.gate_up_proj": np.concatenate([gate, up], axis=1),
        f"{BASE}.down_proj": down,
    }


def _e4m3_value(code: int) -> float:
    """By a formula of its own: sign, 4 bits of exponent, 3 of mantissa."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 0x80 else size


_E4M3 = np.array([_e4m3_value(code) for code in range(256)])


def e4m3(codes):
    """The values of codes, f64."""
    return _E4M3[codes]


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


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fp4(n, k, seed):
    """Packed neighbours [n, k/2] and their values without scales [n, k]."""
    nibbles = np.random.default_rng(seed).integers(0, 16, (n, k)).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, E2M1[nibbles]

"""FP8 (E4M3) matrices with scales: blocks, rows, whole tensors, or 32 columns (MXFP8).

GGUF has no FP8, so products with the scale become BF16: exact where the scales are powers of two,
else rounded to 8 significant bits (E4M3 itself has 4). With ``exact`` they become F32.
"""

from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.dense import dense_name
from moesaic.safetensors.encoded import Encoded, bytes_of, sizes
from moesaic.safetensors.names import Matrix
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, wrong


def _e4m3() -> Array:
    """All 256 values; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), normal)
    value[(code & 0x7F) == 0x7F] = np.nan
    out: Array = np.where(code >> 7, -value, value).astype(np.float32)
    return out


E4M3 = _e4m3()
_E8M0 = ("U8", "F8_E8M0")


def powers_of_two(codes: Array, name: str) -> Array:
    """2^(code - 127) of E8M0 codes as f32. Raises FormatError for 255, which is NaN."""
    if (codes == 255).any():
        raise wrong(f"tensor {name!r}", "E8M0 scales of 0 to 254", 255)
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)


def to_bf16(values: Array) -> Array:
    """The nearest BF16 of f32, ties to even, as u16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class Fp8(Encoded):
    """E4M3 codes [n, k] and a grid of scales; one scale is for ``block`` rows and columns."""

    scale_name: str
    block: tuple[int, int]
    exact: bool

    form = "F8_E4M3"
    decision = "dequantized"

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix, exact: bool) -> "Fp8 | None":
        name = dense_name(checkpoint, matrix)
        if name is None or checkpoint.entry(name).dtype != "F8_E4M3":
            return None
        n, k = sizes(checkpoint, name, matrix)
        base = matrix.base
        scales = (
            f"{base}.weight_scale_inv", f"{base}.weight_scale", f"{base}.scale",
            f"{base}_scale_inv", f"{base}_scale",
        )  # fmt: skip
        scale = next((s for s in scales if s in checkpoint.tensors), None)
        if scale is None:
            raise wrong(f"tensor {name!r}", f"scales, {scales[0]!r} or alike", "none")
        return cls(checkpoint, matrix, n, k, scale, _block(checkpoint, matrix, scale, n, k), exact)

    @property
    def name(self) -> str:
        name = dense_name(self.checkpoint, self.matrix)
        assert name is not None
        return name

    @property
    def type(self) -> str:
        return "F32" if self.exact else "BF16"

    def scales(self) -> Array:
        """f32, one for each block."""
        entry = self.checkpoint.entry(self.scale_name)
        values = self.checkpoint.raw(self.scale_name, self.matrix.index)
        if entry.dtype in _E8M0:
            values = powers_of_two(values, self.scale_name)
        elif entry.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        grid = values.astype(np.float32).reshape(-(-self.n // self.block[0]), -1)
        if not np.isfinite(grid).all():
            raise wrong(f"tensor {self.scale_name!r}", "finite scales", "others")
        return grid

    def rows(self) -> tuple[Array, float]:
        values = E4M3[self.checkpoint.raw(self.name, self.matrix.index)]
        scales = self.scales()
        columns = np.arange(self.k) // self.block[1]
        for first in range(0, self.n, self.block[0]):
            values[first : first + self.block[0]] *= scales[first // self.block[0], columns]
        if np.isnan(values).any():
            raise wrong(f"tensor {self.name!r}", "numbers", "NaN codes (0x7F or 0xFF)")
        return bytes_of(values if self.exact else to_bf16(values)), 1.0


def _block(checkpoint: Checkpoint, matrix: Matrix, name: str, n: int, k: int) -> tuple[int, int]:
    """Rows and columns of one scale, which its shape and config.json must agree on."""
    entry = checkpoint.entry(name)
    if entry.dtype not in (*FLOATS, *_E8M0):
        raise wrong(f"tensor {name!r} dtype", " or ".join((*FLOATS, *_E8M0)), entry.dtype)
    shape = entry.shape if matrix.index is None else entry.shape[1:]
    if shape in ((), (1,)):
        return n, k
    if shape == (n, 1) or shape == (n,):
        return 1, k
    block = (1, 32) if entry.dtype == "U8" else _configured_block(checkpoint)
    grid = (-(-n // block[0]), -(-k // block[1]))
    if shape != grid:
        raise wrong(
            f"tensor {name!r} shape",
            f"{list(grid)}, a scale for {block[0]} x {block[1]} of [{n}, {k}]",
            list(entry.shape),
        )
    return block


def _configured_block(checkpoint: Checkpoint) -> tuple[int, int]:
    """quantization_config.weight_block_size, 128 x 128 when it is not there."""
    config = checkpoint.json("config.json") or {}
    text = config.get("text_config")
    found = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    size = found.get("weight_block_size") if isinstance(found, dict) else None
    if size is None:
        return 128, 128
    good = isinstance(size, list) and len(size) == 2
    if not good or not all(isinstance(v, int) and v > 0 for v in size):
        raise wrong("config.json weight_block_size", "two sizes", size)
    return size[0], size[1]

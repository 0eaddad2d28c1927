"""FP8 and INT8 matrices with scales: of blocks, rows, whole tensors, or groups of columns.

E4M3 stays as it is where blocks of 128 columns fit its scales and its rows; where they do not, and
for E5M2, INT8 and zero points, products with the scale become BF16: exact where the scales are
powers of two, else rounded to 8 significant bits (E4M3 itself has 4). With ``exact`` they become
F32.
"""

from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.dense import DENSE, dense_name
from moesaic.safetensors.encoded import Encoded, Stored, bytes_of, own_part, sizes, to_bf16
from moesaic.safetensors.names import Matrix, find
from moesaic.safetensors.quantization import Quantization
from moesaic.safetensors.reader import Array, Checkpoint, unsupported, wrong
from moesaic.safetensors.scale_grid import ScaleGrid, find_grid, two_dims


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
#: E5M2 is the upper byte of F16.
E5M2: Array = (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
FP8 = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
CODES = (*FP8, "I8")
_E8M0 = ("U8", "F8_E8M0")
_SCALES = (*DENSE, *_E8M0)
#: The largest magnitude of codes of bitsandbytes, whose scales are those of rows.
_SCB = np.float32(1 / 127)
_ZEROS = (*DENSE, *CODES)
#: Columns of a block of the type E4M3, which has an f32 scale in front of their codes.
BLOCK = 128


def powers_of_two(codes: Array, name: str) -> Array:
    """2^(code - 127) of E8M0 codes as f32. Raises FormatError for 255, which is NaN."""
    if (codes == 255).any():
        raise wrong(f"tensor {name!r}", "E8M0 scales of 0 to 254", 255)
    return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)


def _check_order(checkpoint: Checkpoint, name: str) -> None:
    """Older int8 of bitsandbytes may lie in other orders than rows, for kernels of some GPUs."""
    if name in checkpoint.tensors and (checkpoint.raw(name) != 0).any():
        raise unsupported(f"tensor {name!r}", "0, rows one after another", "another order")


@dataclass(frozen=True)
class Fp8(Encoded):
    """Codes of 8 bits and a grid of scales; ``transposed`` ones are stored [k, n]."""

    values_name: str
    scale_name: str
    zero_name: str | None
    grid: ScaleGrid
    grid_transposed: bool
    transposed: bool
    exact: bool

    form = "codes of 8 bits"
    decision = "dequantized"
    reason = "there is no such type with these scales, or not on this device"

    @property
    def label(self) -> str:
        return self.checkpoint.entry(self.name).dtype

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        matrix: Matrix,
        transposed: bool,
        quantization: Quantization,
        exact: bool,
        keep_fp8: bool = True,
    ) -> "Fp8 | None":
        name = dense_name(checkpoint, matrix)
        if name is None or checkpoint.entry(name).dtype not in CODES:
            return None
        n, k = sizes(checkpoint, name, matrix)
        if transposed:
            n, k = k, n
        base = matrix.base
        scale = find(checkpoint, base, "scale_inv", "scale", "SCB")
        if scale is None:
            raise wrong(f"tensor {name!r}", f"scales, '{base}.weight_scale_inv' or alike", "none")
        dtype = checkpoint.entry(scale).dtype
        if dtype not in _SCALES:
            raise wrong(f"tensor {scale!r} dtype", " or ".join(_SCALES), dtype)
        stored = own_part(checkpoint, scale, matrix)[1]
        shape, hint = two_dims(stored), quantization.block(base)
        grid, turned = None, False
        if shape is not None:
            parts = len(matrix.roles) or 1
            # Scales in one dimension, or of rows, are told apart before a grid is turned.
            turned = transposed and len(stored) > 1 and shape != (n, 1)
            grid = find_grid(shape[::-1] if turned else shape, n, k, parts, hint)
        if grid is None:
            raise wrong(
                f"tensor {scale!r} shape",
                f"scales of blocks, rows or all of [{n}, {k}]"
                + ("" if hint is None else f", blocks of {hint[0]} x {hint[1]} as configured"),
                list(checkpoint.entry(scale).shape),
            )
        if scale.endswith("SCB"):
            _check_order(checkpoint, f"{base}.weight_format")
        zeros = find(checkpoint, base, "zero_point")
        is_e4m3 = checkpoint.entry(name).dtype == "F8_E4M3" and zeros is None
        keep = keep_fp8 and not exact and is_e4m3 and _fits_blocks(grid, k)
        kind = E4m3Blocks if keep else cls
        return kind(checkpoint, matrix, n, k, name, scale, zeros, grid, turned, transposed, exact)

    @property
    def name(self) -> str:
        return self.values_name

    @property
    def type(self) -> str:
        return "F32" if self.exact else "BF16"

    def tensors(self) -> set[str]:
        others = {self.scale_name, self.zero_name or "", f"{self.matrix.base}.weight_format"}
        return super().tensors() | {name for name in others if name in self.checkpoint.tensors}

    def stored(self) -> Stored | None:
        if self.exact or self.zero_name is not None or self.transposed or self.grid_transposed:
            return None
        entry = self.checkpoint.entry
        scale = entry(self.scale_name).dtype
        facts = {
            "code": entry(self.name).dtype,
            "scale": "F8_E8M0" if scale in _E8M0 else scale,
            "scale_factor": float(_SCB) if self.scale_name.endswith("SCB") else 1.0,
            "grid": (self.grid.rows, self.grid.cols, self.grid.parts),
        }
        part = own_part(self.checkpoint, self.scale_name, self.matrix)[0]
        return Stored(
            "codes8", (self.name, self.matrix.index), (self.scale_name, part), facts=facts
        )

    def _grid(self, name: str, dtypes: tuple[str, ...]) -> Array:
        """f32, one for each scale."""
        dtype = self.checkpoint.entry(name).dtype
        if dtype not in dtypes:
            raise wrong(f"tensor {name!r} dtype", " or ".join(dtypes), dtype)
        values = self.checkpoint.raw(name, own_part(self.checkpoint, name, self.matrix)[0])
        if dtype in FP8:
            values = FP8[dtype][values]
        elif dtype in _E8M0:
            values = powers_of_two(values, name)
        elif dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        rows, cols = self.grid.shape(self.n, self.k)
        if values.size != rows * cols:
            raise wrong(f"tensor {name!r}", f"{rows} x {cols} values", values.size)
        grid = values.reshape(cols, rows).T if self.grid_transposed else values.reshape(rows, cols)
        with np.errstate(over="ignore"):
            grid = grid.astype(np.float32)
        if name.endswith("SCB"):  # The largest magnitudes of rows, for which bitsandbytes has 127.
            grid = grid * _SCB
        if not np.isfinite(grid).all():
            raise wrong(f"tensor {name!r}", "finite values of f32", "others")
        return grid

    def codes(self) -> Array:
        """As stored, [n, k]."""
        codes: Array = self.checkpoint.raw(self.name, self.matrix.index)
        return codes.T if self.transposed else codes

    def values(self) -> tuple[Array, float]:
        codes = self.codes()
        table = FP8.get(self.checkpoint.entry(self.name).dtype)
        values = codes.astype(np.float32) if table is None else table.take(codes)
        if self.zero_name is not None:
            values -= self.grid.spread(self._grid(self.zero_name, _ZEROS), self.n, self.k)
        with np.errstate(over="ignore", invalid="ignore"):
            self.grid.scale(values, self._grid(self.scale_name, _SCALES))
        if not np.isfinite(values).all():
            if table is not None and not np.isfinite(table[codes]).all():
                raise wrong(f"tensor {self.name!r}", "numbers", "codes of NaN or infinity")
            raise wrong(f"tensor {self.scale_name!r}", "products that f32 holds", "larger ones")
        return values, 1.0

    def rows(self) -> tuple[Array, float]:
        values, factor = self.values()
        return bytes_of(values if self.exact else to_bf16(values)), factor


def _fits_blocks(grid: ScaleGrid, k: int) -> bool:
    """Whether all columns of a block have the same scale, and rows are whole blocks."""
    return k % BLOCK == 0 and (grid.cols % BLOCK == 0 or grid.cols >= k)


class E4m3Blocks(Fp8):
    """E4M3 in blocks along a row, each with the scale that the checkpoint has for it."""

    decision = "repacked"
    reason = "the same codes and scales, in blocks of rows"

    @property
    def type(self) -> str:
        return "E4M3"

    def rows(self) -> tuple[Array, float]:
        codes, scales = self.codes(), self._grid(self.scale_name, _SCALES)
        largest = float(np.abs(scales).max()) * float(np.nanmax(E4M3))
        if ((codes & 0x7F) == 0x7F).any() or largest > float(np.finfo(np.float32).max):
            self.values()  # names what is no number; smaller codes may make products that are
        columns = np.arange(0, self.k, BLOCK) // self.grid.cols
        spread = scales[self.grid.row_index(self.n)[:, None], columns]
        out = np.empty((self.n, self.k // BLOCK, 4 + BLOCK), np.uint8)
        out[..., :4] = spread.astype("<f4")[..., None].view(np.uint8)
        out[..., 4:] = codes.reshape(self.n, -1, BLOCK)
        return out.reshape(self.n, -1), 1.0

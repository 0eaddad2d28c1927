"""FP4 (E2M1) matrices, repacked without loss: only nibbles and scales change their places.

MXFP4 has an E8M0 scale for 32 columns, NVFP4 an E4M3 scale for 16 and one f32 for the matrix.
Checkpoints put columns 2i and 2i + 1 into byte i; GGUF puts column j and the one half a group
further into byte j.
"""

from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.dense import dense_name
from moesaic.safetensors.encoded import Encoded, Stored, bytes_of, own_part, sizes, to_bf16
from moesaic.safetensors.fp8 import E4M3, powers_of_two
from moesaic.safetensors.names import Matrix, find
from moesaic.safetensors.reader import Array, Checkpoint, wrong


def halves(packed: Array, group: int) -> Array:
    """Bytes of neighbours [n, k/2] as bytes of half groups [n, k/group, group/2]."""
    codes = np.empty((packed.shape[0], packed.shape[1] // (group // 2), group), np.uint8)
    pairs = packed.reshape(codes.shape[0], codes.shape[1], group // 2)
    codes[..., 0::2], codes[..., 1::2] = pairs & 15, pairs >> 4
    out: Array = codes[..., : group // 2] | codes[..., group // 2 :] << 4
    return out


E2M1: Array = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)


def _decoded(packed: Array, scales: Array) -> Array:
    """f32 [n, k] of packed neighbours [n, k/2] and f32 scales of neighbouring columns."""
    n, count = packed.shape
    out = np.empty((n, 2 * count), np.float32)
    out[:, 0::2], out[:, 1::2] = E2M1[packed & 15], E2M1[packed >> 4]
    groups = out.reshape(n, scales.shape[1], -1)
    groups *= scales[..., None]
    return out


@dataclass(frozen=True)
class Mxfp4(Encoded):
    """gpt-oss (``_blocks``, ``_scales``), DeepSeek-V4 and compressed-tensors."""

    values_name: str
    scales_name: str

    form = "MXFP4"

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix) -> "Mxfp4 | None":
        base = matrix.base
        if f"{base}_blocks" in checkpoint.tensors:
            name, scales, blocks = f"{base}_blocks", f"{base}_scales", True
        else:
            found = find(checkpoint, base, "packed") or dense_name(checkpoint, matrix)
            scale = find(checkpoint, base, "scale", "scale_inv")
            if found is None or scale is None or checkpoint.entry(found).dtype not in ("U8", "I8"):
                return None
            if checkpoint.entry(scale).dtype not in ("U8", "F8_E8M0"):
                return None
            name, scales, blocks = found, scale, False
        if checkpoint.entry(name).dtype not in ("U8", "I8"):
            raise wrong(f"tensor {name!r} dtype", "U8 or I8", checkpoint.entry(name).dtype)
        shape = sizes(checkpoint, name, matrix, rank=3 if blocks else 2)
        n, k = shape[0], 2 * int(np.prod(shape[1:]))
        if k % 32 or (blocks and shape[2] != 16):
            raise wrong(f"tensor {name!r} shape", "32 columns in 16 bytes", list(shape))
        return cls(checkpoint, matrix, n, k, name, scales)

    @property
    def name(self) -> str:
        return self.values_name

    @property
    def type(self) -> str:
        return "MXFP4"

    def tensors(self) -> set[str]:
        return super().tensors() | {self.scales_name}

    def stored(self) -> Stored:
        index = self.matrix.index
        return Stored("mxfp4", (self.values_name, index), (self.scales_name, index))

    def _scales(self) -> Array:
        return self.checkpoint.read(
            self.scales_name, ("U8", "F8_E8M0"), (self.n, self.k // 32), self.matrix.index
        )

    def _packed(self) -> Array:
        packed = self.checkpoint.raw(self.values_name, self.matrix.index).view(np.uint8)
        return packed.reshape(self.n, -1)

    def values(self) -> tuple[Array, float]:
        return _decoded(self._packed(), powers_of_two(self._scales(), self.scales_name)), 1.0

    def rows(self) -> tuple[Array, float]:
        scales = self._scales()
        powers_of_two(scales, self.scales_name)
        out = np.empty((self.n, self.k // 32, 17), np.uint8)
        out[..., 0] = scales
        out[..., 1:] = halves(self._packed(), 32)
        return out.reshape(self.n, -1), 1.0


@dataclass(frozen=True)
class Nvfp4(Encoded):
    """ModelOpt, where ``weight_scale_2`` multiplies, and compressed-tensors, where
    ``weight_global_scale`` divides.
    """

    values_name: str
    scales_name: str
    global_name: str
    transposed: bool  # bytes [k/2, n], scales [k/16, n]

    form = "NVFP4"

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix) -> "Nvfp4 | None":
        base = matrix.base
        name = find(checkpoint, base, "packed") or dense_name(checkpoint, matrix)
        scale = find(checkpoint, base, "scale")
        if name is None or checkpoint.entry(name).dtype != "U8":
            return None
        if scale is None or checkpoint.entry(scale).dtype != "F8_E4M3":
            return None
        found = find(checkpoint, base, "scale_2", "global_scale")
        if found is None:
            raise wrong(
                f"tensor {name!r}",
                f"a scale of the matrix, '{base}.weight_scale_2' or alike",
                "none",
            )
        n, bytes_per_row = sizes(checkpoint, name, matrix)
        grid = sizes(checkpoint, scale, matrix)
        transposed = grid == (n // 8, bytes_per_row)
        if transposed:
            n, bytes_per_row = bytes_per_row, n
        elif grid != (n, bytes_per_row // 8):
            raise wrong(
                f"tensor {scale!r} shape",
                f"{[n, bytes_per_row // 8]}, a scale for 16 columns of {name!r}",
                list(checkpoint.entry(scale).shape),
            )
        k = 2 * bytes_per_row
        kind = cls if k % 64 == 0 else Nvfp4Floats
        return kind(checkpoint, matrix, n, k, name, scale, found, transposed)

    @property
    def name(self) -> str:
        return self.values_name

    @property
    def type(self) -> str:
        return "NVFP4"

    def tensors(self) -> set[str]:
        return super().tensors() | {self.scales_name, self.global_name}

    def factor(self) -> float:
        entry = self.checkpoint.entry(self.global_name)
        index, shape = own_part(self.checkpoint, self.global_name, self.matrix)
        if entry.dtype != "F32" or any(size != 1 for size in shape):
            raise wrong(
                f"tensor {self.global_name!r}",
                "one F32 value for each matrix",
                f"{entry.dtype} {list(entry.shape)}",
            )
        value = np.float32(self.checkpoint.raw(self.global_name, index).reshape(-1)[0])
        if not np.isfinite(value) or value <= 0:
            raise wrong(f"tensor {self.global_name!r}", "a positive number", value)
        divides = self.global_name.endswith("global_scale")
        # It is 448 * 6 over the largest weight: below 1 it would be the factor that others store.
        if divides and value < 1:
            raise wrong(f"tensor {self.global_name!r}", "a divisor, of at least 1", value)
        return float(np.float32(1) / value if divides else value)

    def stored(self) -> Stored | None:
        if self.transposed or self.type != "NVFP4":
            return None
        index = self.matrix.index
        return Stored("nvfp4", (self.values_name, index), (self.scales_name, index))

    def _stored(self) -> tuple[Array, Array]:
        """The packed codes [n, k/2] and the codes of the scales [n, k/16]."""
        packed = self.checkpoint.raw(self.values_name, self.matrix.index)
        scales = self.checkpoint.raw(self.scales_name, self.matrix.index)
        if self.transposed:
            packed, scales = packed.T, scales.T
        if (scales >= 0x7F).any():
            raise wrong(
                f"tensor {self.scales_name!r}", "scales of 0x00 to 0x7E", "negative ones or NaN"
            )
        return np.ascontiguousarray(packed), np.ascontiguousarray(scales)

    def values(self) -> tuple[Array, float]:
        packed, scales = self._stored()
        return _decoded(packed, E4M3[scales]), self.factor()

    def rows(self) -> tuple[Array, float]:
        packed, scales = self._stored()
        out = np.empty((self.n, self.k // 64, 36), np.uint8)
        out[..., :4] = scales.reshape(self.n, -1, 4)
        out[..., 4:] = halves(packed, 16).reshape(self.n, -1, 32)
        return out.reshape(self.n, -1), self.factor()


class Nvfp4Floats(Nvfp4):
    """Columns that blocks of 64 do not hold. BF16 holds all products of E2M1 and E4M3."""

    decision = "dequantized"
    reason = "GGUF has blocks of 64 columns"

    @property
    def type(self) -> str:
        return "BF16"

    def rows(self) -> tuple[Array, float]:
        values, factor = self.values()
        return bytes_of(to_bf16(values)), factor

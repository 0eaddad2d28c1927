"""FP4 (E2M1) matrices, repacked without loss: only nibbles and scales change their places.

MXFP4 has an E8M0 scale for 32 columns, NVFP4 an E4M3 scale for 16 and one f32 for the matrix.
Checkpoints put columns 2i and 2i + 1 into byte i; GGUF puts column j and the one half a group
further into byte j.
"""

from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.encoded import Encoded, sizes
from moesaic.safetensors.fp8 import powers_of_two
from moesaic.safetensors.names import Matrix
from moesaic.safetensors.reader import Array, Checkpoint, wrong


def halves(packed: Array, group: int) -> Array:
    """Bytes of neighbours [n, k/2] as bytes of half groups [n, k/group, group/2]."""
    codes = np.empty((packed.shape[0], packed.shape[1] // (group // 2), group), np.uint8)
    pairs = packed.reshape(codes.shape[0], codes.shape[1], group // 2)
    codes[..., 0::2], codes[..., 1::2] = pairs & 15, pairs >> 4
    out: Array = codes[..., : group // 2] | codes[..., group // 2 :] << 4
    return out


def _first(checkpoint: Checkpoint, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in checkpoint.tensors), None)


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
            found = _first(checkpoint, (f"{base}.weight_packed", f"{base}.weight"))
            scale = _first(checkpoint, (f"{base}.weight_scale", f"{base}.scale"))
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

    def rows(self) -> tuple[Array, float]:
        blocks = self.k // 32
        scales = self.checkpoint.read(
            self.scales_name, ("U8", "F8_E8M0"), (self.n, blocks), self.matrix.index
        )
        powers_of_two(scales, self.scales_name)
        packed = self.checkpoint.raw(self.values_name, self.matrix.index).view(np.uint8)
        out = np.empty((self.n, blocks, 17), np.uint8)
        out[..., 0] = scales
        out[..., 1:] = halves(packed.reshape(self.n, -1), 32)
        return out.reshape(self.n, -1), 1.0


@dataclass(frozen=True)
class Nvfp4(Encoded):
    """ModelOpt, where ``weight_scale_2`` multiplies, and compressed-tensors, where
    ``weight_global_scale`` divides.
    """

    values_name: str
    global_name: str

    form = "NVFP4"

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix) -> "Nvfp4 | None":
        base = matrix.base
        name = _first(checkpoint, (f"{base}.weight_packed", f"{base}.weight"))
        scale = f"{base}.weight_scale"
        if name is None or checkpoint.entry(name).dtype != "U8":
            return None
        if scale not in checkpoint.tensors or checkpoint.entry(scale).dtype != "F8_E4M3":
            return None
        names = (f"{base}.weight_scale_2", f"{base}.weight_global_scale")
        found = _first(checkpoint, names)
        if found is None:
            raise wrong(f"tensor {name!r}", f"a scale of the matrix, {names[0]!r} or alike", "none")
        n, bytes_per_row = sizes(checkpoint, name, matrix)
        k = 2 * bytes_per_row
        if k % 64:
            raise wrong(f"tensor {name!r} shape", "a multiple of 64 columns", k)
        return cls(checkpoint, matrix, n, k, name, found)

    @property
    def name(self) -> str:
        return self.values_name

    @property
    def type(self) -> str:
        return "NVFP4"

    def _factor(self) -> float:
        entry = self.checkpoint.entry(self.global_name)
        if entry.dtype != "F32" or entry.shape not in ((), (1,)):
            raise wrong(
                f"tensor {self.global_name!r}",
                "one F32 value",
                f"{entry.dtype} {list(entry.shape)}",
            )
        value = np.float32(self.checkpoint.raw(self.global_name).reshape(-1)[0])
        if not np.isfinite(value) or value <= 0:
            raise wrong(f"tensor {self.global_name!r}", "a positive number", value)
        divides = self.global_name.endswith("global_scale")
        return float(np.float32(1) / value if divides else value)

    def rows(self) -> tuple[Array, float]:
        name = f"{self.matrix.base}.weight_scale"
        scales = self.checkpoint.read(name, ("F8_E4M3",), (self.n, self.k // 16))
        if (scales >= 0x7F).any():
            raise wrong(f"tensor {name!r}", "scales of 0x00 to 0x7E", "negative ones or NaN")
        out = np.empty((self.n, self.k // 64, 36), np.uint8)
        out[..., :4] = scales.reshape(self.n, -1, 4)
        packed = self.checkpoint.raw(self.values_name)
        out[..., 4:] = halves(packed, 16).reshape(self.n, -1, 32)
        return out.reshape(self.n, -1), self._factor()

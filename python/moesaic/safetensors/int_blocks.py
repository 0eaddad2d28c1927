"""Matrices of integers as blocks of GGUF, where Marlin stacks do not hold them.

Groups of whole 32 columns with scales that f16 holds become Q4_0 or Q8_0 without loss; what does
not fit these is decoded to BF16, with ``exact`` to F32.
"""

from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.encoded import Encoded, Stored, bytes_of, to_bf16
from moesaic.safetensors.fp4 import halves
from moesaic.safetensors.ints import Linear, is_int
from moesaic.safetensors.names import Matrices, Matrix
from moesaic.safetensors.quantization import Quantization
from moesaic.safetensors.reader import Array, Checkpoint


def _f16_holds(values: Array) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16), values)


@dataclass(frozen=True)
class IntBlocks(Encoded):
    """Codes, zero points and scales of groups as rows of ``to``."""

    linear: Linear
    to: str

    form = "integers in groups"

    @classmethod
    def open(
        cls, checkpoint: Checkpoint, matrix: Matrix, quantization: Quantization, exact: bool
    ) -> "IntBlocks | None":
        if not is_int(checkpoint, matrix):
            return None
        linear = Linear.open(checkpoint, matrix, quantization)
        floats = "F32" if exact else "BF16"
        to = floats if linear.order() is not None else (_blocks(linear) or floats)
        return cls(checkpoint, matrix, linear.n, linear.k, linear, to)

    @property
    def name(self) -> str:
        return self.linear.qweight

    @property
    def type(self) -> str:
        return self.to

    def tensors(self) -> set[str]:
        return super().tensors() | self.linear.tensors()

    def stored(self) -> Stored | None:
        linear = self.linear
        if self.to != "Q4_0" or not linear.packed or linear.padded:
            return None
        scales, index = linear.tensor("scales"), self.matrix.index
        facts = {
            "group_size": linear.scheme.group_size,
            "scale": linear.checkpoint.entry(scales).dtype,
        }
        return Stored("q4_words", (linear.qweight, index), (scales, index), facts=facts)

    def values(self) -> tuple[Array, float]:
        linear, group = self.linear, self.linear.order()
        if group is None:
            group = np.arange(self.k) // linear.group_size
        values = linear.codes().astype(np.float32)
        values -= linear.zeros()[:, group]
        values *= linear.scales()[:, group]
        return values, 1.0

    def rows(self) -> tuple[Array, float]:
        if self.to in ("F32", "BF16"):
            values, factor = self.values()
            return bytes_of(values if self.to == "F32" else to_bf16(values)), factor
        blocks = self.k // 32
        group = np.arange(blocks) * 32 // self.linear.group_size
        scales = self.linear.scales()[:, group].astype("<f2")
        if self.to == "Q4_0":
            body = halves(self.linear.nibbles(), 32)
        else:
            differences = self.linear.codes().reshape(self.n, blocks, 32).astype(np.int16)
            differences -= self.linear.zeros()[:, group, None]
            body = differences.astype(np.int8).view(np.uint8)
        out = np.empty((self.n, blocks, 2 + body.shape[-1]), np.uint8)
        out[..., :2] = np.ascontiguousarray(scales).view(np.uint8).reshape(self.n, -1, 2)
        out[..., 2:] = body
        return out.reshape(self.n, -1), 1.0


def _blocks(linear: Linear) -> str | None:
    """The GGUF type that holds the matrix as it is."""
    if linear.group_size % 32 or linear.k % 32:
        return None
    dtype = linear.checkpoint.entry(linear.tensor("scales")).dtype
    if dtype != "F16" and not _f16_holds(linear.scales()):
        return None
    symmetric = linear.scheme.symmetric is True
    if linear.scheme.bits == 4 and symmetric:
        return "Q4_0"
    # Differences of 8 bits and any zero point go beyond one byte.
    return "Q8_0" if linear.scheme.bits < 8 or symmetric else None


def as_q4_blocks(
    checkpoint: Checkpoint, matrices: Matrices, quantization: Quantization
) -> "dict[tuple[str, ...], list[Encoded]] | None":
    """Symmetric compressed-tensors in groups of 32 as Q4_0, or None where one is something else.

    These are the blocks of Q4_0 with their parts elsewhere, so they come faster than as INT4.
    """
    found: dict[tuple[str, ...], list[Encoded]] = {}
    for roles, group in matrices.items():
        for matrix in group:
            scheme = quantization.ints(matrix.base)
            if (scheme.format, scheme.group_size) != ("pack_quantized", 32):
                return None
            blocks = IntBlocks.open(checkpoint, matrix, quantization, exact=False)
            if blocks is None or blocks.type != "Q4_0" or blocks.linear.has("qzeros"):
                return None
            found.setdefault(roles, []).append(blocks)
    return found

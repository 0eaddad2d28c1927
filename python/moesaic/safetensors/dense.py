"""Matrices of F32, F16 and BF16, as they are, and of F64, as F32."""

from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.encoded import Encoded, Stored, bytes_of, sizes
from moesaic.safetensors.names import Matrix
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint

DENSE = (*FLOATS, "F64")


def dense_name(checkpoint: Checkpoint, matrix: Matrix) -> str | None:
    """The tensor of the values: ``base.weight``, or ``base`` alone; None when there is none."""
    for name in (f"{matrix.base}.weight", matrix.base):
        if name in checkpoint.tensors:
            return name
    return None


@dataclass(frozen=True)
class Dense(Encoded):
    """Rows of floats. ``transposed`` ones are stored [k, n]."""

    transposed: bool = False

    form = "not quantised"
    decision = "read"
    reason = "experts come one by one"

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix, transposed: bool) -> "Dense | None":
        name = dense_name(checkpoint, matrix)
        if name is None or checkpoint.entry(name).dtype not in DENSE:
            return None
        n, k = sizes(checkpoint, name, matrix)
        if transposed:
            n, k = k, n
        return cls(checkpoint, matrix, n, k, transposed)

    @property
    def name(self) -> str:
        name = dense_name(self.checkpoint, self.matrix)
        assert name is not None
        return name

    @property
    def type(self) -> str:
        dtype = self.checkpoint.entry(self.name).dtype
        return "F32" if dtype == "F64" else dtype

    def stored(self) -> Stored | None:
        if self.checkpoint.entry(self.name).dtype == "F64":
            return None
        facts = {"transposed": self.transposed}
        return Stored("floats", (self.name, self.matrix.index), facts=facts)

    def _stored(self) -> Array:
        values = self.checkpoint.raw(self.name, self.matrix.index)
        return values.T if self.transposed else values

    def values(self) -> tuple[Array, float]:
        values = self._stored()
        if self.type == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32), 1.0

    def rows(self) -> tuple[Array, float]:
        values = self._stored()
        return bytes_of(values.astype(np.float32) if values.dtype == np.float64 else values), 1.0

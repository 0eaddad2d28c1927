"""One matrix of a checkpoint, on its way to rows of a GGUF type."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moesaic.safetensors.names import Matrix
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, wrong


@dataclass(frozen=True)
class Encoded(ABC):
    """A matrix [n, k] that is there in one form; ``n`` counts the rows of all its roles."""

    checkpoint: Checkpoint
    matrix: Matrix
    n: int
    k: int

    form: ClassVar[str]  #: as reports call it
    decision: ClassVar[str] = "repacked"
    reason: ClassVar[str] = "the same values in GGUF blocks"

    @property
    @abstractmethod
    def name(self) -> str:
        """The tensor with the values."""

    @property
    @abstractmethod
    def type(self) -> str:
        """The GGUF type of the rows."""

    @abstractmethod
    def rows(self) -> tuple[Array, float]:
        """The bytes of all rows, u8 [n, row bytes], and a factor on their values."""

    @property
    def nbytes(self) -> int:
        entry = self.checkpoint.entry(self.name)
        count = 1 if self.matrix.index is None else entry.shape[0]
        return (entry.end - entry.begin) // count

    def bias(self) -> Array | None:
        """f32 [n], or None."""
        for name in (f"{self.matrix.base}.bias", f"{self.matrix.base}_bias"):
            if name in self.checkpoint.tensors:
                values = self.checkpoint.read(name, FLOATS, (self.n,), self.matrix.index)
                return values.astype(np.float32)
        return None


def sizes(checkpoint: Checkpoint, name: str, matrix: Matrix, rank: int = 2) -> tuple[int, ...]:
    """The shape of one expert's matrix in the tensor ``name``. Raises FormatError naming it."""
    shape = checkpoint.entry(name).shape
    found = shape if matrix.index is None else shape[1:]
    if len(found) != rank or 0 in shape:
        want = "N, K" if rank == 2 else "N, K/32, 16"
        raise wrong(
            f"tensor {name!r} shape",
            f"[{want}]" if matrix.index is None else f"[E, {want}]",
            list(shape),
        )
    return found


def bytes_of(values: Array) -> Array:
    """Rows as bytes, u8 [n, row bytes]."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(values.shape[0], -1)

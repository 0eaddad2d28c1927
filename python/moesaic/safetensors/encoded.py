"""One matrix of a checkpoint, on its way to rows of a GGUF type."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from moesaic import _core
from moesaic.safetensors.names import Matrix, find
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, wrong


@dataclass(frozen=True)
class Stored:
    """A matrix as its file has it, for the disk tier, which decodes experts one by one.

    Tensors are named with their slice, None for all of one. ``facts`` are the fields of
    ``StoredRole`` (cpp/src/offload/checkpoint.hpp) that the form has.
    """

    form: str
    values: tuple[str, int | None]
    scales: tuple[str, int | None] | None = None
    zeros: tuple[str, int | None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def pieces(self) -> list[tuple[str, int | None]]:
        return [one for one in (self.values, self.scales, self.zeros) if one is not None]


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
    def label(self) -> str:
        """The form of this one."""
        return self.form

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

    @abstractmethod
    def values(self) -> tuple[Array, float]:
        """All values, f32 [n, k], and a factor on them."""

    def stored(self) -> Stored | None:
        """What ``rows`` is made of, where the disk tier knows the form."""
        return None

    def factor(self) -> float:
        """The factor of ``rows`` and ``values``, without reading them."""
        return 1.0

    @property
    def recipe(self) -> tuple[str, ...]:
        """What is done to the tensors on the way to rows."""
        return self.label, self.type

    @property
    def asked(self) -> str | None:
        """The type that the caller asked for; None: the one that the form has."""
        return None

    def tensors(self) -> set[str]:
        """The names of all tensors that the matrix is read from."""
        bias = self._bias_name()
        return {self.name} if bias is None else {self.name, bias}

    @property
    def nbytes(self) -> int:
        entry = self.checkpoint.entry(self.name)
        count = 1 if self.matrix.index is None else entry.shape[0]
        return (entry.end - entry.begin) // count

    @property
    def has_bias(self) -> bool:
        return self._bias_name() is not None

    def _bias_name(self) -> str | None:
        return find(self.checkpoint, self.matrix.base, "bias")

    def bias(self) -> Array | None:
        """f32 [n], or None."""
        name = self._bias_name()
        if name is None:
            return None
        values = self.checkpoint.read(name, FLOATS, (self.n,), self.matrix.index)
        return values.astype(np.float32)


@dataclass(frozen=True)
class _Changed(Encoded):
    """A matrix in another type than its form has."""

    source: Encoded
    to: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def type(self) -> str:
        return self.to

    @property
    def recipe(self) -> tuple[str, ...]:
        return *self.source.recipe, self.to

    def tensors(self) -> set[str]:
        return self.source.tensors()


@dataclass(frozen=True)
class Decoded(_Changed):
    """A matrix beside others of another type: decoded to the floats that all of them become."""

    form = "several forms"
    decision = "dequantized"
    reason = "experts of one role have one type"

    @classmethod
    def of(cls, one: Encoded, to: str) -> "Decoded":
        """``to`` is F32 or BF16."""
        return cls(one.checkpoint, one.matrix, one.n, one.k, one, to)

    def factor(self) -> float:
        return self.source.factor()

    def values(self) -> tuple[Array, float]:
        return self.source.values()

    def rows(self) -> tuple[Array, float]:
        values, factor = self.values()
        return bytes_of(values if self.to == "F32" else to_bf16(values)), factor


@dataclass(frozen=True)
class Requantized(_Changed):
    """A matrix that is encoded in the type that a caller asks for."""

    form = "encoded"
    decision = "encoded"
    reason = "this type was asked for"

    @classmethod
    def of(cls, one: Encoded, to: str) -> "Requantized":
        return cls(one.checkpoint, one.matrix, one.n, one.k, one, to)

    @property
    def label(self) -> str:
        return self.source.label

    @property
    def asked(self) -> str:
        return self.to

    def rows(self) -> tuple[Array, float]:
        rows, factor = self.source.rows()
        values = _core.dequantize(rows, self.source.type, (self.n, self.k))
        return _core.quantize(values * np.float32(factor), self.to), 1.0

    def values(self) -> tuple[Array, float]:
        return _core.dequantize(self.rows()[0], self.to, (self.n, self.k)), 1.0


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


def to_bf16(values: Array) -> Array:
    """The nearest BF16 of f32, ties to even, as u16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def own_part(
    checkpoint: Checkpoint, name: str, matrix: Matrix
) -> tuple[int | None, tuple[int, ...]]:
    """Which slice of a small tensor is of this matrix, None where all of it is, and its shape.

    Beside a tensor of all experts a scale may be one for each of them, or one for all.
    """
    shape = checkpoint.entry(name).shape
    if matrix.index is None or not shape:
        return None, shape
    if shape[0] != matrix.experts and any(size != 1 for size in shape):
        raise wrong(f"tensor {name!r} shape", f"{matrix.experts} experts", list(shape))
    return (matrix.index, shape[1:]) if shape[0] == matrix.experts else (None, shape)

"""What ranks send each other in a call, as bytes: a header each, tokens to experts, rows back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic.distributed.groups import Bytes

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

#: Element types of x by their numbers in headers, with the bytes of an element.
DTYPES = {"f32": 4, "f16": 2, "bf16": 2}
_DTYPE_NAMES = tuple(DTYPES)
#: In a header: nothing is wrong, or this rank's arguments were.
GOOD, BAD_ARGUMENTS = 0, 1
_FIELDS = 8


@dataclass(frozen=True)
class Header:
    """What every rank says of itself before a round of a call."""

    status: int
    block: int
    call: int
    mode: int
    """How numbers are made: precision and batch invariance; all ranks have one."""
    tokens: int
    """Of this round."""
    rest: int
    """Tokens of later rounds."""
    top_k: int
    dtype: str
    rows_to: tuple[int, ...]
    """Tokens that each rank will get in an exchange."""

    def to_bytes(self) -> Bytes:
        numbers = [
            self.status, self.block, self.call, self.mode, self.tokens, self.rest, self.top_k,
            _DTYPE_NAMES.index(self.dtype), *self.rows_to,
        ]  # fmt: skip
        return np.array(numbers, np.int64).view(np.uint8)

    @staticmethod
    def of_bytes(row: Bytes) -> Header:
        row = np.ascontiguousarray(row)
        *numbers, dtype = (int(n) for n in row[: _FIELDS * 8].view(np.int64))
        rows_to = tuple(int(n) for n in row[_FIELDS * 8 :].view(np.int64))
        return Header(*numbers, _DTYPE_NAMES[dtype], rows_to)  # type: ignore[call-arg, arg-type]

    @staticmethod
    def nbytes(ranks: int) -> int:
        return 8 * (_FIELDS + ranks)


@dataclass(frozen=True)
class Tokens:
    """Some tokens with the experts that they ask for."""

    x: Bytes
    """[T, bytes of a row]"""
    ids: Ints
    """[T, top_k]; -1 in place of experts that are none of the receiver's."""
    weights: Floats | None
    """[T, top_k]; None where the receiver needs none."""

    def take(self, rows: npt.NDArray[np.intp], here: npt.NDArray[np.bool_]) -> Tokens:
        """Some rows, with the pairs of ``here`` [T, top_k] alone."""
        ids = np.where(here[rows], self.ids[rows], np.int32(-1))
        weights = None if self.weights is None else self.weights[rows]
        return Tokens(self.x[rows], ids, weights)

    def to_bytes(self) -> Bytes:
        parts = [self.ids] if self.weights is None else [self.ids, self.weights]
        flat = [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts]
        return np.concatenate([*flat, self.x.reshape(-1)])

    @staticmethod
    def of_bytes(data: Bytes, tokens: int, top_k: int, row_bytes: int, weighted: bool) -> Tokens:
        pairs = 4 * tokens * top_k
        data = np.ascontiguousarray(data)
        ids = data[:pairs].view(np.int32).reshape(tokens, top_k)
        at = pairs
        weights = None
        if weighted:
            weights = data[at : at + pairs].view(np.float32).reshape(tokens, top_k)
            at += pairs
        return Tokens(data[at : at + tokens * row_bytes].reshape(tokens, row_bytes), ids, weights)

    @staticmethod
    def nbytes(tokens: int, top_k: int, row_bytes: int, weighted: bool) -> int:
        return tokens * (top_k * (8 if weighted else 4) + row_bytes)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """All tokens, with pairs in the first slots and no more slots than some token needs.

    The order of the pairs of a token stays, and with it that of the rows which come back.
    """
    width = max((part.ids.shape[1] for part in parts), default=1)

    def padded(values: npt.NDArray[np.generic], fill: float) -> npt.NDArray[np.generic]:
        return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)

    ids = np.concatenate([padded(part.ids, -1) for part in parts])
    most = int((ids >= 0).sum(axis=1).max(initial=1))
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, : max(most, 1)]
    weights = None
    if all(part.weights is not None for part in parts):
        every = np.concatenate([padded(part.weights, 0) for part in parts])  # type: ignore[arg-type]
        weights = np.take_along_axis(every, order, axis=1)
    x = np.concatenate([part.x for part in parts])
    return Tokens(x, np.take_along_axis(ids, order, axis=1), weights)


def destinations(ids: Ints, copies: tuple[Ints, Ints], source: int, first: int) -> Ints:
    """The rank [T, top_k] that computes each pair; -1 for pairs without one.

    The copies of an expert take the tokens in turn. ``first`` is the number of the first token in
    its call, ``source`` the rank that it is of: any rank comes to the same answer.
    """
    counts, table = copies
    there = (ids >= 0) & (ids < len(counts))
    known = np.where(there, ids, 0)
    turn = source + first + np.arange(len(ids))[:, None]
    ranks = table[known, turn % counts[known]]
    return np.where(there, ranks, np.int32(-1)).astype(np.int32)


def as_array(x: Bytes, dtype: str) -> _core.Array:
    """Rows of bytes as an array [T, H]."""
    kind = np.float32 if dtype == "f32" else np.uint16
    return _core.asarray(np.ascontiguousarray(x).view(kind), dtype)  # type: ignore[arg-type]

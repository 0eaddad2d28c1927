"""Which experts each rank keeps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of
from moesaic.offload import _NOT_A_PROFILE as _NO_ARRAYS

_FORMAT = 1

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


def _wrong(kind: type[_core.Error], what: str, expected: str, got: object) -> _core.Error:
    return error_of(kind, "Placement", what, expected, str(got))


@dataclass(frozen=True, eq=False)
class Placement:
    """Which experts each rank keeps, for one layer or several. Make one with ``plan_experts``.

    Letters in shapes: L layers, R ranks, S slots. An expert may have copies on several ranks, and
    none twice on a rank.

    Parameters
    ----------
    slots : int32 array [L, R, S]
        The experts of each rank, ascending; -1 behind them.
    num_experts : int
        E. Each has a copy at least.
    layers : tuple of int
        Block numbers in the model; empty: the one placement is that of every block.

    Raises
    ------
    ConfigError, ShapeError, DTypeError
        An expert without a copy, twice on a rank or out of range, or another shape.

    Examples
    --------
    >>> from moesaic.distributed import Placement
    >>> placement = Placement.of_lists([[0, 1], [1, 2]], 3)
    >>> placement.experts(1), placement.ranks_of(1)
    ([1, 2], [0, 1])
    """

    slots: Ints
    num_experts: int
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        slots = np.asarray(self.slots)
        if slots.ndim != 3 or 0 in slots.shape[:2]:
            raise _wrong(_core.ShapeError, "slots", "[L, R, S]", list(slots.shape))
        if slots.dtype.kind not in "iu":
            raise _wrong(_core.DTypeError, "slots", "integers", slots.dtype)
        if len(slots) != max(len(self.layers), 1):
            raise _wrong(_core.ShapeError, "layers", f"{len(slots)} of them", len(self.layers))
        if slots.size and not -1 <= slots.min() <= slots.max() < self.num_experts:
            outside = slots[(slots < -1) | (slots >= self.num_experts)][0]
            expected = f"experts of -1 to {self.num_experts - 1}"
            raise _wrong(_core.ConfigError, "slots", expected, outside)
        for row in slots:
            for rank, ids in enumerate(row):
                here = ids[ids >= 0]
                if len(np.unique(here)) != len(here):
                    expected = "each expert once"
                    raise _wrong(_core.ConfigError, f"rank {rank}", expected, here.tolist())
            lost = np.setdiff1d(np.arange(self.num_experts), row)
            if len(lost):
                expected = "a rank for each expert"
                raise _wrong(_core.ConfigError, "slots", expected, f"none for {lost.tolist()[:8]}")
        ordered = np.sort(np.where(slots < 0, np.iinfo(np.int32).max, slots), axis=2)
        ordered = np.where(ordered == np.iinfo(np.int32).max, -1, ordered).astype(np.int32)
        ordered.flags.writeable = False
        object.__setattr__(self, "slots", ordered)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))

    @staticmethod
    def of_lists(experts: Sequence[Iterable[int]], num_experts: int) -> Placement:
        """Return the placement of one layer from a list of experts for each rank.

        Parameters
        ----------
        experts : sequence of sequence of int
            A list for each rank; one may be empty.
        num_experts : int
            E.

        Returns
        -------
        Placement

        Raises
        ------
        ConfigError, ShapeError, DTypeError
            As the constructor.
        """
        return placement_of_lists([[list(ids) for ids in experts]], num_experts, ())

    @property
    def ranks(self) -> int:
        """R."""
        return int(self.slots.shape[1])

    def _row(self, layer: int | None) -> Ints:
        alone = not self.layers or (layer is None and len(self.layers) == 1)
        if not alone and layer not in self.layers:
            expected = f"one of {', '.join(map(str, self.layers))}"
            raise _wrong(_core.ConfigError, "layer", expected, layer)
        row: Ints = self.slots[0 if layer is None or alone else self.layers.index(layer)]
        return row

    def experts(self, rank: int, layer: int | None = None) -> list[int]:
        """Return the experts of a rank, ascending.

        Parameters
        ----------
        rank : int
            0 to R - 1.
        layer : int, optional
            Block number; may be left out where there is one layer.

        Returns
        -------
        list of int

        Raises
        ------
        ConfigError
            No such rank, or no such layer.
        """
        if not 0 <= rank < self.ranks:
            raise _wrong(_core.ConfigError, "rank", f"0 to {self.ranks - 1}", rank)
        row = self._row(layer)[rank]
        return [int(e) for e in row if e >= 0]

    def ranks_of(self, expert: int, layer: int | None = None) -> list[int]:
        """Return the ranks that have a copy of an expert, ascending.

        Parameters
        ----------
        expert : int
            0 to E - 1.
        layer : int, optional
            As in ``experts``.

        Returns
        -------
        list of int
        """
        return [int(r) for r in np.flatnonzero((self._row(layer) == expert).any(axis=1))]

    def copies(self, layer: int | None = None) -> tuple[Ints, Ints]:
        """Return who has which expert, as arrays to look up many pairs at once.

        Parameters
        ----------
        layer : int, optional
            As in ``experts``.

        Returns
        -------
        tuple of int32 array [E] and int32 array [E, R']
            How many copies each expert has, and on which ranks, ascending; R' is the most of them.
        """
        row = self._row(layer)
        rank, _ = np.nonzero(row >= 0)
        expert = row[row >= 0]
        order = np.lexsort((rank, expert))
        counts = np.bincount(expert, minlength=self.num_experts).astype(np.int32)
        table = np.full((self.num_experts, int(counts.max())), -1, np.int32)
        column = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        table[expert[order], column] = rank[order]
        return counts, table

    def loads(self, counts: npt.ArrayLike) -> Floats:
        """Return the share of pairs that each rank computes, where copies share equally.

        Parameters
        ----------
        counts : array [L, E] or [E]
            Token-expert pairs of each expert.

        Returns
        -------
        float64 array [L, R]
        """
        rows = np.broadcast_to(np.asarray(counts, np.float64), (len(self.slots), self.num_experts))
        loads = np.zeros(self.slots.shape[:2])
        for out, row, one in zip(loads, self.slots, rows, strict=True):
            copies = np.bincount(row[row >= 0], minlength=self.num_experts)
            share = np.append(one / copies, 0.0)  # of -1
            out[:] = share[row].sum(axis=1)
        return loads

    def without(self, rank: int) -> Placement:
        """Return the placement of the other ranks, numbered anew, where their copies cover a loss.

        Parameters
        ----------
        rank : int
            The rank that is lost.

        Returns
        -------
        Placement

        Raises
        ------
        ConfigError
            Experts that no other rank has; the message names them. Or no such rank.
        """
        self.experts(rank, self.layers[0] if self.layers else None)
        rest = np.delete(self.slots, rank, axis=1)
        for i, row in enumerate(rest):
            lost = np.setdiff1d(np.arange(self.num_experts), row)
            if len(lost):
                where = f" of layer {self.layers[i]}" if self.layers else ""
                what = f"experts{where} without rank {rank}"
                got = f"none of {', '.join(map(str, lost[:8]))}{', ...' if len(lost) > 8 else ''}"
                raise _wrong(_core.ConfigError, what, "copies of all of them", got)
        return Placement(rest, self.num_experts, self.layers)

    def moves_from(self, previous: Placement) -> int:
        """Return how many experts ranks must load to come here from another placement.

        Parameters
        ----------
        previous : Placement
            Of as many ranks, layers and experts.

        Returns
        -------
        int
            Over all layers and ranks.

        Raises
        ------
        ShapeError
            Another number of ranks, layers or experts.
        """
        ours = (*self.slots.shape[:2], self.num_experts)
        theirs = (*previous.slots.shape[:2], previous.num_experts)
        if ours != theirs:
            raise _wrong(_core.ShapeError, "previous [L, R, E]", str(list(ours)), list(theirs))
        there = (previous.slots[:, :, None, :] == self.slots[..., None]).any(axis=3)
        return int(((self.slots >= 0) & ~there).sum())

    def _key(self) -> tuple[Any, ...]:
        filled = self.slots[:, :, : int((self.slots >= 0).sum(axis=2).max(initial=0))]
        return (self.num_experts, self.layers, filled.shape, filled.tobytes())

    def __eq__(self, other: object) -> bool:
        """Return whether every rank keeps the same experts."""
        return self._key() == other._key() if isinstance(other, Placement) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        kept = int((self.slots >= 0).sum(axis=2).max(initial=0))
        layers = f", layers={len(self.layers)}" if self.layers else ""
        return (
            f"Placement(num_experts={self.num_experts}, ranks={self.ranks}{layers}, "
            f"at most {kept} a rank)"
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write an .npz file, which ``load`` reads.

        Parameters
        ----------
        path : str or path-like
            The file, by exactly this name; it is overwritten.

        Raises
        ------
        OSError
            It cannot be written.
        """
        with Path(os.fsdecode(path)).open("wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                slots=self.slots,
                num_experts=np.array(self.num_experts),
                layers=np.array(self.layers, np.int32),
            )

    @staticmethod
    def load(path: str | PathLike[str]) -> Placement:
        """Read a placement that ``save`` wrote.

        Parameters
        ----------
        path : str or path-like
            The file.

        Returns
        -------
        Placement

        Raises
        ------
        FileNotFoundError, OSError
            It is absent or cannot be read.
        FormatError
            It is no placement, or of a newer format.
        """
        place = Path(os.fsdecode(path))
        try:
            with place.open("rb") as file, np.load(file, allow_pickle=False) as data:
                version = int(data["format"])
                slots, layers = data["slots"], data["layers"]
                num_experts = int(data["num_experts"])
        except _NO_ARRAYS as error:
            expected = "a placement by save()"
            raise _wrong(_core.FormatError, str(place), expected, error) from error
        if version != _FORMAT:
            raise _wrong(_core.FormatError, f"{place} format", str(_FORMAT), version)
        try:
            return Placement(slots, num_experts, tuple(int(layer) for layer in layers))
        except _core.Error as error:
            raise _wrong(_core.FormatError, str(place), "a placement", error) from error


def placement_of_lists(
    planned: list[list[list[int]]], experts: int, blocks: tuple[int, ...]
) -> Placement:
    most = max((len(ids) for rank in planned for ids in rank), default=0)
    slots = np.full((len(planned), len(planned[0]), most), -1, np.int64)
    for row, placed in zip(slots, planned, strict=True):
        for rank, ids in enumerate(placed):
            row[rank, : len(ids)] = sorted(ids)
    return Placement(slots, experts, blocks)  # type: ignore[arg-type]

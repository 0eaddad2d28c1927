"""What the pools of a store saw: profiles that can be looked at, saved, and given to new pools."""

from __future__ import annotations

import enum
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of
from moesaic._plots import check_axes, check_picture, new_figure
from moesaic._report import html_table
from moesaic._tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["ExpertProfile", "MoEExecMode", "MoeExecMode"]


#: Of the table that a profile prints as.
_COLUMNS = ("layer", "tokens", "pairs", "effective experts", "most used")

#: What reading a file that is no archive of arrays, or a damaged one, may raise.
_NOT_A_PROFILE = (
    *(ValueError, KeyError, TypeError, EOFError, MemoryError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


class MoeExecMode(str, enum.Enum):
    """How ``ExpertPool.should_refresh`` is asked."""

    Reuse = "reuse"
    """The policy decides."""
    Refresh = "refresh"
    """Forced."""


#: The same by the name that it has in RLX.
MoEExecMode = MoeExecMode


def _wrong(
    kind: type[_core.Error], what: str, expected: str, got: str, method: str = ""
) -> _core.Error:
    """Return the error of a profile, or of a method of it."""
    return error_of(kind, f"ExpertProfile{method}", what, expected, got)


def _integers(name: str, values: Any, *shape: int | None) -> npt.NDArray[Any]:
    """Return values as an array of integers, none negative, with these sizes; None: any."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise _wrong(_core.ShapeError, name, "an array", str(error)) from error
    if array.size and array.dtype.kind not in "iu":
        raise _wrong(_core.DTypeError, name, "integers", str(array.dtype))
    fits = array.ndim == len(shape) and all(
        want is None or want == size for want, size in zip(shape, array.shape, strict=True)
    )
    if not fits or (array < 0).any() or (array > np.iinfo(np.int64).max).any():
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise _wrong(_core.ShapeError, name, f"int64 [{sizes}], none negative", str(array.shape))
    return array


def _stack(counts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return [L, E] of L arrays, the shorter ones with zeros behind."""
    most = max(len(one) for one in counts)
    return np.stack([np.pad(one, (0, most - len(one))) for one in counts])


@dataclass(frozen=True, eq=False)
class ExpertProfile:
    """How often each expert of each layer was used, over all tokens and over time.

    Letters in shapes: L layers, E experts of the layer that has most; the counts of a layer with
    fewer end in zeros.

    Parameters
    ----------
    layer_indices : int32 array [L]
        Block numbers in the model.
    counts : int64 array [L, E]
        Token-expert pairs.
    tokens : int64 array [L]
        Tokens.
    history : tuple of int64 array [rows, E]
        Counts over time of each layer.
    intervals : int64 array [L]
        Forwards per row of the history.
    coactivation : tuple of int64 array [E, E]
        Tokens of each layer that used both experts; or empty.

    Raises
    ------
    ShapeError, DTypeError
        Arrays that do not fit each other, other types than integers, or negative counts.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> profile = mo.ExpertProfile.from_counts(np.array([[0, 5, 1, 7]]))
    >>> pool = mo.ExpertPool(4, 2)
    >>> profile.warm([pool])
    >>> pool.residents.tolist()
    [1, 3]
    """

    layer_indices: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    history: tuple[npt.NDArray[np.int64], ...]
    intervals: npt.NDArray[np.int64]
    coactivation: tuple[npt.NDArray[np.int64], ...]

    def __post_init__(self) -> None:
        layers, most = _integers("counts", self.counts, None, None).shape
        for name in ("layer_indices", "tokens", "intervals"):
            _integers(name, getattr(self, name), layers)
        for name, counts in (("history", (layers,)), ("coactivation", (0, layers))):
            each = getattr(self, name)
            if not isinstance(each, tuple):
                raise _wrong(_core.DTypeError, name, "a tuple of arrays", type(each).__name__)
            if len(each) not in counts:
                raise _wrong(_core.ShapeError, name, f"{layers} arrays", str(len(each)))
        for rows in self.history:
            experts = _integers("history", rows, None, None).shape[1]
            if experts > most:
                raise _wrong(_core.ShapeError, "history", f"at most {most} experts", str(experts))
        for pairs in self.coactivation:
            height, width = _integers("coactivation", pairs, None, None).shape
            if height != width:
                raise _wrong(_core.ShapeError, "coactivation", "[E, E]", f"[{height}, {width}]")

    def _key(self) -> tuple[Any, ...]:
        # Bytes compare and hash as values, which arrays do not.
        values = [getattr(self, field.name) for field in fields(self)]
        lists = [value if isinstance(value, tuple) else (value,) for value in values]
        return tuple(tuple((a.shape, a.tobytes()) for a in arrays) for arrays in lists)

    def __eq__(self, other: object) -> bool:
        """Return whether all arrays are equal."""
        return self._key() == other._key() if isinstance(other, ExpertProfile) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    @staticmethod
    def from_counts(
        counts: npt.ArrayLike, layer_indices: Sequence[int] | None = None
    ) -> ExpertProfile:
        """Return a profile of counts from elsewhere.

        Parameters
        ----------
        counts : int array [L, E]
            Token-expert pairs, none negative.
        layer_indices : sequence of int, optional
            Block number of each layer. None: 0, 1 and so on.

        Returns
        -------
        ExpertProfile

        Raises
        ------
        ShapeError, DTypeError
            Another number of dimensions, a negative count, or other types than integers.
        """
        array = _integers("counts", counts, None, None).astype(np.int64)
        indices = range(len(array)) if layer_indices is None else layer_indices
        return ExpertProfile(
            _integers("layer_indices", indices, len(array)).astype(np.int32),
            array,
            np.zeros(len(array), np.int64),
            tuple(np.zeros((0, array.shape[1]), np.int64) for _ in array),
            np.ones(len(array), np.int64),
            (),
        )

    @staticmethod
    def of_store(store: _core.MoeExpertStore) -> ExpertProfile:
        """Return what the pools that a store runs with have seen.

        Parameters
        ----------
        store : MoeExpertStore
            Layers that run without a pool are left out.

        Returns
        -------
        ExpertProfile

        Raises
        ------
        ConfigError
            No layer runs with a pool.
        DTypeError
            Another object than a store.
        """
        if not isinstance(store, _core.MoeExpertStore):
            raise _wrong(
                _core.DTypeError, "store", "a MoeExpertStore", type(store).__name__, ".of_store"
            )
        used = [
            (layer, pool)
            for layer, pool in zip(store.layers, store.pools(), strict=True)
            if pool is not None
        ]
        if not used:
            raise error_of(
                _core.ConfigError,
                "MoeExpertStore.profile",
                "store",
                "layers that run on pools",
                "none",
                "apply pools or make layers first",
            )
        usages = [pool.usage for _, pool in used]
        pairs = [p for u in usages if (p := u.coactivation) is not None]
        return ExpertProfile(
            np.array([layer.layer_index for layer, _ in used], np.int32),
            _stack([u.counts for u in usages]),
            np.array([u.tokens for u in usages], np.int64),
            tuple(u.history for u in usages),
            np.array([u.interval for u in usages], np.int64),
            tuple(pairs) if len(pairs) == len(usages) else (),
        )

    def warm(self, pools: Sequence[_core.ExpertPool]) -> None:
        """Give each pool its layer's counts as scores, and the placement that they ask for.

        Parameters
        ----------
        pools : sequence of ExpertPool
            One per layer.

        Raises
        ------
        ShapeError, DTypeError
            Another number of pools, a pool of another size, or none; then none has changed.
        """
        if not isinstance(pools, Sequence):
            raise _wrong(_core.DTypeError, "pools", "a sequence", type(pools).__name__, ".warm")
        if len(pools) != len(self.counts):
            expected = f"{len(self.counts)}, one a layer"
            raise _wrong(_core.ShapeError, "pools", expected, str(len(pools)), ".warm")
        experts = [rows.shape[1] for rows in self.history]
        for pool, count in zip(pools, experts, strict=True):
            if not isinstance(pool, _core.ExpertPool):
                raise _wrong(
                    _core.DTypeError, "pool", "an ExpertPool", type(pool).__name__, ".warm"
                )
            if pool.num_experts != count:
                got = str(pool.num_experts)
                raise _wrong(_core.ShapeError, "pool", f"{count} experts", got, ".warm")
        for pool, counts in zip(pools, self.counts, strict=True):
            pool.warm(counts[: pool.num_experts].astype(np.float64).tolist())

    def best_hit_rate(self, budget: int) -> npt.NDArray[np.float64]:
        """Return the hit rate that the best fixed set of experts would have had.

        Parameters
        ----------
        budget : int
            Experts of each layer in fast memory.

        Returns
        -------
        float64 array [L]
            Pairs on the ``budget`` most used experts, as a part of all pairs.
        """
        best = np.sort(self.counts, axis=1)[:, ::-1][:, : max(budget, 0)].sum(axis=1)
        rate: npt.NDArray[np.float64] = best / np.maximum(self.counts.sum(axis=1), 1)
        return rate

    def effective_experts(self) -> npt.NDArray[np.float64]:
        """Return over how many experts the pairs are spread.

        Returns
        -------
        float64 array [L]
            The exponential of the entropy of the counts: E when all experts are used equally
            often, 1 when only one is used.
        """
        share = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        logs = np.log(share, where=share > 0, out=np.zeros_like(share))
        result: npt.NDArray[np.float64] = np.exp(-(share * logs).sum(axis=1))
        return result

    def save(self, path: str | PathLike[str]) -> None:
        """Write the profile as an .npz file, which ``load`` reads.

        Parameters
        ----------
        path : str or path-like
            The file, by exactly this name; it is overwritten.

        Raises
        ------
        OSError
            It cannot be written.
        """
        arrays: dict[str, Any] = {
            "format": np.array(1),
            "layer_indices": self.layer_indices,
            "counts": self.counts,
            "tokens": self.tokens,
            "intervals": self.intervals,
        }
        arrays |= {f"history_{i}": rows for i, rows in enumerate(self.history)}
        arrays |= {f"coactivation_{i}": pairs for i, pairs in enumerate(self.coactivation)}
        with open(os.fspath(path), "wb") as file:  # noqa: PTH123 - bytes too, but no descriptor
            np.savez_compressed(file, **arrays)

    @staticmethod
    def load(path: str | PathLike[str]) -> ExpertProfile:
        """Read a profile that ``save`` wrote.

        Parameters
        ----------
        path : str or path-like
            The file.

        Returns
        -------
        ExpertProfile

        Raises
        ------
        FileNotFoundError, OSError
            It is absent or cannot be read.
        FormatError
            It is no profile.
        """
        name = os.fspath(path)
        try:
            with open(name, "rb") as file, np.load(file, allow_pickle=False) as data:  # noqa: PTH123
                names = set(data.files)
                layers = len(data["counts"])
                return ExpertProfile(
                    data["layer_indices"],
                    data["counts"],
                    data["tokens"],
                    tuple(data[f"history_{i}"] for i in range(layers)),
                    data["intervals"],
                    tuple(
                        data[f"coactivation_{i}"]
                        for i in range(layers)
                        if f"coactivation_{i}" in names
                    ),
                )
        except _NOT_A_PROFILE as error:
            # numpy says of any file that is no .npz one that it cannot be trusted.
            got = str(error) if zipfile.is_zipfile(name) else "no .npz file"
            raise _wrong(
                _core.FormatError, str(path), "a profile by save()", got, ".load"
            ) from error

    def _rows(self) -> list[tuple[str, ...]]:
        """One row a layer: index, tokens, pairs, effective experts, the most used one."""
        return [
            (str(index), str(tokens), str(counts.sum()), f"{spread:.1f}", str(counts.argmax()))
            for index, tokens, counts, spread in zip(
                self.layer_indices, self.tokens, self.counts, self.effective_experts(), strict=True
            )
        ]

    def __repr__(self) -> str:
        layers, experts = self.counts.shape
        pairs = int(self.counts.sum())
        return f"moesaic.ExpertProfile(layers={layers}, experts={experts}, pairs={pairs})"

    def __str__(self) -> str:
        return table(_COLUMNS, self._rows(), left=())

    def _repr_html_(self) -> str:
        """Return one row a layer for a notebook."""
        return html_table(_COLUMNS, self._rows(), "ExpertProfile")

    def plot(
        self, path: str | PathLike[str] | None = None, *, ax: Axes | None = None
    ) -> Figure | SubFigure:
        """Draw a heat map, experts by layers.

        The backend of matplotlib stays as it is: a figure made here belongs to no window, and
        notebooks show what is returned.

        Parameters
        ----------
        path : str or path-like, optional
            A file to write, which is overwritten; its ending says in which format.
        ax : matplotlib.axes.Axes, optional
            Where to draw. None: a figure of its own.

        Returns
        -------
        matplotlib.figure.Figure
            The figure of ``ax``, or the new one.

        Raises
        ------
        UnsupportedError
            matplotlib is missing (the extra ``plot``).
        DTypeError
            ``ax`` cannot be drawn on.
        ConfigError
            An ending of ``path`` that matplotlib has no format for.
        OSError
            The file cannot be written.
        """
        check_picture("ExpertProfile.plot", path)
        check_axes("ExpertProfile.plot", ax)
        share = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        layers, experts = share.shape
        if ax is None:
            size = (min(4 + 0.12 * layers, 16), min(3 + 0.05 * experts, 14))
            ax = new_figure("ExpertProfile.plot", size, "tight").subplots()
        image = ax.imshow(share.T * experts, aspect="auto", interpolation="nearest", cmap="magma")
        across, up = (
            np.unique(np.linspace(0, n - 1, min(n, 12)).astype(int)) for n in (layers, experts)
        )
        ax.set_xticks(across, [str(self.layer_indices[t]) for t in across])
        ax.set_yticks(up)
        ax.set(xlabel="layer", ylabel="expert", title="How much each expert is used")
        figure = ax.figure
        figure.colorbar(image, ax=ax, label="use over the average use of its layer")
        if path is not None:
            # A part of a figure is written as the whole.
            figure.figure.savefig(path, dpi=120)
        return figure

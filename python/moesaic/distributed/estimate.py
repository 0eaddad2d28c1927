"""What a placement costs on given routings, before any machine is rented.

Loads, touched experts and bytes are counted from the ids of the tokens; the time comes from a model
with a latency and a bandwidth for each of network and memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of
from moesaic.distributed.messages import Header, destinations
from moesaic.distributed.placement import Placement


@dataclass(frozen=True)
class Network:
    """How ranks are connected, and how fast one reads its weights."""

    latency: float = 50e-6
    """Seconds of a message."""
    bandwidth: float = 1.1e9
    """Bytes per second in and out of a rank."""
    memory: float = 35e9
    """Bytes of weights per second that a rank reads."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer in bytes and elements."""

    hidden: int
    expert_bytes: int
    x_bytes: int = 4
    """Of an element of x."""
    width: int = 0
    """Of the experts' rows; 0: hidden."""


@dataclass(frozen=True)
class Estimate:
    """A placement on a trace: means over steps, of one layer."""

    ranks: int
    copies: int
    """Experts that all ranks together keep, over E."""
    imbalance: float
    """Pairs of the busiest rank over those of the average one."""
    ranks_per_token: float
    touched: float
    """Experts that the rank reads which reads most."""
    sent_bytes: float
    """Out of the rank that sends most: tokens to experts and rows back."""
    memory_bytes: int
    """Experts of the rank that keeps most."""
    dispatch_s: float
    experts_s: float
    combine_s: float

    @property
    def seconds(self) -> float:
        """A layer and step, without what runs beside the experts."""
        return self.dispatch_s + self.experts_s + self.combine_s


def estimate(
    ids: npt.ArrayLike,
    placement: Placement,
    shape: Shape,
    network: Network | None = None,
    *,
    layer: int | None = None,
    combine: str = "exact",
) -> Estimate:
    """Count what the ranks of a placement do for the tokens of a trace.

    The time of a step is that of its slowest rank: dispatch and combine take a latency for each of
    log2(R) steps of a collective and the bytes of the rank that moves most, the experts the bytes
    of the weights that the rank reads which touches most of them.

    Parameters
    ----------
    ids : int array [steps, T, top_k]
        Experts of the tokens of all ranks, each rank's T / R one behind the other; -1 is skipped.
    placement : Placement
        Who keeps which expert.
    shape : Shape
        Sizes of the layer.
    network : Network, optional
        None: 10 Gbit/s Ethernet and the memory of a small server.
    layer : int, optional
        Block number, where the placement has several.
    combine : str
        'exact' or 'partial', as ``MoeLayer``.

    Returns
    -------
    Estimate

    Raises
    ------
    ShapeError
        Ids of another shape, or of no tokens.
    ConfigError
        Another way to combine, or no such layer.
    """
    network = network or Network()
    table = np.asarray(ids, np.int32)
    if table.ndim != 3 or table.size == 0:
        raise error_of(
            _core.ShapeError, "estimate", "ids", "[steps, T, top_k], none of them 0",
            str(list(table.shape)),
        )  # fmt: skip
    if combine not in ("exact", "partial"):
        raise error_of(_core.ConfigError, "estimate", "combine", "exact | partial", repr(combine))
    ranks = placement.ranks
    copies = placement.copies(layer)
    steps = [_step(one, ranks, copies, shape, combine) for one in table]
    columns = (np.stack(column) for column in zip(*steps, strict=True))
    pairs, touched, tokens_out, sent, received = columns
    hops = max(1, math.ceil(math.log2(max(ranks, 2))))
    front = Header.nbytes(ranks) * ranks
    busiest = np.maximum(sent, received).max(axis=2).mean(axis=0)
    kept = max(len(placement.experts(r, layer)) for r in range(ranks))
    return Estimate(
        ranks=ranks,
        copies=int(copies[0].sum()),
        imbalance=float((pairs.max(axis=1) / np.maximum(pairs.mean(axis=1), 1e-9)).mean()),
        ranks_per_token=float(tokens_out.mean()),
        touched=float(touched.max(axis=1).mean()),
        sent_bytes=float(sent.sum(axis=1).max(axis=1).mean()),
        memory_bytes=kept * shape.expert_bytes,
        dispatch_s=2 * hops * network.latency + (front + float(busiest[0])) / network.bandwidth,
        experts_s=float(touched.max(axis=1).mean()) * shape.expert_bytes / network.memory,
        combine_s=hops * network.latency + float(busiest[1]) / network.bandwidth,
    )


_Counts = npt.NDArray[np.float64]


def _step(
    ids: npt.NDArray[np.int32],
    ranks: int,
    copies: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]],
    shape: Shape,
    combine: str,
) -> tuple[_Counts, _Counts, _Counts, _Counts, _Counts]:
    """Pairs [R], experts touched [R], ranks of a token [1], and bytes out and in [2, R]."""
    tokens, top_k = ids.shape
    source = np.arange(tokens) * ranks // tokens
    to = np.empty_like(ids)
    for rank in np.unique(source):
        own = np.flatnonzero(source == rank)
        to[own] = destinations(ids[own], copies, int(rank), 0)
    there = to >= 0
    pairs = np.bincount(to[there], minlength=ranks).astype(np.float64)
    experts = np.unique(to[there].astype(np.int64) * len(copies[0]) + ids[there])
    touched = np.bincount(experts // len(copies[0]), minlength=ranks).astype(np.float64)
    # One message for each token and rank that computes some of its pairs.
    message = np.unique((np.arange(tokens)[:, None] * np.int64(ranks) + to)[there])
    token, rank = message // ranks, message % ranks
    away = source[token] != rank
    x_row = shape.hidden * shape.x_bytes + 4 * top_k
    row = 4 * (shape.width or shape.hidden)
    out_x = np.bincount(source[token][away], minlength=ranks) * float(x_row)
    in_x = np.bincount(rank[away], minlength=ranks) * float(x_row)
    if combine == "partial":
        back_from, back_to = rank[away], source[token][away]
    else:
        home = np.broadcast_to(source[:, None], to.shape)
        far = there & (home != to)
        back_from, back_to = to[far], home[far]
    out_rows = np.bincount(back_from, minlength=ranks) * float(row)
    in_rows = np.bincount(back_to, minlength=ranks) * float(row)
    each = np.array([len(message) / tokens])
    return pairs, touched, each, np.stack([out_x, out_rows]), np.stack([in_x, in_rows])

"""The rounds of a call: tokens travel to the experts that they ask for, rows come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of
from moesaic.distributed.agreement import OPERATION, Protocol, Settings, mode_of, mode_text
from moesaic.distributed.groups import Bytes
from moesaic.distributed.link import Link
from moesaic.distributed.messages import (
    BAD_ARGUMENTS,
    DTYPES,
    GOOD,
    Floats,
    Header,
    Ints,
    Tokens,
    as_array,
    destinations,
    joined,
)
from moesaic.distributed.placement import Placement

#: Tokens of a rank that travel in the first message of a call, where all ranks get all tokens.
TINY = 4


@dataclass(frozen=True)
class CallFacts:
    """How a call went."""

    protocol: Literal["alltoall", "allgather"]
    """Of the last round."""
    rounds: int
    sent: int
    """Bytes that this rank sent to others."""


@dataclass
class Job:
    """The arguments of one call, checked."""

    x: Bytes  # [T, bytes of a row]
    dtype: str
    routing: _core.Routing
    sums: Floats  # [T, H'], filled round by round

    @property
    def ids(self) -> Ints:
        """[T, top_k]"""
        return np.asarray(self.routing.topk_ids, np.int32)

    @property
    def weights(self) -> Floats:
        """[T, top_k]"""
        return np.asarray(self.routing.topk_weights, np.float32)


@dataclass(frozen=True)
class _Own:
    """The tokens that this rank brings to a round."""

    mine: slice  # of those of the call
    tokens: Tokens
    to: Ints  # [T, top_k], the rank of each pair
    rows: list[npt.NDArray[np.intp]]  # of each rank: the tokens that it gets


class _Wire:
    """The collectives of one call, and the bytes that this rank sent by them."""

    def __init__(self, link: Link, block: int, call: int) -> None:
        self.call, self.sent = call, 0
        self._link, self._block = link, block

    def allgather(self, row: Bytes) -> Bytes:
        self.sent += (self._link.group.size - 1) * len(row)
        return self._link.run(self._block, self.call, lambda group: group.allgather(row))

    def exchange(self, sends: list[Bytes], sizes: list[int]) -> list[Bytes]:
        self.sent += sum(map(len, sends)) - len(sends[self._link.group.rank])
        return self._link.run(self._block, self.call, lambda group: group.exchange(sends, sizes))


class Agreed(Exception):
    """Carries an error that every rank raises, after which calls go on."""

    def __init__(self, error: _core.Error) -> None:
        self.error = error


class Rounds:
    """What the ranks of one layer do together in a call."""

    def __init__(
        self, layer: _core.MoeLayer, block: int, plan: Placement, link: Link, settings: Settings
    ) -> None:
        """As in ``MoeLayer``, with a layer that keeps the experts of this rank."""
        config = layer.config
        self.hidden = int(config.hidden_size)
        self.width = int(layer.stack.hidden_size)
        """Of a row between the experts; another than ``hidden`` in latent layers."""
        self._layer, self._block, self._link, self._settings = layer, block, link, settings
        self._size, self._rank, self._top_k = link.group.size, link.group.rank, int(config.top_k)
        self._copies = plan.copies(block)
        self._on_input = config.router.weight_on == "input"

    def _header(self, call: int, status: int, **fields: Any) -> Header:
        nothing = {"tokens": 0, "rest": 0, "top_k": 1, "dtype": "f32", "rows_to": (0,) * self._size}
        return Header(status, self._block, call, mode_of(self._layer), **{**nothing, **fields})

    def say_bad(self, call: int) -> None:
        """Take part in the call so far that the others know: this rank has no tokens to bring."""
        header = self._header(call, BAD_ARGUMENTS).to_bytes()
        room = np.zeros(self._room(), np.uint8)
        _Wire(self._link, self._block, call).allgather(np.concatenate([header, room]))

    def _room(self) -> int:
        """Bytes behind each header for the first tokens."""
        few = self._settings.protocol == "auto" and self._size <= self._top_k
        if not few and self._settings.protocol != "allgather":
            return 0
        return Tokens.nbytes(TINY, self._top_k, 4 * self.hidden, True)

    @property
    def _weighted(self) -> bool:
        """Whether weights travel with the ids."""
        return self._on_input or self._settings.combine == "partial"

    def run(self, call: int, job: Job) -> CallFacts:
        """Fill job.sums, in as many rounds as some rank needs."""
        wire = _Wire(self._link, self._block, call)
        tokens = len(job.ids)
        step = self._settings.max_tokens or max(tokens, 1)
        rounds, more = 0, True
        while more:
            # All ranks begin a round at one number, so that each knows the number of every token.
            first = rounds * (self._settings.max_tokens or 0)
            more, protocol = self._round(wire, job, first, min(first + step, tokens))
            rounds += 1
        return CallFacts(protocol, rounds, wire.sent)

    def _round(
        self, wire: _Wire, job: Job, first: int, last: int
    ) -> tuple[bool, Literal["alltoall", "allgather"]]:
        """Tokens first .. last - 1 of the job; whether any rank has more, and how they went."""
        own = self._own(job, first, last)
        headers, behind = self._gather_headers(wire, job, own)
        dtype = self._check(wire.call, headers)
        more = any(header.rest for header in headers)
        most = max(header.tokens for header in headers)
        protocol = choose_protocol(self._settings.protocol, self._size, self._top_k, most)
        if most == 0:
            return more, protocol
        row_bytes = self.hidden * DTYPES[dtype]
        if protocol == "allgather":
            arrived = self._by_allgather(wire, own, headers, behind, row_bytes)
        else:
            arrived = self._by_exchange(wire, own, headers, row_bytes)
        answers = self._compute(arrived, dtype)
        self._add(job, own, wire.exchange(answers, self._answer_sizes(own)))
        return more, protocol

    def _own(self, job: Job, first: int, last: int) -> _Own:
        mine = slice(first, last)
        ids = job.ids[mine]
        to = destinations(ids, self._copies, self._rank, first)
        return _Own(
            mine,
            Tokens(job.x[mine], ids, job.weights[mine] if self._weighted else None),
            to,
            [np.flatnonzero((to == r).any(axis=1)) for r in range(self._size)],
        )

    def _gather_headers(self, wire: _Wire, job: Job, own: _Own) -> tuple[list[Header], list[Bytes]]:
        """The headers of all ranks, and what travelled behind them: the tokens, if they are few."""
        tokens = len(own.tokens.ids)
        header = self._header(
            wire.call, GOOD, tokens=tokens, rest=max(len(job.ids) - own.mine.stop, 0),
            top_k=own.tokens.ids.shape[1], dtype=job.dtype, rows_to=tuple(map(len, own.rows)),
        ).to_bytes()  # fmt: skip
        room = np.zeros(self._room(), np.uint8)
        if tokens <= TINY:
            data = own.tokens.to_bytes()
            if len(data) <= len(room):
                room[: len(data)] = data
        gathered = wire.allgather(np.concatenate([header, room]))
        return (
            [Header.of_bytes(row[: len(header)]) for row in gathered],
            [row[len(header) :] for row in gathered],
        )

    def _by_allgather(
        self,
        wire: _Wire,
        own: _Own,
        headers: list[Header],
        behind: list[Bytes],
        row_bytes: int,
    ) -> list[Tokens]:
        """The tokens of each rank that this one computes something for; all ranks get all."""
        sizes = [Tokens.nbytes(h.tokens, h.top_k, row_bytes, self._weighted) for h in headers]
        if max(h.tokens for h in headers) > TINY or max(sizes) > self._room():
            row = np.zeros(max(sizes), np.uint8)
            data = own.tokens.to_bytes()
            row[: len(data)] = data
            behind = list(wire.allgather(row))
        arrived = []
        for rank, (data, header) in enumerate(zip(behind, headers, strict=True)):
            tokens = self._tokens_of(data, header.tokens, header, row_bytes)
            here = destinations(tokens.ids, self._copies, rank, own.mine.start) == self._rank
            arrived.append(tokens.take(np.flatnonzero(here.any(axis=1)), here))
        return arrived

    def _by_exchange(
        self, wire: _Wire, own: _Own, headers: list[Header], row_bytes: int
    ) -> list[Tokens]:
        """The same; a rank gets those alone."""
        sends = [own.tokens.take(own.rows[r], own.to == r).to_bytes() for r in range(self._size)]
        counts = [header.rows_to[self._rank] for header in headers]
        sizes = [
            Tokens.nbytes(count, header.top_k, row_bytes, self._weighted)
            for count, header in zip(counts, headers, strict=True)
        ]
        arrived = zip(wire.exchange(sends, sizes), counts, headers, strict=True)
        return [self._tokens_of(data, n, header, row_bytes) for data, n, header in arrived]

    def _tokens_of(self, data: Bytes, tokens: int, header: Header, row_bytes: int) -> Tokens:
        return Tokens.of_bytes(data, tokens, header.top_k, row_bytes, self._weighted)

    def _check(self, call: int, headers: Sequence[Header]) -> str:
        """The element type of all tokens. Raises what all ranks see and raise alike."""
        bad = {r: "arguments that do not fit" for r, h in enumerate(headers) if h.status != GOOD}
        if bad:
            raise Agreed(self._link.left(self._block, call, bad))
        first = headers[0]
        for rank, header in enumerate(headers):
            for name in ("block", "call", "mode"):
                mine, other = getattr(first, name), getattr(header, name)
                if mine != other:
                    self._disagree(name, rank, mine, other)
        typed = [(r, h.dtype) for r, h in enumerate(headers) if h.tokens]
        for rank, dtype in typed:
            if dtype != typed[0][1]:
                self._disagree("x.dtype", rank, typed[0][1], dtype)
        return typed[0][1] if typed else "f32"

    def _disagree(self, name: str, rank: int, mine: object, other: object) -> None:
        what = {"block": "layer", "mode": "precision and batch_invariant"}.get(name, name)
        if name == "mode":
            mine, other = mode_text(mine), mode_text(other)
        raise Agreed(
            error_of(
                _core.ConfigError, OPERATION,
                f"{what} of rank {rank} on {self._link.hosts[rank]}", f"{mine}, as others have",
                str(other), "all ranks make the same calls",
            )
        )  # fmt: skip

    def _compute(self, arrived: list[Tokens], dtype: str) -> list[Bytes]:
        """What goes back to each rank: rows of its pairs, or sums of its tokens, f32 [n, H']."""
        every = joined(arrived)
        ones = np.ones(every.ids.shape, np.float32)
        routing = _core.Routing(every.ids, ones if every.weights is None else every.weights)
        here = every.ids >= 0
        rows = np.zeros((0, self.width), np.float32)
        if here.any():
            rows = np.asarray(self._layer.expert_rows(as_array(every.x, dtype), routing))
        tokens = [len(part.ids) for part in arrived]
        ends = np.cumsum(tokens)
        if self._settings.combine == "exact":
            pairs = np.concatenate([[0], np.cumsum(here.sum(axis=1))]).astype(np.intp)
            cuts = pairs[ends]
            values = rows
        else:
            spread = np.zeros((*every.ids.shape, self.width), np.float32)
            spread[here] = rows
            if self._on_input:
                routing = _core.Routing(every.ids, ones)
            values = _core.weighted_sum(spread, routing)
            cuts = ends
        parts = np.split(values, cuts[:-1])
        return [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts]

    def _answer_sizes(self, own: _Own) -> list[int]:
        if self._settings.combine == "partial":
            return [4 * self.width * len(one) for one in own.rows]
        return [4 * self.width * int((own.to == r).sum()) for r in range(self._size)]

    def _add(self, job: Job, own: _Own, back: list[Bytes]) -> None:
        """Sum what came back: pairs by slot, or the sums of ranks by rank."""
        values = [one.view(np.float32).reshape(-1, self.width) for one in back]
        sums = job.sums[own.mine]
        if self._settings.combine == "partial":
            for at, one in zip(own.rows, values, strict=True):
                sums[at] += one
            return
        if not own.to.size:
            return
        pairs = np.zeros((*own.to.shape, self.width), np.float32)
        for r, one in enumerate(values):
            pairs[own.to == r] = one
        weights = job.weights[own.mine]
        if self._on_input:
            weights = np.ones_like(weights)
        # Identity experts have no rows: they are added with the rest.
        ids = np.where(own.to >= 0, np.int32(0), np.int32(-1))
        _core.weighted_sum(pairs, _core.Routing(ids, weights), out=sums)


def choose_protocol(
    asked: Protocol, ranks: int, top_k: int, most_tokens: int
) -> Literal["alltoall", "allgather"]:
    """How tokens travel in a round: a function of sizes that all ranks know.

    ``most_tokens`` is that of the rank with most of them.
    """
    if asked != "auto":
        return asked
    return "allgather" if ranks <= top_k and most_tokens <= TINY else "alltoall"

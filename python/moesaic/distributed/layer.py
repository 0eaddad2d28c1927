"""A layer whose experts are spread over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of
from moesaic.distributed.groups import Bytes, Group, group_of
from moesaic.distributed.link import Link, RankError, agree
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

Combine: TypeAlias = Literal["exact", "partial"]
Protocol: TypeAlias = Literal["auto", "alltoall", "allgather"]

#: Tokens of a rank that travel in the first message of a call, where all ranks get all tokens.
TINY = 4
_OPERATION = "distributed.MoeLayer"
_COMBINES, _PROTOCOLS = ("exact", "partial"), ("auto", "alltoall", "allgather")


@dataclass(frozen=True)
class CallFacts:
    """How a call went."""

    protocol: Literal["alltoall", "allgather"]
    """Of the last round."""
    rounds: int
    sent: int
    """Bytes that this rank sent to others."""


@dataclass
class _Job:
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


class MoeLayer:
    """A layer over many ranks: each brings its own tokens and gets their results.

    All ranks make and call it together, with as many tokens as each has, which may be none. Open it
    with ``from_gguf`` or ``from_safetensors``. Not for several threads of a process at once.

    With ``combine='exact'`` the rows of all pairs come back and are summed where the token is from,
    in the order of its slots: with a given precision or ``tuning(batch_invariant=True)`` results
    are those of one process, bit for bit, whatever the ranks and the placement. With 'partial' each
    rank sums what it computed for a token, which sends fewer bytes and differs by about 1e-7.

    Examples
    --------
    >>> import moesaic as mo, numpy as np  # doctest: +SKIP
    >>> import torch.distributed
    >>> from moesaic import distributed
    >>> torch.distributed.init_process_group("gloo")
    >>> plan = distributed.plan_experts(np.ones(128), ranks=torch.distributed.get_world_size())
    >>> with distributed.MoeLayer.from_gguf("model.gguf", 0, plan) as layer:
    ...     y = layer(x)
    """

    def __init__(
        self,
        layer: _core.MoeLayer,
        plan: Placement,
        group: Any = None,
        *,
        combine: Combine = "exact",
        protocol: Protocol = "auto",
        timeout: float = 30.0,
        max_tokens: int | None = None,
    ) -> None:
        """Spread a layer that each rank has opened with its own experts.

        Parameters
        ----------
        layer : moesaic.MoeLayer
            Whose stack keeps at least the experts that ``plan`` gives to this rank.
        plan, group, combine, protocol, timeout, max_tokens
            As in ``from_gguf``.

        Raises
        ------
        ConfigError, RankError
            As ``from_gguf``.
        """
        settings = _Settings(combine, protocol, max_tokens)
        link = Link.of(group_of(group, timeout, _OPERATION))
        self._open(lambda rank: layer, plan, link, settings, "", layer.config.layer)

    def _open(
        self,
        load: Callable[[int], _core.MoeLayer],
        plan: Placement,
        link: Link,
        settings: _Settings,
        source: object,
        block: int,
    ) -> None:
        link.check()
        group = link.group
        facts: dict[str, Any] = dict.fromkeys(_FACTS, "")
        problem: BaseException | None = None
        try:
            settings.check(plan, group, block)
            layer = load(group.rank)
            _check_kept(layer, plan, group.rank, block)
            facts |= _facts_of(layer, plan, settings, source, block)
        except (_core.Error, OSError, MemoryError) as error:
            problem = error
        agree(link, block, facts, problem)
        if problem is not None:
            raise problem
        self.layer = layer
        self.plan = plan
        self.block = block
        self.combine: Combine = settings.combine
        self.protocol: Protocol = settings.protocol
        self.max_tokens = settings.max_tokens
        self.last_call: CallFacts | None = None
        self._link = link
        self._calls = 0
        self._copies = plan.copies(block)
        config = layer.config
        self._hidden = int(config.hidden_size)
        self._width = int(layer.stack.hidden_size)
        self._on_input = config.router.weight_on == "input"

    @staticmethod
    def from_gguf(
        file: _core.GgufFile | str | PathLike[str],
        block: int,
        plan: Placement,
        group: Any = None,
        *,
        combine: Combine = "exact",
        protocol: Protocol = "auto",
        timeout: float = 30.0,
        max_tokens: int | None = None,
        **options: Any,
    ) -> MoeLayer:
        """Open a layer of a GGUF file; each rank reads the experts that it keeps, and no others.

        Parameters
        ----------
        file : GgufFile or path
            The model, the same for every rank.
        block : int
            Block number.
        plan : Placement
            Which experts each rank keeps, for as many ranks as there are.
        group : TorchGroup, MpiComm, torch ProcessGroup or mpi4py Comm, optional
            Who takes part. None: all ranks of torch.distributed.
        combine : str
            'exact' or 'partial', as the class says.
        protocol : str
            How tokens travel: 'alltoall' sends each to the ranks that it needs, 'allgather' to all;
            'auto' does the latter for at most 4 tokens a rank on at most top_k ranks, which then
            takes one message less.
        timeout : float
            Seconds that a rank waits for the others. Of a TorchGroup or MpiComm its own holds.
        max_tokens : int, optional
            Tokens of a rank in one round. Calls with more take several, so that buffers stay below
            ranks * max_tokens tokens and their pairs. None: all at once.
        **options
            As in ``moesaic.MoeLayer.from_gguf``, but for ``experts`` and ``device``.

        Returns
        -------
        MoeLayer

        Raises
        ------
        ConfigError
            A plan of other sizes; or ranks that differ in the file, the plan, the precision or
            another argument: the message names the rank and what.
        RankError
            A rank did not come within the timeout, or could not open its part.
        FileNotFoundError, OSError, FormatError, UnsupportedError, ShapeError, OutOfMemoryError
            As in ``moesaic.MoeLayer.from_gguf``.
        """
        settings = _Settings(combine, protocol, max_tokens)
        link = Link.of(group_of(group, timeout, f"{_OPERATION}.from_gguf"))
        opened = [file] if isinstance(file, _core.GgufFile) else []

        def load(rank: int) -> _core.MoeLayer:
            if not opened:
                opened.append(_core.GgufFile(file))  # type: ignore[arg-type]
            kept = plan.experts(rank, block)
            return _core.MoeLayer.from_gguf(opened[0], block, experts=kept, **options)

        made = MoeLayer.__new__(MoeLayer)
        made._open(
            load, plan, link, settings, _Lazy(lambda: _source(_hash_of(opened[0]), options)), block
        )
        return made

    @staticmethod
    def from_safetensors(
        path: str | PathLike[str],
        block: int,
        plan: Placement,
        group: Any = None,
        *,
        combine: Combine = "exact",
        protocol: Protocol = "auto",
        timeout: float = 30.0,
        max_tokens: int | None = None,
        **options: Any,
    ) -> MoeLayer:
        """Open a layer of a Hugging Face checkpoint; each rank reads the experts that it keeps.

        Parameters
        ----------
        path : path
            The folder of the checkpoint, the same for every rank.
        block : int
            Number of the layer.
        plan, group, combine, protocol, timeout, max_tokens
            As in ``from_gguf``.
        **options
            As in ``moesaic.MoeLayer.from_safetensors``, but for ``experts`` and ``device``.

        Returns
        -------
        MoeLayer

        Raises
        ------
        ConfigError, RankError
            As ``from_gguf``.
        FileNotFoundError, OSError, FormatError, UnsupportedError, ShapeError, OutOfMemoryError
            As in ``moesaic.MoeLayer.from_safetensors``.
        """
        settings = _Settings(combine, protocol, max_tokens)
        link = Link.of(group_of(group, timeout, f"{_OPERATION}.from_safetensors"))

        def load(rank: int) -> _core.MoeLayer:
            kept = plan.experts(rank, block)
            return _core.MoeLayer.from_safetensors(path, block, experts=kept, **options)

        made = MoeLayer.__new__(MoeLayer)
        made._open(
            load, plan, link, settings,
            _Lazy(lambda: _source(_checkpoint_hash(path, block), options)), block,
        )  # fmt: skip
        return made

    @property
    def rank(self) -> int:
        """The number of the process, 0 to size - 1."""
        return self._link.group.rank

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._link.group.size

    @property
    def config(self) -> _core.MoeConfig:
        """Facts of the whole layer."""
        return self.layer.config

    def close(self) -> None:
        """Let go of this rank's part. The others' stay."""
        self.layer.close()

    def __enter__(self) -> MoeLayer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        kept = len(self.layer.stack.experts)
        return (
            f"moesaic.distributed.MoeLayer(layer={self.block}, rank {self.rank} of {self.size}, "
            f"{kept} of {self.config.num_experts} experts, combine={self.combine!r})"
        )

    def __call__(
        self,
        x: Any,
        router_logits: Any = None,
        *,
        routing: _core.Routing | None = None,
        topk_ids: Any = None,
        token_ids: Any = None,
        router_input: Any = None,
        return_routing: bool = False,
        out: Any = None,
        accumulate: bool = False,
    ) -> Any:
        """Run the layer on this rank's tokens. All ranks call it together.

        Parameters
        ----------
        x : array [..., H]
            f32, f16 or bf16 in host memory, of one type on all ranks; without tokens too.
        router_logits, routing, topk_ids, token_ids, router_input, return_routing, out, accumulate
            As in a call of ``moesaic.MoeLayer``.

        Returns
        -------
        array [..., H]
            As a call of ``moesaic.MoeLayer``.

        Raises
        ------
        RankError
            A rank died, hung or gave up; within the timeout and two seconds, and ``out`` is as it
            was. Later calls raise it at once; not after mere arguments of another rank that do not
            fit.
        ConfigError
            Ranks that call with another precision, or another type of ``x``.
        ShapeError, DTypeError, DeviceError
            Arguments of this rank that do not fit; the other ranks get a RankError.
        """
        call, self._calls = self._calls, self._calls + 1
        self._link.check()
        try:
            job = self._prepare(
                x, router_logits, routing, topk_ids, token_ids, router_input, out, accumulate
            )
        except (_core.Error, TypeError, ValueError):
            self._say_bad(call)
            raise
        try:
            self._run(call, job)
        except _Agreed as agreed:
            raise agreed.error from None
        except RankError:
            raise
        except BaseException as error:
            self._link.give_up(self.block, call, error)
            raise
        result = self._finish(job, x, out, accumulate)
        return (result, job.routing) if return_routing else result

    def _prepare(
        self,
        x: Any,
        router_logits: Any,
        routing: _core.Routing | None,
        topk_ids: Any,
        token_ids: Any,
        router_input: Any,
        out: Any,
        accumulate: bool,
    ) -> _Job:
        array = _core.asarray(x)
        if array.dtype not in DTYPES:
            raise _bad(_core.DTypeError, "x.dtype", "f32, f16 or bf16", array.dtype)
        if not array.shape or array.shape[-1] != self._hidden:
            raise _bad(_core.ShapeError, "x.shape", f"[..., {self._hidden}]", list(array.shape))
        if accumulate and out is None:
            raise _bad(_core.ConfigError, "accumulate", "an out= to add to", "none")
        if out is not None:
            _check_out(out, array)
        tokens = int(np.prod(array.shape[:-1]))
        others = (router_logits, topk_ids, token_ids, router_input)
        if routing is None:
            routing = self.layer.route(
                x, router_logits, topk_ids=topk_ids, token_ids=token_ids, router_input=router_input
            )
        elif any(other is not None for other in others):
            raise _bad(_core.ConfigError, "routing", "a routing alone", "more beside it")
        if routing.num_tokens != tokens:
            raise _bad(_core.ShapeError, "routing", f"{tokens} tokens", routing.num_tokens)
        ids = np.asarray(routing.topk_ids)
        most = self.config.router.num_experts
        if ids.size and not -1 <= ids.min() <= ids.max() < most:
            outside = ids[(ids < -1) | (ids >= most)][0]
            raise _bad(_core.ShapeError, "topk_ids", f"-1 to {most - 1}", outside)
        rows = np.ascontiguousarray(np.asarray(array)).view(np.uint8)
        row_bytes = self._hidden * DTYPES[array.dtype]
        sums = np.zeros((tokens, self._width), np.float32)
        return _Job(rows.reshape(tokens, row_bytes), array.dtype, routing, sums)

    def _header(self, call: int, status: int, **fields: Any) -> Header:
        nothing = {"tokens": 0, "rest": 0, "top_k": 1, "dtype": "f32", "rows_to": (0,) * self.size}
        return Header(status, self.block, call, _mode(self.layer), **{**nothing, **fields})

    def _say_bad(self, call: int) -> None:
        """Take part in the call so far that the others know: this rank has no tokens to bring."""
        header = self._header(call, BAD_ARGUMENTS).to_bytes()
        room = np.zeros(self._room(), np.uint8)
        _Wire(self._link, self.block, call).allgather(np.concatenate([header, room]))

    def _room(self) -> int:
        """Bytes behind each header for the first tokens."""
        few = self.protocol == "auto" and self.size <= self.config.top_k
        if not few and self.protocol != "allgather":
            return 0
        return Tokens.nbytes(TINY, self.config.top_k, 4 * self._hidden, True)

    @property
    def _weighted(self) -> bool:
        """Whether weights travel with the ids."""
        return self._on_input or self.combine == "partial"

    def _run(self, call: int, job: _Job) -> None:
        """Fill job.sums, in as many rounds as some rank needs."""
        wire = _Wire(self._link, self.block, call)
        tokens = len(job.ids)
        step = self.max_tokens or max(tokens, 1)
        rounds, more = 0, True
        while more:
            # Of all ranks the same, so that each knows the number of every token.
            first = rounds * (self.max_tokens or 0)
            more, protocol = self._round(wire, job, first, min(first + step, tokens))
            rounds += 1
        self.last_call = CallFacts(protocol, rounds, wire.sent)

    def _round(
        self, wire: _Wire, job: _Job, first: int, last: int
    ) -> tuple[bool, Literal["alltoall", "allgather"]]:
        """Tokens first .. last - 1 of the job; whether any rank has more, and how they went."""
        own = self._own(job, first, last)
        headers, behind = self._gather_headers(wire, job, own)
        dtype = self._check(wire.call, headers)
        more = any(header.rest for header in headers)
        most = max(header.tokens for header in headers)
        protocol = choose_protocol(self.protocol, self.size, self.config.top_k, most)
        if most == 0:
            return more, protocol
        row_bytes = self._hidden * DTYPES[dtype]
        if protocol == "allgather":
            arrived = self._by_allgather(wire, own, headers, behind, row_bytes)
        else:
            arrived = self._by_exchange(wire, own, headers, row_bytes)
        answers = self._compute(arrived, dtype)
        self._add(job, own, wire.exchange(answers, self._answer_sizes(own)))
        return more, protocol

    def _own(self, job: _Job, first: int, last: int) -> _Own:
        mine = slice(first, last)
        ids = job.ids[mine]
        to = destinations(ids, self._copies, self.rank, first)
        return _Own(
            mine,
            Tokens(job.x[mine], ids, job.weights[mine] if self._weighted else None),
            to,
            [np.flatnonzero((to == r).any(axis=1)) for r in range(self.size)],
        )

    def _gather_headers(
        self, wire: _Wire, job: _Job, own: _Own
    ) -> tuple[list[Header], list[Bytes]]:
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
            here = destinations(tokens.ids, self._copies, rank, own.mine.start) == self.rank
            arrived.append(tokens.take(np.flatnonzero(here.any(axis=1)), here))
        return arrived

    def _by_exchange(
        self, wire: _Wire, own: _Own, headers: list[Header], row_bytes: int
    ) -> list[Tokens]:
        """The same; a rank gets those alone."""
        sends = [own.tokens.take(own.rows[r], own.to == r).to_bytes() for r in range(self.size)]
        counts = [header.rows_to[self.rank] for header in headers]
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
            raise _Agreed(self._link.left(self.block, call, bad))
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
            mine, other = _mode_text(mine), _mode_text(other)
        raise _Agreed(
            error_of(
                _core.ConfigError, _OPERATION,
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
        rows = np.zeros((0, self._width), np.float32)
        if here.any():
            rows = np.asarray(self.layer.expert_rows(as_array(every.x, dtype), routing))
        tokens = [len(part.ids) for part in arrived]
        ends = np.cumsum(tokens)
        if self.combine == "exact":
            pairs = np.concatenate([[0], np.cumsum(here.sum(axis=1))]).astype(np.intp)
            cuts = pairs[ends]
            values = rows
        else:
            spread = np.zeros((*every.ids.shape, self._width), np.float32)
            spread[here] = rows
            if self._on_input:
                routing = _core.Routing(every.ids, ones)
            values = _core.weighted_sum(spread, routing)
            cuts = ends
        parts = np.split(values, cuts[:-1])
        return [np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts]

    def _answer_sizes(self, own: _Own) -> list[int]:
        if self.combine == "partial":
            return [4 * self._width * len(one) for one in own.rows]
        return [4 * self._width * int((own.to == r).sum()) for r in range(self.size)]

    def _add(self, job: _Job, own: _Own, back: list[Bytes]) -> None:
        """Sum what came back: pairs by slot, or the sums of ranks by rank."""
        values = [one.view(np.float32).reshape(-1, self._width) for one in back]
        sums = job.sums[own.mine]
        if self.combine == "partial":
            for at, one in zip(own.rows, values, strict=True):
                sums[at] += one
            return
        if not own.to.size:
            return
        pairs = np.zeros((*own.to.shape, self._width), np.float32)
        for r, one in enumerate(values):
            pairs[own.to == r] = one
        weights = job.weights[own.mine]
        if self._on_input:
            weights = np.ones_like(weights)
        # Identity experts have no rows: they are added with the rest.
        ids = np.where(own.to >= 0, np.int32(0), np.int32(-1))
        _core.weighted_sum(pairs, _core.Routing(ids, weights), out=sums)

    def _finish(self, job: _Job, x: Any, out: Any, accumulate: bool) -> Any:
        """The rest of the layer, from sums that stand for the one pair of each token."""
        ids = job.ids
        experts = self.config.num_experts
        one = ((ids >= 0) & (ids < experts)).any(axis=1)
        first = np.where(one, np.int32(0), np.int32(-1))[:, None]
        identity = np.where(ids >= experts, ids, np.int32(-1))
        weights = job.weights
        routing = _core.Routing(
            np.concatenate([first, identity], axis=1),
            np.concatenate([np.ones((len(ids), 1), np.float32), weights], axis=1),
        )
        rows = job.sums[one]
        return self.layer.finish(rows, routing, x, out=out, accumulate=accumulate)


def choose_protocol(
    asked: Protocol, ranks: int, top_k: int, most_tokens: int
) -> Literal["alltoall", "allgather"]:
    """How tokens travel in a round: a function of sizes that all ranks know.

    ``most_tokens`` is that of the rank with most of them.
    """
    if asked != "auto":
        return asked
    return "allgather" if ranks <= top_k and most_tokens <= TINY else "alltoall"


class _Agreed(Exception):
    """Carries an error that every rank raises, after which calls go on."""

    def __init__(self, error: _core.Error) -> None:
        self.error = error


@dataclass(frozen=True)
class _Settings:
    """What a caller asks of a layer beside its weights."""

    combine: Combine
    protocol: Protocol
    max_tokens: int | None

    def check(self, plan: Placement, group: Group, block: int) -> None:
        for name, value, known in (
            ("combine", self.combine, _COMBINES),
            ("protocol", self.protocol, _PROTOCOLS),
        ):
            if value not in known:
                raise _bad(_core.ConfigError, name, " | ".join(known), repr(value))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise _bad(_core.ConfigError, "max_tokens", "at least 1, or None", self.max_tokens)
        if not isinstance(plan, Placement):
            raise _bad(_core.DTypeError, "plan", "a Placement", type(plan).__name__)
        if plan.ranks != group.size:
            raise _bad(_core.ConfigError, "plan.ranks", f"{group.size}, as there are", plan.ranks)
        plan.experts(0, block)


class _Lazy:
    """A text that is made when it is asked for."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make

    def __str__(self) -> str:
        return self._make()


#: What ranks compare when they open a layer.
_FACTS = ("version", "source", "config", "plan", "precision", "settings", "isa")


def _facts_of(
    layer: _core.MoeLayer, plan: Placement, settings: _Settings, source: object, block: int
) -> dict[str, str]:
    import moesaic

    kept = plan.slots[0] if not plan.layers else plan.slots[plan.layers.index(block)]
    return {
        "version": moesaic.__version__,
        "source": str(source),
        "config": _digest(repr(layer.config.to_dict())),
        "plan": _digest(repr((plan.num_experts, kept.tolist()))),
        "precision": layer.precision,
        "settings": f"{settings.combine}, {settings.protocol}, max_tokens {settings.max_tokens}",
        "isa": _instruction_set(layer) if settings.combine == "exact" else "any",
    }


def _instruction_set(layer: _core.MoeLayer) -> str:
    """What the bits of a layer depend on beside the weights: kernels end in its name."""
    return _core.explain(layer, 1)["up kernel"].rpartition("_")[2]


def _check_kept(layer: _core.MoeLayer, plan: Placement, rank: int, block: int) -> None:
    if plan.num_experts != layer.config.num_experts:
        expected = f"{layer.config.num_experts}, as the layer has"
        raise _bad(_core.ConfigError, "plan.num_experts", expected, plan.num_experts)
    lacking = sorted(set(plan.experts(rank, block)) - set(layer.stack.experts))
    if lacking:
        expected = "all that the plan gives to this rank"
        raise _bad(_core.ConfigError, "layer.stack.experts", expected, f"none of {lacking[:8]}")


def _check_out(out: Any, x: _core.Array) -> None:
    """What finish() would refuse, before anything is sent."""
    given = _core.asarray(out)
    if given.shape != x.shape:
        raise _bad(_core.ShapeError, "out.shape", list(x.shape), list(given.shape))
    if given.dtype not in DTYPES:
        raise _bad(_core.DTypeError, "out.dtype", "f32, f16 or bf16", given.dtype)
    if given.readonly:
        raise _bad(_core.ConfigError, "out", "memory that can be written", "read-only memory")


def _bad(kind: type[_core.Error], what: str, expected: object, got: object) -> _core.Error:
    return error_of(kind, _OPERATION, what, str(expected), str(got))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _source(found: str, options: dict[str, Any]) -> str:
    """What was read, and how."""
    elsewhere = ("precision", "progress")
    said = {name: repr(options[name]) for name in sorted(options) if name not in elsewhere}
    return f"{found}, options {_digest(repr(said))}" if said else found


def _hash_of(file: _core.GgufFile) -> str:
    """The names, types and places of all tensors, and the metadata."""
    return f"hash {file._source().tensors:x}"  # type: ignore[attr-defined]


def _checkpoint_hash(path: str | PathLike[str], block: int) -> str:
    from moesaic._pickling import CheckpointSource
    from moesaic.safetensors.reader import Checkpoint
    from moesaic.safetensors.sets import of_layer

    source = CheckpointSource(path, block, None)
    source.note(of_layer(Checkpoint(path), block, None))
    return f"hash {source.tensors[:16]}"


_PRECISIONS = ("auto", "exact", "fast")


def _mode(layer: _core.MoeLayer) -> int:
    """How numbers are made in this context, as one number."""
    tuning = _core.current_tuning()
    asked = tuning.precision if layer.precision == "auto" else layer.precision
    return 2 * _PRECISIONS.index(asked) + int(tuning.batch_invariant)


def _mode_text(mode: object) -> str:
    assert isinstance(mode, int)
    return f"{_PRECISIONS[mode // 2]}{', batch_invariant' if mode % 2 else ''}"

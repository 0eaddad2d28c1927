"""A layer whose experts are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from types import TracebackType
from typing import Any

import numpy as np

from moesaic import _core
from moesaic.distributed.agreement import (
    FACTS,
    OPERATION,
    Combine,
    LazyText,
    Protocol,
    Settings,
    check_kept,
    checkpoint_hash,
    facts_of,
    gguf_hash,
    refusal,
    source_text,
)
from moesaic.distributed.groups import group_of
from moesaic.distributed.link import Link, RankError, agree
from moesaic.distributed.messages import DTYPES
from moesaic.distributed.placement import Placement
from moesaic.distributed.rounds import Agreed, CallFacts, Job, Rounds


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
        settings = Settings(combine, protocol, max_tokens)
        link = Link.of(group_of(group, timeout, OPERATION))
        self._open(lambda rank: layer, plan, link, settings, "", layer.config.layer)

    def _open(
        self,
        load: Callable[[int], _core.MoeLayer],
        plan: Placement,
        link: Link,
        settings: Settings,
        source: object,
        block: int,
    ) -> None:
        link.check()
        group = link.group
        facts: dict[str, Any] = dict.fromkeys(FACTS, "")
        problem: BaseException | None = None
        try:
            settings.check(plan, group, block)
            layer = load(group.rank)
            check_kept(layer, plan, group.rank, block)
            facts |= facts_of(layer, plan, settings, source, block)
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
        self._rounds = Rounds(layer, block, plan, link, settings)

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
        settings = Settings(combine, protocol, max_tokens)
        link = Link.of(group_of(group, timeout, f"{OPERATION}.from_gguf"))
        opened = [file] if isinstance(file, _core.GgufFile) else []

        def load(rank: int) -> _core.MoeLayer:
            if not opened:
                opened.append(_core.GgufFile(file))  # type: ignore[arg-type]
            kept = plan.experts(rank, block)
            return _core.MoeLayer.from_gguf(opened[0], block, experts=kept, **options)

        made = MoeLayer.__new__(MoeLayer)
        made._open(
            load,
            plan,
            link,
            settings,
            LazyText(lambda: source_text(gguf_hash(opened[0]), options)),
            block,
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
        settings = Settings(combine, protocol, max_tokens)
        link = Link.of(group_of(group, timeout, f"{OPERATION}.from_safetensors"))

        def load(rank: int) -> _core.MoeLayer:
            kept = plan.experts(rank, block)
            return _core.MoeLayer.from_safetensors(path, block, experts=kept, **options)

        made = MoeLayer.__new__(MoeLayer)
        made._open(
            load, plan, link, settings,
            LazyText(lambda: source_text(checkpoint_hash(path, block), options)), block,
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
            self._rounds.say_bad(call)
            raise
        try:
            self.last_call = self._rounds.run(call, job)
        except Agreed as agreed:
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
    ) -> Job:
        array = _core.asarray(x)
        if array.dtype not in DTYPES:
            raise refusal(_core.DTypeError, "x.dtype", "f32, f16 or bf16", array.dtype)
        if not array.shape or array.shape[-1] != self._rounds.hidden:
            raise refusal(
                _core.ShapeError, "x.shape", f"[..., {self._rounds.hidden}]", list(array.shape)
            )
        if accumulate and out is None:
            raise refusal(_core.ConfigError, "accumulate", "an out= to add to", "none")
        if out is not None:
            _check_out(out, array)
        tokens = int(np.prod(array.shape[:-1]))
        others = (router_logits, topk_ids, token_ids, router_input)
        if routing is None:
            routing = self.layer.route(
                x, router_logits, topk_ids=topk_ids, token_ids=token_ids, router_input=router_input
            )
        elif any(other is not None for other in others):
            raise refusal(_core.ConfigError, "routing", "a routing alone", "more beside it")
        if routing.num_tokens != tokens:
            raise refusal(_core.ShapeError, "routing", f"{tokens} tokens", routing.num_tokens)
        ids = np.asarray(routing.topk_ids)
        most = self.config.router.num_experts
        if ids.size and not -1 <= ids.min() <= ids.max() < most:
            outside = ids[(ids < -1) | (ids >= most)][0]
            raise refusal(_core.ShapeError, "topk_ids", f"-1 to {most - 1}", outside)
        rows = np.ascontiguousarray(np.asarray(array)).view(np.uint8)
        row_bytes = self._rounds.hidden * DTYPES[array.dtype]
        sums = np.zeros((tokens, self._rounds.width), np.float32)
        return Job(rows.reshape(tokens, row_bytes), array.dtype, routing, sums)

    def _finish(self, job: Job, x: Any, out: Any, accumulate: bool) -> Any:
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


def _check_out(out: Any, x: _core.Array) -> None:
    """What finish() would refuse, before anything is sent."""
    given = _core.asarray(out)
    if given.shape != x.shape:
        raise refusal(_core.ShapeError, "out.shape", list(x.shape), list(given.shape))
    if given.dtype not in DTYPES:
        raise refusal(_core.DTypeError, "out.dtype", "f32, f16 or bf16", given.dtype)
    if given.readonly:
        raise refusal(_core.ConfigError, "out", "memory that can be written", "read-only memory")

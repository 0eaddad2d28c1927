"""A transport with an end: after a failure every rank knows who failed, and none waits again."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic.distributed.groups import Bytes, Group

_T = TypeVar("_T")

#: Seconds beyond the timeout in which ranks that are alive say so; with it an error comes within
#: the timeout and two seconds.
_GRACE = 1.5
#: Seconds in which a store answers that is there.
_ANSWER = 0.3
#: Bytes of a text of a rank.
_TEXT = 96
#: How a rank begins that leaves a call for a reason of its own.
_GAVE_UP = "gave up"


class RankError(_core.DeviceError):
    """A rank did not take part in a call, or gave up; names the layer, the call, rank and host.

    Attributes
    ----------
    layer : int
        Block number.
    call : int
        Calls of this layer before it; -1: it was being opened.
    ranks : tuple of int
        The ranks that failed.
    hosts : tuple of str
        Their hosts.
    """

    layer: int = -1
    call: int = -1
    ranks: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()


def texts_to_bytes(texts: list[str]) -> Bytes:
    """Texts in rows of one length, cut where they are too long."""
    rows = [text.encode(errors="replace")[:_TEXT].ljust(_TEXT, b"\0") for text in texts]
    return np.frombuffer(bytearray(b"".join(rows)), np.uint8)


def texts_of_bytes(row: Bytes) -> list[str]:
    return [bytes(one).rstrip(b"\0").decode(errors="replace") for one in row.reshape(-1, _TEXT)]


class Link:
    """Calls the collectives of a group, and makes of their errors what they mean."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.hosts = [f"rank {r}" for r in range(group.size)]
        self.failure: RankError | None = None

    @staticmethod
    def of(group: Group) -> Link:
        """The one link of a group: a failure in one layer is one of all that use the group."""
        link = getattr(group, "_moesaic_link", None)
        if link is None:
            link = Link(group)
            group._moesaic_link = link  # type: ignore[attr-defined]
        return link

    def run(self, layer: int, call: int, step: Callable[[Group], _T]) -> _T:
        """Run one or more collectives. Raises RankError within the timeout and two seconds."""
        self.check()
        start = time.monotonic()
        try:
            return step(self.group)
        except _core.Error:
            raise
        except Exception as error:
            self.failure = self._find_missing(layer, call, start, error)
            raise self.failure from error

    def check(self) -> None:
        """Raises RankError where a call has failed before."""
        if self.failure is not None:
            raise self._error(self.failure.layer, self.failure.call, self.failure.ranks,
                              "an earlier call failed", "open the layers anew")  # fmt: skip

    def give_up(self, layer: int, call: int, error: BaseException) -> None:
        """Tell the others why this rank leaves a call in its middle; it takes part in no other."""
        if self.failure is not None:
            return
        reason = f"{_GAVE_UP}: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # the store may be gone, and this rank leaves anyway
            self.group.report(_event(layer, call), reason[:500])
        self.failure = self._error(layer, call, (self.group.rank,), reason)

    def left(self, layer: int, call: int, said: dict[int, str]) -> RankError:
        """The error of ranks that said, in a message of this call, that they do not go on."""
        rank = min(said)
        return self._error(layer, call, tuple(sorted(said)), said[rank])

    def _find_missing(self, layer: int, call: int, start: float, error: BaseException) -> RankError:
        """Waits for what the others say, and takes those that say nothing for lost."""
        group = self.group
        end = max(start + group.timeout, time.monotonic()) + _GRACE
        said, answered = _hear(group, _event(layer, call), end)
        gave_up = {rank: text for rank, text in said.items() if text.startswith(_GAVE_UP)}
        if gave_up:
            return self.left(layer, call, gave_up)
        text = " ".join(str(error).split())[:200]
        if not answered:
            keeper = () if group.keeper in (-1, group.rank) else (group.keeper,)
            got = f"no word from it, and the store of the group is gone ({text})"
            return self._error(layer, call, keeper, got)
        silent = tuple(r for r in range(group.size) if r != group.rank and r not in said)
        if silent:
            return self._error(layer, call, silent, f"no word from it ({text})")
        return self._error(layer, call, (), f"all ranks, but not their messages ({text})")

    def _error(
        self, layer: int, call: int, ranks: tuple[int, ...], got: str, hint: str = ""
    ) -> RankError:
        hosts = tuple(self.hosts[r] for r in ranks)
        names = ", ".join(f"{r} on {h}" for r, h in zip(ranks, hosts, strict=True)) or "none"
        where = f"layer {layer}, call {call}" if call >= 0 else f"layer {layer}, opening"
        what = f"{where}: rank{'s' if len(ranks) > 1 else ''} {names}"
        error = error_of(RankError, "distributed.MoeLayer", what, "to take part", got, hint)
        error.layer, error.call, error.ranks, error.hosts = layer, call, ranks, hosts
        return error


def _hear(group: Group, event: str, end: float) -> tuple[dict[int, str], bool]:
    """Say that this rank is there, and hear what others say; and whether the store answered.

    In a thread, since a store whose host hangs answers nothing at all.
    """
    said: dict[int, str] = {}
    broken = False

    def ask() -> None:
        nonlocal said, broken
        try:
            group.report(event, "waited in vain")
            while time.monotonic() < end:
                said = group.reports(event)
                if len(said) == group.size - 1 or any(
                    text.startswith(_GAVE_UP) for text in said.values()
                ):
                    return
                time.sleep(0.02)
        except Exception:  # whatever a transport raises
            broken = True

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(end - time.monotonic(), 0.0) + _ANSWER)
    return said, not (broken or thread.is_alive())


def _event(layer: int, call: int) -> str:
    return f"{layer}/{call}"


def host() -> str:
    return socket.gethostname()


def agree(link: Link, layer: int, facts: dict[str, Any], problem: BaseException | None) -> None:
    """Compare facts with those of the other ranks, and tell them whether this one can go on.

    Raises ConfigError that names the first rank and fact that differ from rank 0's, RankError where
    another rank cannot go on.
    """
    group = link.group
    trouble = "" if problem is None else f"{_GAVE_UP}: {type(problem).__name__}: {problem}"
    mine = texts_to_bytes([host(), trouble, *(str(value) for value in facts.values())])
    rows = link.run(layer, -1, lambda g: g.allgather(mine))
    texts = [texts_of_bytes(row) for row in rows]
    link.hosts = [text[0] for text in texts]
    if problem is not None:
        return
    lost = {r: text[1] for r, text in enumerate(texts) if text[1]}
    if lost:
        raise link.left(layer, -1, lost)
    for i, name in enumerate(facts):
        for rank in range(1, group.size):
            first, other = texts[0][2 + i], texts[rank][2 + i]
            if first != other:
                what = f"{name} of rank {rank} on {link.hosts[rank]}"
                expected = f"{first!r}, as rank 0"
                hint = "all ranks open a layer with the same arguments"
                raise error_of(
                    _core.ConfigError, "distributed.MoeLayer", what, expected, repr(other), hint
                )

"""Ranks as threads of one process, whose order a seed shuffles: a transport for tests."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Lost(RuntimeError):
    """What a collective raises whose ranks did not all come."""


class Room:
    """Where the ranks of a group meet."""

    def __init__(self, size: int, timeout: float, seed: int) -> None:
        self.size, self.timeout, self.seed = size, timeout, seed
        self.barrier = threading.Barrier(size)
        self.table: list[Any] = [None] * size
        self.words: dict[str, dict[int, str]] = {}
        self.kinds: list[list[str]] = [[] for _ in range(size)]

    def meet(self, rank: int, kind: str, value: Any) -> list[Any]:
        self.kinds[rank].append(kind)
        self.table[rank] = value
        try:
            self.barrier.wait(self.timeout)
            found = list(self.table)
            self.barrier.wait(self.timeout)  # nobody writes before all have read
        except threading.BrokenBarrierError as error:
            raise Lost("a rank did not come") from error
        return found


class FakeGroup:
    """One rank of a room. Before and after each message it may wait a moment, or let others run."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank = room, rank
        self.size, self.timeout, self.keeper = room.size, room.timeout, -1
        self._random = random.Random(room.seed * 1000 + rank)

    def _pause(self) -> None:
        if self._random.random() < 0.3:
            time.sleep(self._random.choice([0, 0, 1e-4, 2e-3]))

    def exchange(self, sends: Sequence[np.ndarray], sizes: Sequence[int]) -> list[np.ndarray]:
        self._pause()
        every = self.room.meet(self.rank, "exchange", [one.copy() for one in sends])
        received = [sends_of_one[self.rank] for sends_of_one in every]
        assert [len(one) for one in received] == list(sizes)
        self._pause()
        return received

    def allgather(self, row: np.ndarray) -> np.ndarray:
        self._pause()
        rows = self.room.meet(self.rank, "allgather", row.copy())
        assert len({len(one) for one in rows}) == 1
        self._pause()
        return np.stack(rows)

    def report(self, event: str, text: str) -> None:
        self.room.words.setdefault(event, {})[self.rank] = text

    def reports(self, event: str) -> dict[int, str]:
        said = dict(self.room.words.get(event, {}))
        said.pop(self.rank, None)
        return said


def run_ranks(
    size: int,
    body: Callable[[FakeGroup], Any],
    *,
    timeout: float = 30.0,
    seed: int = 0,
    room: Room | None = None,
) -> list[Any]:
    """What ``body`` returned or raised on each rank."""
    room = room or Room(size, timeout, seed)
    results: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = body(FakeGroup(room, rank))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a rank hangs"
    return results


def good(results: list[Any]) -> list[Any]:
    """The results. Raises the first error among them."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results

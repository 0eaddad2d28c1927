"""What a disk does for experts, measured past the page cache.

There may be a cache below: the host of a virtual machine keeps what it read lately, a disk has
memory of its own. Experts that a store misses time and again are then read faster than any at
random, so a measurement beside a run reads what the run would.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from .. import _core
from .._errors import error_of
from .._offload_store import OffloadStore, Source
from .disk import Disk
from .places import Places, places_of

_BLOCK = 4096
_PIECE = 1 << 20
_HUGE_PAGE = 2 << 20
#: Requests in flight.
_THREADS = 16
#: File, offset and bytes of a request.
_Piece = tuple[int, int, int]


def measure_disk(
    source: Source,
    experts: Iterable[tuple[int, int]] | None = None,
    *,
    megabytes: int = 300,
    seed: int = 0,
) -> Disk:
    """Read experts of a model past the page cache: 16 requests of up to 1 MiB in flight.

    ``experts`` are read in this order until there are so many ``megabytes``, each as the place of
    its layer in a store and its number there; None: random ones.

    Raises UnsupportedError where the file system has no such reads, OSError where a read fails.
    """
    if not hasattr(os, "O_DIRECT"):
        raise error_of(
            _core.UnsupportedError, "measure_disk", "system", "O_DIRECT", "none",
            "give the bandwidth instead",
        )  # fmt: skip
    places = places_of(source)
    order = random_experts(places, seed) if experts is None else experts
    wanted, pieces = _pieces(places, order, megabytes * 10**6)
    try:
        descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in places.paths]
    except OSError as error:
        raise error_of(
            _core.UnsupportedError, "measure_disk", places.paths[0],
            "a file system with O_DIRECT", str(error), "give the bandwidth instead",
        ) from error  # fmt: skip
    try:
        latency = _latency(descriptors, pieces[:20])
        seconds = _read_all(descriptors, pieces)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    asked = sum(size for _, _, size in pieces)
    return Disk(asked / seconds, latency, asked / wanted)


def random_experts(places: Places, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Yield experts without end, any as often as another of its layer."""
    rng = np.random.default_rng(seed)
    while True:
        layer = int(rng.integers(len(places.layers)))
        yield layer, int(rng.integers(len(places.layers[layer])))


def missed_experts(store: OffloadStore, seed: int = 0) -> Iterator[tuple[int, int]] | None:
    """Yield experts without end as the layers of a store miss them; None before they have.

    Those that are not in memory come as often as they were used.
    """
    shares = []
    for pool in store.pools:
        uses = pool.usage.counts.astype(np.float64)
        shares.append(np.where(pool.resident_mask, 0.0, uses))
    total = sum(share.sum() for share in shares)
    if total == 0:
        return None
    layers = [np.full(len(share), i) for i, share in enumerate(shares)]
    numbers = [np.arange(len(share)) for share in shares]
    of_layer, of_expert = np.concatenate(layers), np.concatenate(numbers)
    share = np.concatenate(shares) / total

    def drawn() -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng(seed)
        while True:
            for i in rng.choice(len(share), 256, p=share):
                yield int(of_layer[i]), int(of_expert[i])

    return drawn()


def _pieces(
    places: Places, experts: Iterable[tuple[int, int]], most: int
) -> tuple[int, list[_Piece]]:
    """The requests for as many of the experts as have so many bytes, and their own bytes."""
    wanted = 0
    pieces: list[_Piece] = []
    for layer, expert in experts:
        for file, begin, size in places.layers[layer][expert].tolist():
            first, end = begin // _BLOCK * _BLOCK, -(-(begin + size) // _BLOCK) * _BLOCK
            pieces += [(file, at, min(_PIECE, end - at)) for at in range(first, end, _PIECE)]
            wanted += size
        if wanted >= most:
            break
    return wanted, pieces


def _latency(descriptors: list[int], pieces: list[_Piece]) -> float:
    """Return the median of single reads of a block."""
    times = []
    with mmap.mmap(-1, _BLOCK) as buffer:
        for file, offset, _ in pieces:
            begin = time.perf_counter()
            os.preadv(descriptors[file], [buffer], offset)
            times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _buffers(count: int) -> list[npt.NDArray[np.uint8]]:
    """Return room for so many requests, in large pages as the buffers of a store.

    A request into small pages goes to the disk in many parts, which may take twice as long.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, count * _PIECE + _HUGE_PAGE, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    view = np.frombuffer(memory, np.uint8)
    aligned = view[-view.ctypes.data % _HUGE_PAGE :][: count * _PIECE]
    aligned[::_BLOCK] = 0  # so that the pages are there before they are read into
    return np.split(aligned, count)


def _read_all(descriptors: list[int], pieces: list[_Piece]) -> float:
    """Return the seconds that all pieces take."""
    queue, lock = iter(pieces), threading.Lock()
    errors: list[OSError] = []

    def work(buffer: npt.NDArray[np.uint8]) -> None:
        while not errors:
            with lock:
                piece = next(queue, None)
            if piece is None:
                return
            file, offset, size = piece
            try:
                os.preadv(descriptors[file], [buffer[:size].data], offset)
            except OSError as error:
                errors.append(error)

    workers = [threading.Thread(target=work, args=(one,)) for one in _buffers(_THREADS)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - begin

"""A conversion as it runs: units in parallel, written in order, recorded as they reach the disk.

The file grows as ``.NAME.partial`` beside its name. The journal beside that has the digest of the
plan in its first line, and in each further one the number of units that are on the disk. A
conversion of the same plan goes on behind the last of them; what it writes there is the same, as
every unit is made from the source alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moesaic import _core
from moesaic._errors import error_of
from moesaic.saving.atomic import check_target, naming, sync, take_name
from moesaic.saving.container import Layout, begin, layout_of, pieces, write_at
from moesaic.saving.convert.plan import OPERATION, Plan
from moesaic.saving.steps import ProgressArgument, Steps
from moesaic.saving.tensors import Tensor
from moesaic.saving.verify import check_layers

#: Bytes between two records of the journal, each of which waits for the disk.
RECORD_EVERY = 256 << 20


def write_plan(
    plan: Plan,
    path: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressArgument = None,
    threads: int | None = None,
) -> None:
    """Writes the file, or the rest of it with ``resume``. What is there after an error stays.

    Raises ConfigError where the file exists, where another call is writing it, and where what is
    there is of another plan.
    """
    path = path.resolve()  # a link stays one
    check_target(OPERATION, path, overwrite)
    partial = path.with_name(f".{path.name}.partial")
    with _journal(path) as journal:
        found = _recorded(journal, plan, path) if resume and partial.exists() else None
        start, done = found or (_begin(partial, plan, journal), 0)
        layout = layout_of(start, plan.metadata, plan.tensors)
        _write(plan, partial, path, layout, done, journal, progress, threads or _threads())
        with naming(path):
            take_name(OPERATION, partial, path, overwrite)
        Path(journal.name).unlink()


def _threads() -> int:
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return _core.current_tuning().threads or len(here) or os.cpu_count() or 1


@contextmanager
def _journal(path: Path) -> Iterator[IO[str]]:
    """The journal of a file to be, which one process at a time holds."""
    with path.with_name(f".{path.name}.journal").open("a+", encoding="ascii") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _wrong(path, "a file that no other process writes", "one") from None
        yield journal


def _wrong(path: Path, expected: str, got: str, hint: str = "") -> _core.ConfigError:
    return error_of(_core.ConfigError, OPERATION, str(path), expected, got, hint)


def _digest(plan: Plan) -> str:
    """Tells one plan from another, and from the same one by another version's encoders."""
    facts = [
        _core.build_info()["version"],
        plan.source,
        [[t.name, t.type, t.shape, t.units] for t in plan.tensors],
        [
            [key, value.type, value.element, str(value.value)]
            for key, value in plan.metadata.items()
        ],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _recorded(journal: IO[str], plan: Plan, path: Path) -> tuple[int, int] | None:
    """Where the data begins and how many units are there; None where nothing is."""
    journal.seek(0)
    # A line without its end was being written when the process ended.
    lines = [line for line in journal if line.endswith("\n")]
    if not lines:
        return None
    digest, start = lines[0].split()
    if digest != _digest(plan):
        raise _wrong(
            path,
            "the rest of the same conversion",
            "other options, another source or another version",
            "without resume it starts anew",
        )
    return int(start), int(lines[-1].split()[-1]) if len(lines) > 1 else 0


def _begin(partial: Path, plan: Plan, journal: IO[str]) -> int:
    """Starts anew. Where the plan is no good, nothing stays."""
    try:
        with naming(partial):
            start = begin(partial, plan.metadata, plan.tensors)
        layout = layout_of(start, plan.metadata, plan.tensors)
        check_layers(OPERATION, partial, layout, plan.tensors, plan.configs)
        sync(partial)
        journal.truncate(0)
        _record(journal, f"{_digest(plan)} {start}")
    except BaseException:
        for path in (partial, Path(journal.name)):
            path.unlink(missing_ok=True)
        raise
    return start


def _record(journal: IO[str], line: str) -> None:
    journal.write(f"{line}\n")
    journal.flush()
    os.fsync(journal.fileno())


def _write(
    plan: Plan,
    partial: Path,
    path: Path,
    layout: Layout,
    done: int,
    journal: IO[str],
    progress: ProgressArgument,
    threads: int,
) -> None:
    """Writes all units behind the first ``done`` ones."""
    units = [(tensor, index) for tensor in plan.tensors for index in range(tensor.units)]
    steps = Steps(OPERATION, progress, sum(tensor.nbytes for tensor in plan.tensors))
    steps.done = sum(tensor.nbytes // tensor.units for tensor, _ in units[:done])
    unrecorded = 0
    with partial.open("r+b", buffering=0) as file, _pool(threads) as pool:
        for (tensor, index), data in zip(
            units[done:], _made(units[done:], pool, threads), strict=True
        ):
            done += 1
            offset = layout.offsets[tensor.name] + index * data.nbytes
            for piece in pieces(data):
                with naming(path):
                    write_at(file, offset, [piece])
                offset += piece.nbytes
                steps.advance(piece.nbytes, tensor.name)
            unrecorded += data.nbytes
            if unrecorded >= RECORD_EVERY or done == len(units):
                os.fsync(file.fileno())
                _record(journal, str(done))
                unrecorded = 0


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that end with the unit they are at when the block raises."""
    pool = ThreadPoolExecutor(threads, "moesaic-convert")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _made(
    units: list[tuple[Tensor, int]], pool: ThreadPoolExecutor, threads: int
) -> Iterator[memoryview]:
    """The bytes of the units in order, few of them ahead: they are what takes memory."""
    pending: deque[Future[memoryview]] = deque()
    for tensor, index in units:
        pending.append(pool.submit(tensor.unit, index))
        if len(pending) > threads + 1:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()

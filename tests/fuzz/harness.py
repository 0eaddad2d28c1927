"""What the fuzzers in Python share: cases in a process of their own, so that a crash, a hang or a
hunger for memory is a finding like any other, and ends nothing.

A case follows from the seed and its number alone, so one command repeats it.
"""

import argparse
import faulthandler
import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
#: Where seeds are kept and findings are written.
WORK = ROOT / "build" / "fuzz" / "work"
sys.path.insert(0, str(ROOT / "tests" / "python"))

#: After so many findings there is enough to look at.
MOST_FINDINGS = 20


class Finding(Exception):
    """Something that must not be, as a case saw it."""


class Board:
    """What the worker is at, in memory that outlives it: the number of the case and a text."""

    HEAD = struct.Struct("<qqI")
    SIZE = 1 << 16

    def __init__(self, path: Path):
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), self.SIZE)

    def begin(self, number: int) -> None:
        """A negative number: the cases before that one are only repeated."""
        self.HEAD.pack_into(self.memory, 0, number, time.monotonic_ns(), 0)

    def say(self, text: str) -> None:
        """What the case is about to do."""
        data = text.encode(errors="backslashreplace")[: self.SIZE - self.HEAD.size]
        number, begun, _ = self.HEAD.unpack_from(self.memory)
        self.HEAD.pack_into(self.memory, 0, number, begun, len(data))
        self.memory[self.HEAD.size : self.HEAD.size + len(data)] = data

    def read(self) -> tuple[int, float, str]:
        """The number, when it began, and the last text."""
        number, begun, length = self.HEAD.unpack_from(self.memory)
        text = bytes(self.memory[self.HEAD.size : self.HEAD.size + length])
        return number, begun / 1e9, text.decode(errors="replace")


class Fuzzer(ABC):
    """One kind of cases."""

    #: Cases that share what begin() made; the first of them is a multiple of this.
    group = 1
    #: A case that takes longer hangs, on a machine without other work.
    seconds_per_case = 30.0
    #: Address space beyond that of the worker at its start.
    megabytes = 1024

    def prepare(self) -> None:  # noqa: B027 - nothing, unless a kind of cases has seeds
        """Make what all cases start from, on disk. Runs in the parent."""

    @abstractmethod
    def start(self) -> None:
        """Load what all cases need. Runs once in each worker."""

    def begin(self) -> None:  # noqa: B027 - nothing, unless cases share something
        """Make what the cases of a group share."""

    @abstractmethod
    def case(self, random: np.random.Generator, board: Board) -> str:
        """Try one case; the word says how it ended. Raises what must not be."""

    def summary(self) -> dict[str, float]:
        """Figures of the worker for the last line."""
        return {}


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def work(fuzzer: Fuzzer, seed: int, first: int, runs: int, seconds: float, board: Board) -> None:
    """The worker: one line of JSON for each finding, and one at the end."""
    faulthandler.enable()
    fuzzer.start()
    limit = address_space() + (fuzzer.megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: Counter[str] = Counter()
    deadline = time.monotonic() + seconds

    def report(done: bool) -> None:
        line = {"counts": counts, "summary": fuzzer.summary(), "done": done}
        print(json.dumps(line), flush=True)
        counts.clear()

    for number in range(first - first % fuzzer.group, runs):
        if time.monotonic() > deadline and number >= first:
            break
        board.begin(number if number >= first else ~number)
        if number % fuzzer.group == 0:
            fuzzer.begin()
        try:
            outcome = fuzzer.case(np.random.default_rng([seed, number]), board)
        except BaseException as error:
            if number >= first:
                what = f"{type(error).__name__}: {error}"
                trace = "" if isinstance(error, Finding) else traceback.format_exc()
                line = {"case": number, "what": what, "trace": trace, "at": board.read()[2]}
                print(json.dumps(line), flush=True)
            outcome = "finding"
        if number >= first:
            counts[outcome] += 1
        if number % 1000 == 999:
            report(done=False)
    report(done=True)


class Run:
    """The parent: starts workers, watches them, and counts."""

    def __init__(self, fuzzer: Fuzzer, seed: int, runs: int, seconds: float):
        self.fuzzer, self.seed, self.runs = fuzzer, seed, runs
        self.script = Path(sys.argv[0]).resolve()
        self.counts: Counter[str] = Counter()
        self.figures: dict[str, float] = {}
        self.findings = 0
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        self.partial = b""
        self.done = False

    def finding(self, number: int, what: str, at: str, trace: str) -> None:
        self.findings += 1
        path = os.path.relpath(self.script)
        print(f"\nFINDING {self.script.stem}, case {number}: {what}")
        if at:
            print(f"  at: {at}")
        if trace:
            print("  " + trace.strip().replace("\n", "\n  "))
        print(f"  again: python {path} --seed {self.seed} --only {number}", flush=True)

    def watch(self, first: int) -> int | None:
        """One worker from this case on; the case to go on with, or None at the end."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "board"
            place.write_bytes(bytes(Board.SIZE))
            board = Board(place)
            board.begin(~first)
            counted, self.partial = self.counts.total(), b""
            out, err = Path(folder) / "out", Path(folder) / "err"
            left = max(self.deadline - time.monotonic(), 0)
            command = [sys.executable, str(self.script), "--worker", str(place)]
            command += ["--seed", str(self.seed), "--runs", str(self.runs)]
            command += ["--seconds", str(left), "--first", str(first)]
            with out.open("wb") as stdout, err.open("wb") as stderr, out.open("rb") as lines:
                worker = subprocess.Popen(command, stdout=stdout, stderr=stderr)
                hangs, before = False, (first, 0.0)
                try:
                    while worker.poll() is None:
                        time.sleep(0.1)
                        self.take(lines)
                        if self.findings >= MOST_FINDINGS:
                            return None
                        number, begun, _ = board.read()
                        seen, before = before, (number, begun)
                        patience = self.fuzzer.seconds_per_case * (1 if number >= 0 else 10)
                        patience *= max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
                        # Twice the same, for what is being written may be read by halves.
                        if seen == before and time.monotonic() - begun > patience:
                            hangs = True
                            worker.send_signal(signal.SIGABRT)  # faulthandler tells where it is
                            time.sleep(1)
                            break
                finally:
                    if worker.poll() is None:
                        worker.kill()
                    worker.wait()
                self.take(lines)
            if self.done:
                return None
            number, _, at = board.read()
            number = number if number >= 0 else ~number
            what = "hangs" if hangs else f"the process ended with status {worker.returncode}"
            self.finding(number, what, at, err.read_text(errors="replace")[-4000:])
            self.counts["finding"] += 1
            # What this worker had not told yet.
            untold = number + 1 - first - (self.counts.total() - counted)
            self.counts["untold"] += max(untold, 0)
            return number + 1

    def take(self, lines) -> None:
        """Read what the worker printed."""
        *complete, self.partial = (self.partial + lines.read()).split(b"\n")
        for line in complete:
            record = json.loads(line)
            if "case" in record:
                self.finding(record["case"], record["what"], record["at"], record["trace"])
            else:
                self.counts.update(record["counts"])
                for name, value in record["summary"].items():
                    self.figures[name] = max(value, self.figures.get(name, 0.0))
                self.done = record["done"]

    def go(self, first: int = 0) -> int:
        self.fuzzer.prepare()
        self.deadline += time.monotonic() - self.begun
        self.begun = time.monotonic()
        number: int | None = first
        while number is not None and number < self.runs and self.findings < MOST_FINDINGS:
            number = self.watch(number)
            if time.monotonic() > self.deadline:
                break
        took, total = time.monotonic() - self.begun, self.counts.total()
        ended = ", ".join(f"{n} {word}" for word, n in self.counts.most_common() if n)
        figures = "".join(f"; {name} {value:.3g}" for name, value in sorted(self.figures.items()))
        print(
            f"{self.script.stem}: seed {self.seed}, {total} cases in {took:.0f} s: "
            f"{ended}{figures}; {self.findings} findings"
        )
        return 1 if self.findings or not total else 0


def only(fuzzer: Fuzzer, seed: int, number: int) -> None:
    """One case in this process, after those of its group, for a debugger to look at."""
    fuzzer.prepare()
    fuzzer.start()
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(bytes(Board.SIZE))
        board = Board(Path(file.name))
        fuzzer.begin()
        for each in range(number - number % fuzzer.group, number + 1):
            board.begin(each)
            try:
                outcome = fuzzer.case(np.random.default_rng([seed, each]), board)
            except BaseException:
                if each == number:
                    print("at:", board.read()[2])
                    raise
        print("at:", board.read()[2])
        print(f"case {number}: {outcome}")


def main(fuzzer: Fuzzer, description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10**9, help="cases at most")
    parser.add_argument("--seconds", type=float, default=10**9, help="time for cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="this case alone, in this process")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if given.worker:
        board = Board(given.worker)
        work(fuzzer, given.seed, given.first, given.runs, given.seconds, board)
    elif given.only is not None:
        only(fuzzer, given.seed, given.only)
    else:
        sys.exit(Run(fuzzer, given.seed, given.runs, given.seconds).go(given.first))

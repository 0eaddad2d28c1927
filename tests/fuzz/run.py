"""Runs the fuzzers one after another, each for a while; the status is 1 when one has a finding.

    python tests/fuzz/run.py                        # all, half a minute each
    python tests/fuzz/run.py layer forward --hours 2 --seed 7

The first command needs the programs of the preset `fuzz` and an installed moesaic; `nox -s fuzz`
makes both. README.md says what each fuzzer tries, and what to do with a finding.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "fuzz" / "work"
PROGRAMS = ROOT / "build" / "fuzz" / "tests" / "fuzz"

LIBFUZZER = ["gguf", "layer"]
PYTHON = ["checkpoints", "forward", "misuse"]


def libfuzzer(name: str, given: argparse.Namespace) -> int:
    """From the seeds, the corpus of the repository, and what earlier runs found."""
    subprocess.run([PROGRAMS / "fuzz_seeds", WORK / "seeds"], check=True)
    found = WORK / name
    found.mkdir(parents=True, exist_ok=True)
    command = [
        PROGRAMS / f"{name}_fuzz", found, HERE / "corpus" / name, WORK / "seeds" / name,
        f"-seed={given.seed}", f"-runs={given.runs}", f"-max_total_time={given.seconds}",
        f"-dict={HERE / 'gguf.dict'}", f"-artifact_prefix={WORK}/{name}-", "-max_len=4096",
        "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0",
        "-print_funcs=0",
    ]  # fmt: skip
    env = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    status = subprocess.run(command, env=env).returncode
    if status != 0:
        path = PROGRAMS.relative_to(ROOT) / f"{name}_fuzz"
        print(f"FINDING {name}_fuzz; again: {path} FILE, with the file that is named above")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(LIBFUZZER + PYTHON))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10**9, help="inputs or cases of each")
    parser.add_argument("--seconds", type=int, default=30, help="time of each")
    parser.add_argument("--hours", type=float, help="the same in hours")
    given = parser.parse_args()
    if given.hours is not None:
        given.seconds = int(3600 * given.hours)
    if unknown := set(given.names) - {*LIBFUZZER, *PYTHON}:
        parser.error(f"unknown fuzzers {sorted(unknown)}; there are {LIBFUZZER + PYTHON}")
    failed = []
    for name in given.names or LIBFUZZER + PYTHON:
        print(f"== {name}", flush=True)
        if name in LIBFUZZER:
            status = libfuzzer(name, given)
        else:
            options = ["--seed", given.seed, "--runs", given.runs, "--seconds", given.seconds]
            command = [sys.executable, HERE / f"fuzz_{name}.py", *map(str, options)]
            status = subprocess.run(command).returncode
        if status != 0:
            failed.append(name)
    print(f"== findings in: {', '.join(failed)}" if failed else "== no findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The harness of the fuzzers: nothing that a case does ends the run or passes unseen."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"

SCRIPT = f"""
import os, sys, time
sys.path.insert(0, {str(FUZZ)!r})
import harness

class Cases(harness.Fuzzer):
    seconds_per_case = 2
    megabytes = 256

    def start(self):
        pass

    def case(self, random, board):
        number = board.read()[0]
        board.say(f"about to try {{number}}")
        if number == 1:
            os.abort()
        if number == 2:
            raise harness.Finding("as a case saw it")
        if number == 3:
            time.sleep(100)
        if number == 4:
            bytearray(1 << 30)
        return "fine" if random.random() < 2 else "never"

harness.main(Cases(), None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_crashes_hangs_and_memory_are_findings(tmp_path):
    script = tmp_path / "cases.py"
    script.write_text(SCRIPT)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    done = run("--runs", "6")
    assert done.returncode == 1, done
    for number, what in {
        1: "the process ended with status -6",
        2: "Finding: as a case saw it",
        3: "hangs",
        4: "MemoryError",
    }.items():
        assert f"case {number}: {what}" in done.stdout
        assert f"at: about to try {number}" in done.stdout
        assert f"--seed 1 --only {number}" in done.stdout
    assert "4 findings" in done.stdout and "6 cases" in done.stdout
    assert run("--first", "5", "--runs", "8").returncode == 0
    assert "as a case saw it" in run("--only", "2").stderr

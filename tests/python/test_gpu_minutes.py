"""The prepared run on a GPU machine, with stand-ins for everything that it calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu_minutes.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux machines")
# Steps fail on a new machine: each in another way.
TIMEOUT = """#!/bin/sh
echo "$3 $*" >>"$LOG"
case "$*" in *compute-sanitizer*) exit 124;; *moesaic\\ bench*) exit 1;; esac
"""


@pytest.mark.parametrize(("what", "seconds", "steps"), [("check", 420, 10), ("bench", 300, 7)])
def test_every_step_has_a_limit_and_stops_no_other(tmp_path, what, seconds, steps):
    tool = tmp_path / "bin" / "timeout"
    tool.parent.mkdir()
    tool.write_text(TIMEOUT)
    tool.chmod(0o755)
    log, out = tmp_path / "log", tmp_path / "out"
    environment = os.environ | {
        "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}", "LOG": str(log), "OUT": str(out),
    }  # fmt: skip
    result = subprocess.run(
        ["bash", SCRIPT, what], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = log.read_text().splitlines()
    assert len(lines) == steps, lines
    assert sum(int(line.split()[0]) for line in lines) <= seconds
    assert result.stdout.count(": status ") == steps
    assert len(list(out.glob("*.log"))) == steps


def test_what_to_do_has_to_be_said(tmp_path):
    result = subprocess.run(
        ["bash", SCRIPT], env=os.environ | {"OUT": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and "check|bench" in result.stderr

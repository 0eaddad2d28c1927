"""Tests of a GPU in as many processes as they need.

    python tests/python/gpu_processes.py [arguments of pytest]

A kernel that reads outside its memory ends the GPU's context, and every later call of the process
fails with it. A test that did so then ends its process; this script runs the tests that had not
begun in a new one, so that one fault is one failed test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

#: Names the file of the tests that have begun, one a line.
BEGUN = "GPU_TESTS_BEGUN"
#: How a process ends whose GPU is lost.
LOST = 90


def _begun() -> Path | None:
    path = os.environ.get(BEGUN)
    return Path(path) if path else None


def pytest_collection_modifyitems(config, items):
    path = _begun()
    if path is None or not path.exists():
        return
    begun = set(path.read_text().splitlines())
    done = [item for item in items if item.nodeid in begun]
    items[:] = [item for item in items if item.nodeid not in begun]
    config.hook.pytest_deselected(items=done)


def pytest_runtest_logstart(nodeid):
    path = _begun()
    if path is not None:
        with path.open("a") as file:
            file.write(nodeid + "\n")


@pytest.fixture
def gpu_survives(request):
    """Ends the process with LOST behind a test that lost the GPU's context."""
    yield
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        text = f"{request.node.nodeid} lost the GPU, and what follows would fail with it: {error}"
        pytest.exit(text, returncode=LOST)


def main(arguments: list[str]) -> int:
    """The exit status of the first process that found a fault, else of the last."""
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {BEGUN: str(Path(folder) / "begun")}
        while True:
            command = [sys.executable, "-m", "pytest", *arguments]
            status = subprocess.run(command, env=environment, check=False).returncode
            # The last process may find nothing left to do.
            if status != pytest.ExitCode.NO_TESTS_COLLECTED or worst == 0:
                worst = worst or status
            if status != LOST:
                return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

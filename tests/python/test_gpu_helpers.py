"""What the tests of a GPU rest on, with stand-ins for the GPU."""

import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpu_processes import LOST
from recordings import refusal

import moesaic as mo

HERE = Path(__file__).parent


@contextmanager
def empty_recording():
    """Ends as torch.cuda.graph does around nothing."""
    yield
    warnings.warn("The CUDA Graph is empty. This usually means ...", UserWarning, stacklevel=2)


def refused():
    raise mo.CaptureError("not while a graph is recorded")


def test_the_warning_of_an_empty_graph_hides_no_error():
    assert "not while" in str(refusal(refused, empty_recording()))
    with pytest.raises(AssertionError, match="was recorded"):
        refusal(lambda: None, empty_recording())
    with pytest.raises(ValueError, match="another"), empty_recording():
        raise ValueError("another error")


STAND_IN = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
lost = []
def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")
sys.modules["torch"].cuda = types.SimpleNamespace(
    is_available=lambda: True, synchronize=synchronize
)
from gpu_processes import *
"""
TESTS = """
import os, pytest
from conftest import lost
pytestmark = pytest.mark.usefixtures("gpu_survives")
@pytest.mark.parametrize("i", range(6))
def test_one(i):
    print("ran", i, os.getpid())
    assert not lost
    if i in (1, 2, 5):
        lost.append(i)
    assert i != 2
"""


def test_a_lost_gpu_costs_the_test_that_lost_it(tmp_path):
    (tmp_path / "conftest.py").write_text(STAND_IN)
    (tmp_path / "test_stand_in.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([str(HERE), *sys.path])
    result = subprocess.run(
        [sys.executable, HERE / "gpu_processes.py", "-s", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ran = [line.split("ran ")[1].split() for line in result.stdout.splitlines() if "ran " in line]
    assert result.returncode == LOST, result.stdout + result.stderr
    assert [int(i) for i, _ in ran] == list(range(6)), result.stdout
    assert len({process for _, process in ran}) == 3, ran
    assert result.stdout.count("lost the GPU") == 3, result.stdout

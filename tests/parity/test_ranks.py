"""A layer over processes of this machine, by gloo and by MPI, against the same layer in one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from files import write_small

SCRIPT = Path(__file__).with_name("rank_script.py")
HELPERS = Path(__file__).parents[1] / "python"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "m.gguf"
    write_small(
        path, num_experts=10, top_k=3, hidden=256, intermediate=256, layers=2,
        shared_intermediate=256, arch="qwen2moe",
    )  # fmt: skip
    return path


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def run_torch(task: str, path: Path, size: int) -> list[str]:
    """What each rank printed. Fails where one of them did."""
    pytest.importorskip("torch")
    port = free_port()
    ranks = []
    for rank in range(size):
        env = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
            "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        command = [sys.executable, "-W", "error", str(SCRIPT), task, str(path), "torch"]
        ranks.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    printed = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=180)
            assert rank.returncode == 0, err[-3000:]
            printed.append(out)
    finally:
        for rank in ranks:
            rank.kill()
    return printed


@pytest.mark.parametrize("size", [1, 2, 4])
def test_bits(path, size):
    assert run_torch("bits", path, size) == ["good\n"] * size


def test_tensors(path):
    assert run_torch("tensors", path, 2) == ["good\n"] * 2


def test_some_ranks_and_all(path):
    assert run_torch("groups", path, 3) == ["good\n"] * 3


@pytest.mark.parametrize("how", ["die", "die0", "hang"])
def test_a_lost_rank_is_named_in_time(path, how):
    """Rank 0 keeps the store in which the others would leave word."""
    printed = run_torch(how, path, 3)
    assert printed.pop(0 if how == "die0" else 1) == ""
    assert printed == ["named in time\n"] * 2


def test_another_plan_is_named(path):
    assert run_torch("plan", path, 3) == ["good\n"] * 3


def run_mpi(task: str, path: Path, size: int, *options: str) -> subprocess.CompletedProcess[str]:
    """What ``mpiexec`` says of as many ranks."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    return subprocess.run(
        [mpiexec(), *options, "-n", str(size), sys.executable, str(SCRIPT), task, str(path), "mpi"],
        env=env, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def mpiexec() -> str:
    pytest.importorskip("mpi4py")
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("mpiexec is missing (pip install mpich)")
    return found


@pytest.mark.parametrize("task", ["bits", "plan"])
def test_mpi(path, task):
    done = run_mpi(task, path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("good") == 2


# As it is started by default, mpiexec ends all ranks when one of them dies, which is what MPI does.
@pytest.mark.parametrize("how", ["die", "die0", "hang"])
def test_a_lost_rank_is_named_in_time_over_mpi(path, how):
    about = subprocess.run([mpiexec(), "--version"], capture_output=True, text=True, timeout=60)
    if "HYDRA" not in about.stdout:
        pytest.skip("another mpiexec than MPICH's, which can leave the other ranks alone")
    done = run_mpi(how, path, 3, "-disable-auto-cleanup")
    assert done.stdout.count("named in time") == 2, (done.stdout, done.stderr[-3000:])

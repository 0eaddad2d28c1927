"""Fixtures: small files written on the spot, and the zoo file where there is one."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from files import Small, write_small
from gpu_processes import (  # noqa: F401
    gpu_survives,
    pytest_collection_modifyitems,
    pytest_runtest_logstart,
)
from values import expert_weights

import moesaic as mo

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT.parent / "shared" / "data" / "zoo-qwen3moe.gguf"


@pytest.fixture(scope="session", autouse=True)
def folders_of_children(tmp_path_factory):
    """Where processes that tests start make temporary folders: pytest removes it in time."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("children"))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Small:
    """Two layers, Q4_K gate and up, Q6_K down, H != I."""
    return write_small(tmp_path_factory.mktemp("small") / "small.gguf", layers=2)


@pytest.fixture(scope="session")
def layer(small) -> mo.MoeLayer:
    return mo.MoeLayer.from_gguf(mo.GgufFile(small.path), 0)


@pytest.fixture(scope="session")
def dense() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f32 gate, up and down of five experts, H = 24, I = 40."""
    return expert_weights(5, 24, 40)


@pytest.fixture(scope="session")
def stack(dense) -> mo.ExpertStack:
    return mo.ExpertStack.from_dense_stacks(*dense)


@pytest.fixture(scope="session")
def zoo_path() -> Path:
    if not ZOO.exists():
        pytest.skip(f"{ZOO} is not here")
    return ZOO


@pytest.fixture
def exact_on_the_cpu():
    """For tests of a GPU that run on the CPU instead.

    The CPU rounds activations to int8 planes where a GPU multiplies 16-bit ones exactly.
    """
    on_cpu = os.environ.get("TEST_DEVICE") == "cpu"
    with mo.tuning(precision="exact") if on_cpu else contextlib.nullcontext():
        yield

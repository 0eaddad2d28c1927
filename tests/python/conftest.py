"""Fixtures: small files written on the spot, and the zoo file where there is one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import moesaic as mo

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT.parent / "shared" / "data" / "zoo-qwen3moe.gguf"


@dataclass(frozen=True)
class Small:
    """A small file, its weights as decoded, and inputs."""

    path: Path
    weights: list[mo.testing.MoeWeights]
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


def write_small(path: Path, **changes) -> Small:
    sizes = {"num_experts": 8, "top_k": 3, "hidden": 256, "intermediate": 512, **changes}
    weights = mo.testing.write_moe_gguf(path, **sizes)
    names = ("num_experts", "top_k", "hidden", "intermediate")
    return Small(path, weights, **{n: sizes[n] for n in names})


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
    rng = np.random.default_rng(1)
    shapes = ((5, 40, 24), (5, 40, 24), (5, 24, 40))
    return tuple(rng.standard_normal(s, np.float32) * 0.2 for s in shapes)


@pytest.fixture(scope="session")
def stack(dense) -> mo.ExpertStack:
    return mo.ExpertStack.from_dense_stacks(*dense)


@pytest.fixture(scope="session")
def zoo_path() -> Path:
    if not ZOO.exists():
        pytest.skip(f"{ZOO} is not here")
    return ZOO


def rel_l2(got, want) -> float:
    """Relative L2 error; NaN counts as infinite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    return float("inf") if np.isnan(error) else float(error)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def moe_f64(x, ids, weights, gate, up, down) -> np.ndarray:
    """The definition, in f64."""
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, gate, up, down))
    y = np.zeros((x.shape[0], down.shape[1]))
    for t in range(x.shape[0]):
        for e, w in zip(ids[t], weights[t], strict=True):
            if e >= 0:
                y[t] += w * (down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])))
    return y

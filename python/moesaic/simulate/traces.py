"""Routing traces: which experts each token of each step asked for, in each layer."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from os import PathLike

import numpy as np
import numpy.typing as npt

from .. import _core
from .._errors import error_of


@dataclass(frozen=True, eq=False)
class Trace:
    """Routings of one run; a step is one forward of every layer."""

    ids: npt.NDArray[np.int32]  #: [steps, layers, tokens, top_k], -1 = skipped
    num_experts: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return self.num_experts == other.num_experts and np.array_equal(self.ids, other.ids)

    def __hash__(self) -> int:
        return hash((self.num_experts, self.ids.shape, self.ids.tobytes()))

    @property
    def steps(self) -> int:
        return int(self.ids.shape[0])

    @property
    def layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return int(self.ids.shape[2])

    def counts(self) -> npt.NDArray[np.int64]:
        """Return pairs per expert, [layers, E]."""
        flat = self.ids.swapaxes(0, 1).reshape(self.layers, -1)
        return np.stack(
            [np.bincount(row[row >= 0], minlength=self.num_experts) for row in flat]
        ).astype(np.int64)

    def split(self, share: float) -> tuple[Trace, Trace]:
        """Return the first ``share`` of the steps, and the others."""
        cut = round(self.steps * share)
        return Trace(self.ids[:cut], self.num_experts), Trace(self.ids[cut:], self.num_experts)

    def save(self, path: str | PathLike[str]) -> None:
        """Write an .npz file (exactly this name)."""
        with open(path, "wb") as file:  # noqa: PTH123 - any path-like
            np.savez_compressed(file, ids=self.ids, num_experts=np.array(self.num_experts))

    @staticmethod
    def load(path: str | PathLike[str]) -> Trace:
        """Read what save() wrote, or ids [steps, layers, tokens, top_k] with num_experts.

        Raises FormatError, FileNotFoundError, OSError.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:  # noqa: PTH123
                ids = np.asarray(data["ids"], np.int32)
                experts = int(data["num_experts"])
        except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise error_of(
                _core.FormatError, "Trace.load", str(path), "a routing trace", str(error)
            ) from error
        if ids.ndim != 4 or (ids.size and (ids.max() >= experts or ids.min() < -1)):
            expected = f"ids [steps, layers, tokens, top_k] of {experts} experts"
            raise error_of(_core.FormatError, "Trace.load", str(path), expected, str(ids.shape))
        return Trace(ids, experts)


def _draw(
    rng: np.random.Generator, logits: npt.NDArray[np.float64], tokens: int, top_k: int
) -> npt.NDArray[np.int32]:
    """``top_k`` different experts per layer and token, drawn by their logits (Gumbel top-k)."""
    layers, experts = logits.shape
    noisy = logits[:, None, :] + rng.gumbel(size=(layers, tokens, experts))
    return np.argpartition(-noisy, top_k - 1, axis=-1)[..., :top_k].astype(np.int32)


def zipf(
    *,
    steps: int,
    num_experts: int,
    top_k: int,
    layers: int = 1,
    tokens: int = 1,
    exponent: float = 1.0,
    seed: int = 0,
) -> Trace:
    """Return independent steps; the r-th most popular expert of a layer has weight r^-exponent."""
    rng = np.random.default_rng(seed)
    weights = -exponent * np.log(np.arange(1, num_experts + 1))
    logits = np.stack([rng.permutation(weights) for _ in range(layers)])
    ids = np.stack([_draw(rng, logits, tokens, top_k) for _ in range(steps)])
    return Trace(ids, num_experts)


def drifting(
    *,
    steps: int,
    num_experts: int,
    top_k: int,
    layers: int = 1,
    tokens: int = 1,
    spread: float = 1.5,
    memory: float = 100.0,
    seed: int = 0,
) -> Trace:
    """Return steps whose popularity wanders: each expert's logit is a random walk towards 0 with
    standard deviation ``spread``, forgotten over ``memory`` steps.
    """
    rng = np.random.default_rng(seed)
    keep = np.exp(-1.0 / memory)
    logits = spread * rng.standard_normal((layers, num_experts))
    ids = []
    for _ in range(steps):
        ids.append(_draw(rng, logits, tokens, top_k))
        noise = rng.standard_normal(logits.shape)
        logits = keep * logits + spread * np.sqrt(1 - keep**2) * noise
    return Trace(np.stack(ids), num_experts)

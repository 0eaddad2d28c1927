"""The bench: our layer, the machine's limits and other engines, alternated in one run."""

from __future__ import annotations

from .run import BenchOptions, run
from .shapes import SHAPES, TOKENS, BenchShape

__all__ = ["SHAPES", "TOKENS", "BenchOptions", "BenchShape", "run"]

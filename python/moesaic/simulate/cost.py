"""From counts to time.

A step takes, for each layer, a fixed time, and for each expert it needs the time to stream its
bytes from where it lies; each expert moved takes its bytes at the bandwidth of the move:

    seconds = layers * fixed + (hits / fast + misses / (fast or slow) + loads / move) * expert_bytes

Staged misses are computed from fast memory after the move, computed misses from the slow side.
"""

from __future__ import annotations

from dataclasses import dataclass

from .run import Outcome


@dataclass(frozen=True)
class Costs:
    """Of one machine and one model; bandwidths in bytes per second."""

    expert_bytes: float
    fast: float  #: kernels reading residents
    slow: float  #: kernels reading experts where they lie
    move: float  #: into fast memory
    fixed: float = 0.0  #: seconds per layer and step


def seconds(outcome: Outcome, costs: Costs) -> float:
    """Return the time of all steps."""
    cold = costs.fast if outcome.on_miss == "stage" else costs.slow
    per_byte = outcome.hits / costs.fast + outcome.misses / cold + outcome.loads / costs.move
    return outcome.steps * outcome.layers * costs.fixed + per_byte * costs.expert_bytes


def tokens_per_second(outcome: Outcome, costs: Costs) -> float:
    """Return the rate at which the traced layers run; attention and the rest are not in it."""
    return outcome.steps * outcome.tokens / max(seconds(outcome, costs), 1e-30)

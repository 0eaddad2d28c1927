"""From counts to time.

A step takes, for each layer, a fixed time, and for each expert it needs the time to stream its
bytes from where it lies; each expert copied into a slot takes its bytes at the bandwidth of that:

    seconds = layers * fixed + expert_bytes * ((needed - slow_ones) / fast + slow_ones / slow
                                               + placed / move)

Missing experts are computed from their slot where staging gives them one, else from the slow side.
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
    move: float  #: into slots in fast memory
    fixed: float = 0.0  #: seconds per layer and step


def seconds(outcome: Outcome, costs: Costs) -> float:
    """Return the time of all steps."""
    needed = outcome.hits + outcome.misses
    slow_ones = outcome.misses - outcome.admitted
    per_byte = (
        (needed - slow_ones) / costs.fast + slow_ones / costs.slow + outcome.placed / costs.move
    )
    return outcome.steps * outcome.layers * costs.fixed + per_byte * costs.expert_bytes


def tokens_per_second(outcome: Outcome, costs: Costs) -> float:
    """Return the rate at which the traced layers run; attention and the rest are not in it."""
    return outcome.steps * outcome.tokens / max(seconds(outcome, costs), 1e-30)

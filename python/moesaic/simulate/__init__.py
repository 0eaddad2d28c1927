"""What a pool would do: routing traces in, hit rates, bytes and tokens per second out.

``traces`` makes or reads routings, ``policies`` names ways to use an ``ExpertPool`` (the real one,
without weights), ``run`` plays one against the other, ``cost`` turns the counts into time, and
``measure`` compares that with layers that really run.
"""

from .cost import Costs, tokens_per_second
from .policies import POLICIES, Policy
from .run import Outcome, simulate
from .traces import Trace, drifting, zipf

__all__ = [
    "POLICIES",
    "Costs",
    "Outcome",
    "Policy",
    "Trace",
    "drifting",
    "simulate",
    "tokens_per_second",
    "zipf",
]

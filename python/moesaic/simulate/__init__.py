"""What a pool would do: routing traces in, hit rates, bytes and tokens per second out.

``traces`` makes or reads routings, ``policies`` names ways to use an ``ExpertPool`` (the real one,
without weights), ``run`` plays one against the other, ``cost`` turns the counts into time, and
``measure`` compares that with layers that really run. ``disk`` does all of this for a model that is
read from a disk; ``places`` knows where its experts lie, ``probe`` measures the disk, ``stored``
the layers.
"""

from .cost import Costs, tokens_per_second
from .disk import Disk, DiskCosts, DiskOutcome, simulate_disk
from .policies import POLICIES, Policy
from .run import Outcome, simulate
from .traces import Trace, drifting, zipf

__all__ = [
    "POLICIES",
    "Costs",
    "Disk",
    "DiskCosts",
    "DiskOutcome",
    "Outcome",
    "Policy",
    "Trace",
    "drifting",
    "simulate",
    "simulate_disk",
    "tokens_per_second",
    "zipf",
]

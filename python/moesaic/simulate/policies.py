"""Ways to use an ExpertPool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .. import _core

OnMiss = Literal["compute", "stage"]


@dataclass(frozen=True)
class Policy:
    """A pool's settings, and how often it is refreshed."""

    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    refresh_every: int = 0  #: refresh every so many steps; 0: never

    def pool(self, num_experts: int, budget: int) -> _core.ExpertPool:
        every = _core.RefreshPolicy.manual()
        if self.refresh_every:
            every = _core.RefreshPolicy.every_decode_steps(self.refresh_every)
        return _core.ExpertPool(num_experts, budget, every, **self.settings)


POLICIES: dict[str, Policy] = {
    "static": Policy("the first residents stay", {"ranking": "fixed"}),
    "lru": Policy("least recently used leaves", {"ranking": "recency"}),
    "lfu": Policy("least used since the start leaves", {"ranking": "hits", "decay": 1.0}),
    "tide": Policy(
        "the most used of the last step, refreshed every 4 steps", {"admit": False}, refresh_every=4
    ),
    "pool": Policy(
        "least used leaves, old uses fade; a newcomer must rank above",
        {"ranking": "hits", "decay": 0.97},
    ),
}

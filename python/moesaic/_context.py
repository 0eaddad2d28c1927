"""The two context variables of a call: its tuning and its profile.

Both follow ``contextvars``: they hold in this thread or task only. Carry them to a new thread
with ``contextvars.copy_context().run``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from moesaic import _core


@contextmanager
def tuning(**knobs: Any) -> Iterator[_core.Tuning]:
    """Change knobs for the calls inside the block; see ``Tuning`` for their names.

    >>> import moesaic as mo
    >>> with mo.tuning(block_size=32, gemm="aligned") as t:
    ...     t.gemm
    'aligned'
    """
    changed = _core.current_tuning().replace(**knobs)
    token = _core.tuning_variable.set(changed)
    try:
        yield changed
    finally:
        _core.tuning_variable.reset(token)


@contextmanager
def profile(mode: Literal["counters", "events", "sync"] | None = None) -> Iterator[_core.Profile]:
    """Time the calls inside the block; the innermost block collects.

    ``mode`` is "events" (keeps every zone, for the trace), "counters" (totals only) or "sync"
    (events, and each zone waits for the device, so that its time is the device's); None takes
    the tuning's ``profile`` knob, where "off" means "events".

    >>> import moesaic as mo
    >>> with mo.profile() as p:
    ...     pass
    >>> p.zones
    {}
    """
    if mode is None:
        knob = _core.current_tuning().profile
        mode = "events" if knob == "off" else knob
    collected = _core.Profile(mode)
    token = _core.profile_variable.set(collected)
    try:
        yield collected
    finally:
        _core.profile_variable.reset(token)

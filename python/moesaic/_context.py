"""The two context variables of a call: its tuning and its profile.

Both follow ``contextvars``: they hold in this thread or task only. Carry them to a new thread
with ``contextvars.copy_context().run``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from moesaic import _core
from moesaic._arguments import checked

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from moesaic._core import _TuningKnobs


@checked
@contextmanager
def tuning(**knobs: Unpack[_TuningKnobs]) -> Iterator[_core.Tuning]:
    """Change knobs for the calls inside the block.

    Parameters
    ----------
    **knobs
        Names and values of ``Tuning``; the others stay as they are.

    Yields
    ------
    Tuning
        The tuning that the calls inside run with.

    Raises
    ------
    ConfigError
        An unknown knob, or a value out of range.

    Examples
    --------
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


@checked
@contextmanager
def profile(mode: Literal["counters", "events", "sync"] | None = None) -> Iterator[_core.Profile]:
    """Time the calls inside the block; the innermost block collects.

    Parameters
    ----------
    mode : str, optional
        'events' keeps every zone, for the trace; 'counters' keeps totals only; 'sync' is 'events'
        where each zone waits for the device, so that its time is the device's. None takes the
        knob ``profile``, where 'off' means 'events'.

    Yields
    ------
    Profile
        What is collected.

    Raises
    ------
    ConfigError
        An unknown mode.

    Examples
    --------
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

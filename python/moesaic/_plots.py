"""Figures of matplotlib, which is imported when one is asked for; its backend stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moesaic import _core
from moesaic._errors import error_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    _Layout = Literal["constrained", "tight"]


def new_figure(operation: str, size: tuple[float, float], layout: _Layout) -> Figure:
    """Return a figure that belongs to no window. Raises UnsupportedError without matplotlib."""
    try:
        from matplotlib import figure
    except ImportError:
        raise error_of(
            _core.UnsupportedError, operation, "", "matplotlib", "none",
            "pip install 'moesaic[plot]' or matplotlib",
        ) from None  # fmt: skip
    return figure.Figure(figsize=size, layout=layout)


def check_axes(operation: str, ax: Axes | None) -> None:
    """Raises DTypeError for what cannot be drawn on."""
    if ax is not None and not (hasattr(ax, "figure") and hasattr(ax, "plot")):
        raise error_of(
            _core.DTypeError, operation, "ax", "Axes of matplotlib or None", type(ax).__name__
        )

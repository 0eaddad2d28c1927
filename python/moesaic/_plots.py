"""Figures of matplotlib, which is imported when one is asked for; its backend stays as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moesaic import _core
from moesaic._errors import error_of

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    _Layout = Literal["constrained", "tight"]

_FORMATS = ("png", "pdf", "svg", "jpg", "webp")  # what a message names of all there are


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


def check_picture(operation: str, path: str | PathLike[str] | None) -> None:
    """Raises DTypeError for no path, ConfigError for an ending that matplotlib does not write."""
    if path is None:
        return
    try:
        name = os.fsdecode(path)
    except TypeError:
        got = type(path).__name__
        raise error_of(
            _core.DTypeError, operation, "path", "a path or None", got, "axes by name: ax=..."
        ) from None
    ending = Path(name).suffix[1:].lower()
    known = picture_formats(operation)
    if ending and ending not in known:
        expected = f"one that ends in {', '.join(f'.{one}' for one in _FORMATS if one in known)}"
        raise error_of(_core.ConfigError, operation, "path", expected, repr(f".{ending}"))


def picture_formats(operation: str) -> dict[str, str]:
    """The formats that figures are written in, by ending. Raises UnsupportedError as new_figure."""
    figure = new_figure(operation, (1, 1), "tight")
    formats: dict[str, str] = figure.canvas.get_supported_filetypes()
    return formats


def check_axes(operation: str, ax: Axes | None) -> None:
    """Raises DTypeError for what cannot be drawn on."""
    if ax is not None and not (hasattr(ax, "figure") and hasattr(ax, "plot")):
        raise error_of(
            _core.DTypeError, operation, "ax", "Axes of matplotlib or None", type(ax).__name__
        )

"""Functions written in Python refuse arguments as those of the compiled module do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from moesaic import _core

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make an ``ArgumentError`` of a call that the parameters do not take.

    A call that they take pays for nothing; any other TypeError stays what it is.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            problem = _problem(function, args, kwargs)
            if problem is None:
                raise
            raise _core.make_error(_core.ArgumentError, *problem) from error

    return call


def _problem(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, ...] | None:
    """What is wrong with the arguments, as the parts of a message; None when they fit."""
    import difflib
    import inspect

    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        pass
    else:
        return None
    name = function.__name__
    parameters = signature.parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for keyword in kwargs:
        if keyword not in parameters and not any_keyword:
            near = difflib.get_close_matches(keyword, parameters, 1, 0.5)
            hint = f"nearest: {near[0]}" if near else f"known: {', '.join(parameters)}"
            return name, keyword[:40], "", "an unknown keyword", hint[:110]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters.values() if p.kind in by_position]
    if len(args) > len(positional):
        most = f"at most {len(positional)}" if positional else "none"
        return name, "arguments", f"{most} by position", str(len(args))
    for parameter in positional[: len(args)]:
        if parameter.name in kwargs:
            return name, parameter.name, "one value", "one by position and one by name"
    for i, parameter in enumerate(parameters.values()):
        if parameter.default is parameter.empty and i >= len(args) and parameter.name not in kwargs:
            return name, parameter.name, "a value", "nothing"
    return None

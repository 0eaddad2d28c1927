"""Errors of this package's Python code: every part a field, whatever names of files hold."""

from typing import TypeVar

from moesaic import _core
from moesaic._files import printable

_E = TypeVar("_E", bound=_core.Error)


def error_of(
    kind: type[_E], operation: str, what: str, expected: str, got: str, hint: str = ""
) -> _E:
    """``_core.make_error`` for text that need not be UTF-8, which it would refuse."""
    parts = map(printable, (operation, what, expected, got, hint))
    return _core.make_error(kind, *parts)


def require_kind(
    operation: str, what: str, value: object, kind: type | tuple[type, ...], expected: str
) -> None:
    """Raises DTypeError for an optional argument that is there and of another kind."""
    if value is not None and not isinstance(value, kind):
        raise error_of(
            _core.DTypeError, operation, what, f"{expected} or None", type(value).__name__
        )

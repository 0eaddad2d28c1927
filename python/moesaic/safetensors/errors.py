"""What is wrong with a checkpoint, said in one form, whatever its names hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from moesaic import _core
from moesaic._errors import error_of

_P = ParamSpec("_P")
_R = TypeVar("_R")

OPERATION = "load_from_safetensors"

#: progress(name, done_bytes, total_bytes)
Progress = Callable[[str, int, int], None]


def wrong(where: str, expected: str, got: object, hint: str = "") -> _core.FormatError:
    return error_of(_core.FormatError, OPERATION, where, expected, str(got), hint)


def unsupported(where: str, expected: str, got: object, hint: str = "") -> _core.UnsupportedError:
    return error_of(_core.UnsupportedError, OPERATION, where, expected, str(got), hint)


class _OfCaller(Exception):
    """Carries what the caller's own function raised past ``as_format_errors``."""


def carried(call: Callable[_P, _R] | None) -> Callable[_P, _R] | None:
    """A function of the caller, whose own errors stay what they are."""
    if call is None:
        return None

    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            raise _OfCaller from error

    return called


@contextmanager
def as_format_errors(where: str) -> Iterator[None]:
    """Whatever a file's contents can make Python raise is an error of the file.

    Errors of this package, of the system and of the caller's functions stay as they are.
    """
    try:
        yield
    except (_core.Error, OSError, MemoryError):
        raise
    except _OfCaller as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    except Exception as error:
        raise wrong(
            where, "values that fit each other", f"{type(error).__name__}: {error}"
        ) from error

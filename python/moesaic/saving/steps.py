"""The progress of a write, by the contract of loads."""

from collections.abc import Callable
from typing import TypeAlias

from moesaic import _core
from moesaic._errors import error_of

#: What callers give as ``progress``.
ProgressArgument: TypeAlias = "Callable[[_core.Progress], object] | bool | None"


class Steps:
    """Tells a callback how much is done. One that returns False cancels; its errors pass."""

    def __init__(self, operation: str, progress: ProgressArgument, total: int) -> None:
        self.operation, self.total, self.done = operation, total, 0
        self._callback: Callable[[_core.Progress], object] | None = None
        if progress is True:
            from moesaic._progress import bar

            self._callback = bar()
        elif progress is not None and progress is not False:
            if not callable(progress):
                raise error_of(
                    _core.DTypeError, operation, "progress",
                    "a callable, True or None", type(progress).__name__,
                )  # fmt: skip
            self._callback = progress

    def advance(self, nbytes: int, what: str) -> None:
        """Raises OperationCancelled when the callback returns False."""
        self.done += nbytes
        if self._callback is None:
            return
        if self._callback(_core.make_progress(self.done, self.total, what)) is False:
            got = "cancelled by the progress callback"
            raise error_of(_core.OperationCancelled, self.operation, what, "", got)

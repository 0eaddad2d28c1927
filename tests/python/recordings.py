"""Calls that a recording of a graph refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import moesaic as mo


def refusal(call: Callable[[], object], recording: AbstractContextManager) -> mo.CaptureError:
    """The CaptureError that `call` raises while `recording` is open.

    It is caught before the recording ends: one that has stayed empty ends with a warning of torch,
    which, where warnings are errors, would take the error's place.
    """
    found = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with recording:
            try:
                call()
            except mo.CaptureError as error:
                found = error
    assert found is not None, "the call was recorded"
    return found

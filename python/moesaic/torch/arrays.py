"""Tensors as arrays that the core reads, and the number of its threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from moesaic import _core


def array_of(tensor: torch.Tensor) -> Any:
    """The memory of a tensor on the CPU, without a copy.

    numpy's view takes a third of the time of DLPack, which exchanges capsules in both directions.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return _core.asarray(tensor.view(torch.int16).numpy().view(np.uint16), "bf16")
    return tensor.numpy()


@contextmanager
def threads_of_torch() -> Iterator[None]:
    """The calls inside use as many threads as torch does.

    ``mo.tuning(threads=)`` and MOESAIC_THREADS come before ``torch.set_num_threads``.
    """
    tuning = _tuning_for(torch.get_num_threads())
    if tuning is None:
        yield
        return
    token = _core.tuning_variable.set(tuning)
    try:
        yield
    finally:
        _core.tuning_variable.reset(token)


_tunings: dict[int, _core.Tuning | None] = {}


def _tuning_for(threads: int) -> _core.Tuning | None:
    """The current tuning with this many threads; None where it already says how many."""
    current = _core.tuning_variable.get()
    if current is not None:
        return current.replace(threads=threads) if current.threads is None else None
    if threads not in _tunings:  # of the environment, which is read once
        process = _core.current_tuning()
        _tunings[threads] = process.replace(threads=threads) if process.threads is None else None
    return _tunings[threads]

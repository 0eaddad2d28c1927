"""Tensors as arrays that the core reads, and the number of its threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moesaic import _core


def array_of(tensor: torch.Tensor) -> Any:
    """The memory of a tensor on the CPU, without a copy.

    numpy's view takes a third of the time of DLPack, which exchanges capsules in both directions.
    """
    if tensor.dtype == torch.bfloat16 and tensor.is_cpu:  # which numpy has not
        address = tensor.data_ptr()
        return _core._bf16_view(address, tensor.shape, tensor.stride(), tensor)  # type: ignore[attr-defined]
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()


class threads_of_torch:  # noqa: N801 - used as a context manager
    """The calls inside use as many threads as torch does: the same ones, where they are OpenMP's.

    ``mo.tuning(threads=)`` and MOESAIC_THREADS come before ``torch.set_num_threads``; another
    number of threads than torch's are our own.
    """

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        tuning = _tuning_for(torch.get_num_threads())
        self._token = None if tuning is None else _core.tuning_variable.set(tuning)

    def __exit__(self, *exc_info: object) -> None:
        if self._token is not None:
            _core.tuning_variable.reset(self._token)


# Threads of both would spin for work at the same time, and keep each other from the CPUs.
_core.borrow_openmp(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))

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

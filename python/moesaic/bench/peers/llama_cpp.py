"""llama.cpp through ``llama-cpp-python``: a model of a GGUF file, and one sequence of tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .base import PeerUnavailable


class LlamaCpp:
    """Raises PeerUnavailable where the package is missing or does not open the file.

    It computes on a thread of its own: ggml sets the shapes of AMX tiles once for each thread, and
    torch, which sets its own, leaves none behind.
    """

    def __init__(self, path: Path, context: int, threads: int) -> None:
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:  # the last two: of its library
            raise PeerUnavailable(f"pip install llama-cpp-python ({error})"[:200]) from error
        try:
            self._llama: Any = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=context,
                n_batch=512,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise PeerUnavailable(f"{type(error).__name__}: {error}"[:200]) from error
        self._thread = ThreadPoolExecutor(1)

    def clear(self) -> None:
        """Forget all tokens."""
        self._llama.reset()

    def evaluate(self, tokens: list[int]) -> None:
        """Run the model on further tokens."""
        self._thread.submit(self._llama.eval, tokens).result()

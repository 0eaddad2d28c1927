"""What a state_dict keeps of weights: how to read them again, or what refuses to be lost.

Weights that came from files are kept as a reference to them, which any format of tensors holds.
Weights made of arrays have none. Their entry goes from module to module in one process, and cannot
be written: ``torch.save`` and ``safetensors`` stop there instead of leaving the weights out.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from moesaic import _core
from moesaic._errors import error_of
from moesaic.torch.frozen import Frozen, PooledExperts

_F = TypeVar("_F", bound=Frozen)

#: What pickles of weights from files consist of; nothing else is ever called.
_NAMES = {
    *(("moesaic.torch.frozen", name) for name in ("FrozenExperts", "FrozenLayer")),
    *(("moesaic.torch.frozen", name) for name in ("FrozenMatrix", "FrozenTable")),
    ("moesaic.torch.frozen", "mapped_experts"),
    *(("moesaic._pickling", name) for name in ("GgufSource", "CheckpointSource", "value")),
    *(("moesaic._pickling", name) for name in ("gguf_layer", "gguf_stack", "stack_of")),
    *(("moesaic._pickling", name) for name in ("gguf_matrix", "gguf_file", "gguf_store")),
    *(("moesaic._pickling", name) for name in ("checkpoint_layer", "checkpoint_stack")),
    *(("moesaic", name) for name in ("Activation", "MoeConfig", "RouterConfig")),
}

#: Those of them that may keep repacked weights.
_CACHED = {
    "checkpoint_layer", "checkpoint_stack", "gguf_layer", "gguf_stack", "gguf_matrix",
}  # fmt: skip


class Unsaved:
    """The entry of weights that no file holds."""

    def __init__(self, weights: Frozen) -> None:
        self.weights = weights

    def __deepcopy__(self, memo: dict[int, Any]) -> Unsaved:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise _lost()

    def __getattr__(self, name: str) -> Any:
        """Whoever takes this for a tensor is about to write it."""
        raise AttributeError(name) if name.startswith("__") else _lost()


def _lost() -> _core.Error:
    return error_of(
        _core.UnsupportedError,
        "state_dict",
        "experts",
        "weights from a file, which a state_dict refers to",
        "weights made of arrays, which would be lost",
        "load them from a file that mo.write_gguf wrote, or save the model before it is converted",
    )


def state_of(weights: Frozen) -> torch.Tensor | Unsaved:
    """The entry of weights: uint8 [bytes], or ``Unsaved``."""
    try:
        data = pickle.dumps(weights)
    except TypeError:  # made of arrays
        return Unsaved(weights)
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _without_cache(load: Any) -> Any:
    """A loader of ``_pickling`` that keeps no repacked weights."""

    def reduced(source: Any, what: Any, options: dict[str, Any]) -> Any:
        return load(source, what, {**options, "weight_cache": False})

    return reduced


class _Reader(pickle.Unpickler):
    """A state_dict comes from outside, so that it names no function of its own choice.

    It names files to read, and no folder to write to.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _malformed(f"the name {module}.{name}")
        found = super().find_class(module, name)
        return _without_cache(found) if name in _CACHED else found


def weights_of(state: object, old: _F) -> _F:
    """The weights of an entry, which take the place of ``old``.

    Pooled experts stay pooled where the entry is theirs. Raises FormatError for another kind of
    entry, other sizes, or a file that changed.
    """
    if isinstance(state, Unsaved):
        found: object = state.weights
    elif isinstance(state, torch.Tensor) and state.dtype == torch.uint8:
        try:
            found = _Reader(io.BytesIO(state.cpu().numpy().tobytes())).load()
        except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError) as error:
            if isinstance(error, _core.Error):
                raise
            raise _malformed(str(error)) from error
    else:
        raise _malformed(type(state).__name__)
    if not old.accepts(found):
        raise _malformed(type(found).__name__)
    found = cast("_F", found)
    if found.sizes != old.sizes:
        raise error_of(
            _core.FormatError, "load_state_dict", "sizes", str(old.sizes), str(found.sizes)
        )
    mine = state_of(old)
    same = isinstance(state, torch.Tensor) and isinstance(mine, torch.Tensor)
    if same and isinstance(old, PooledExperts) and torch.equal(state.cpu(), mine):
        return old
    return found


def _malformed(got: str) -> _core.Error:
    return error_of(
        _core.FormatError, "load_state_dict", "experts", "an entry of a state_dict of moesaic", got
    )


class FrozenModule(nn.Module):
    """A module over weights that no one changes, to which its state_dict refers."""

    _weights: Frozen

    def get_extra_state(self) -> Any:
        """Return the entry of a state_dict: where the weights are, or what cannot be saved."""
        return state_of(self._weights)

    def set_extra_state(self, state: Any) -> None:
        """Take the weights of an entry of a state_dict."""
        self._weights = weights_of(state, self._weights)

"""What a conversion will write, checked before any of it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic.saving.container import Value
from moesaic.saving.tensors import Array, Tensor, row_bytes

if TYPE_CHECKING:
    from moesaic.saving.convert.imatrix import Importances

OPERATION = "convert"


def encode(values: Array, type: str, importance: Array | None = None) -> Array:
    """Rows of f32 as rows of a GGUF type, u8 [rows, row bytes], by importances [cols] or none."""
    return _core.quantize(np.ascontiguousarray(values, np.float32), type, weights=importance)


def check_type(what: str, type: str) -> None:
    """Raises ConfigError unless experts can become this type."""
    types = _core.quant_types()
    if type in types and types[type]["encodes"] and types[type]["gguf"]:
        return
    near = next((name for name in types if name.lower() == type.lower() and name != type), None)
    expected = near or "a type with an encoder, such as Q4_K, Q8_0 or MXFP4"
    got = repr(type)
    if type in types:
        got += ", which has none" if types[type]["gguf"] else ", which GGUF has not"
    raise error_of(_core.ConfigError, OPERATION, what, expected, got)


@dataclass(frozen=True)
class Types:
    """The type of each role, that of all roles where it is None; None for both keeps the stored."""

    experts: str | None = None
    gate: str | None = None
    up: str | None = None
    down: str | None = None

    def check(self) -> None:
        """Raises ConfigError for a name that is no type with an encoder."""
        for name, type in vars(self).items():
            if type is not None:
                check_type(name, type)
        if not any(vars(self).values()):
            expected = "a type such as Q4_K"
            raise error_of(_core.ConfigError, OPERATION, "experts", expected, "none")

    def of(self, part: str, stored: str, where: str) -> str:
        """The type of gate, up, down, or of both gate and up in one tensor."""
        if part != "gate_up":
            return getattr(self, part) or self.experts or stored
        gate, up = (self.of(role, stored, where) for role in ("gate", "up"))
        if gate != up:
            expected = "one type for gate and up, which are one tensor"
            raise error_of(_core.ConfigError, OPERATION, where, expected, f"{gate} and {up}")
        return gate


def check_rows(where: str, part: str, cols: int, type: str) -> None:
    """Raises ShapeError unless rows of this length are whole blocks of the type."""
    try:
        row_bytes(type, cols)
    except _core.ShapeError as error:
        hint = f"another type for {part.replace('_', ' and ')} may fit"
        raise error_of(
            _core.ShapeError, OPERATION, where, error.expected, error.got, hint
        ) from None


def chosen(layers: Sequence[int] | None, there: Sequence[int], source: str) -> list[int]:
    """The layers to convert. Raises ShapeError for one without experts."""
    if not there:
        raise error_of(_core.FormatError, OPERATION, source, "layers with experts", "none")
    if layers is None:
        return list(there)
    for layer in layers:
        if layer not in there:
            expected = f"layers with experts, {there[0]} to {there[-1]}"
            raise error_of(_core.ShapeError, OPERATION, "layers", expected, str(layer))
    return sorted(set(layers))


@dataclass(frozen=True)
class Plan:
    """A file to be: its metadata, its tensors in order, and what it is made from."""

    metadata: dict[str, Value]
    tensors: list[Tensor]
    #: Identifies the source: names, sizes and times of its files.
    source: list[Any]
    #: The configurations that its layers are to have, by block; empty where none is known.
    configs: dict[int, _core.MoeConfig] = field(default_factory=dict)
    #: What the encoders are told of the columns; None where they all count alike.
    importances: Importances | None = None

"""What ranks have in common: the arguments of a layer, its file, and how it makes numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypeAlias

from moesaic import _core
from moesaic._errors import error_of
from moesaic.distributed.groups import Group
from moesaic.distributed.placement import Placement

Combine: TypeAlias = Literal["exact", "partial"]
Protocol: TypeAlias = Literal["auto", "alltoall", "allgather"]

OPERATION = "distributed.MoeLayer"
_COMBINES, _PROTOCOLS = ("exact", "partial"), ("auto", "alltoall", "allgather")
_PRECISIONS = ("auto", "exact", "fast")


@dataclass(frozen=True)
class Settings:
    """What a caller asks of a layer beside its weights."""

    combine: Combine
    protocol: Protocol
    max_tokens: int | None

    def check(self, plan: Placement, group: Group, block: int) -> None:
        for name, value, known in (
            ("combine", self.combine, _COMBINES),
            ("protocol", self.protocol, _PROTOCOLS),
        ):
            if value not in known:
                raise refusal(_core.ConfigError, name, " | ".join(known), repr(value))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise refusal(_core.ConfigError, "max_tokens", "at least 1, or None", self.max_tokens)
        if not isinstance(plan, Placement):
            raise refusal(_core.DTypeError, "plan", "a Placement", type(plan).__name__)
        if plan.ranks != group.size:
            raise refusal(
                _core.ConfigError, "plan.ranks", f"{group.size}, as there are", plan.ranks
            )
        plan.experts(0, block)


class LazyText:
    """A text that is made when it is asked for."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make

    def __str__(self) -> str:
        return self._make()


#: What ranks compare when they open a layer.
FACTS = ("version", "source", "config", "plan", "precision", "settings", "isa")


def facts_of(
    layer: _core.MoeLayer, plan: Placement, settings: Settings, source: object, block: int
) -> dict[str, str]:
    import moesaic

    kept = plan.slots[0] if not plan.layers else plan.slots[plan.layers.index(block)]
    return {
        "version": moesaic.__version__,
        "source": str(source),
        "config": _digest(repr(layer.config.to_dict())),
        "plan": _digest(repr((plan.num_experts, kept.tolist()))),
        "precision": layer.precision,
        "settings": f"{settings.combine}, {settings.protocol}, max_tokens {settings.max_tokens}",
        "isa": _instruction_set(layer) if settings.combine == "exact" else "any",
    }


def _instruction_set(layer: _core.MoeLayer) -> str:
    """What the bits of a layer depend on beside the weights: kernels end in its name."""
    return _core.explain(layer, 1)["up kernel"].rpartition("_")[2]


def check_kept(layer: _core.MoeLayer, plan: Placement, rank: int, block: int) -> None:
    if plan.num_experts != layer.config.num_experts:
        expected = f"{layer.config.num_experts}, as the layer has"
        raise refusal(_core.ConfigError, "plan.num_experts", expected, plan.num_experts)
    lacking = sorted(set(plan.experts(rank, block)) - set(layer.stack.experts))
    if lacking:
        expected = "all that the plan gives to this rank"
        raise refusal(_core.ConfigError, "layer.stack.experts", expected, f"none of {lacking[:8]}")


def refusal(kind: type[_core.Error], what: str, expected: object, got: object) -> _core.Error:
    return error_of(kind, OPERATION, what, str(expected), str(got))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def source_text(found: str, options: dict[str, Any]) -> str:
    """What was read, and how."""
    elsewhere = ("precision", "progress")
    said = {name: repr(options[name]) for name in sorted(options) if name not in elsewhere}
    return f"{found}, options {_digest(repr(said))}" if said else found


def gguf_hash(file: _core.GgufFile) -> str:
    """The names, types and places of all tensors, and the metadata."""
    return f"hash {file._source().tensors:x}"  # type: ignore[attr-defined]


def checkpoint_hash(path: str | PathLike[str], block: int) -> str:
    from moesaic._pickling import CheckpointSource
    from moesaic.safetensors.reader import Checkpoint
    from moesaic.safetensors.sets import of_layer

    source = CheckpointSource(path, block, None)
    source.note(of_layer(Checkpoint(path), block, None))
    return f"hash {source.tensors[:16]}"


def mode_of(layer: _core.MoeLayer) -> int:
    """How numbers are made in this context, as one number."""
    tuning = _core.current_tuning()
    asked = tuning.precision if layer.precision == "auto" else layer.precision
    return 2 * _PRECISIONS.index(asked) + int(tuning.batch_invariant)


def mode_text(mode: object) -> str:
    assert isinstance(mode, int)
    return f"{_PRECISIONS[mode // 2]}{', batch_invariant' if mode % 2 else ''}"

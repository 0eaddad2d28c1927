"""Layers to a GGUF file."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, SupportsIndex

from moesaic import _core
from moesaic._errors import error_of, require_kind
from moesaic.saving import keys, names, stacks
from moesaic.saving.atomic import naming, replacing
from moesaic.saving.container import Value, begin, layout_of, pieces, value_of, write_at
from moesaic.saving.small import small_tensors
from moesaic.saving.steps import ProgressArgument, Steps
from moesaic.saving.tensors import Tensor, of_array
from moesaic.saving.verify import check_layers


def write_layers(
    path: str | os.PathLike[str],
    layers: Any,
    *,
    operation: str,
    metadata: Mapping[str, Any] | None,
    architecture: str | None,
    fused: bool,
    overwrite: bool,
    progress: ProgressArgument,
) -> None:
    """``write_gguf`` under the name by which it was called."""
    require_kind(operation, "metadata", metadata, Mapping, "a mapping")
    require_kind(operation, "architecture", architecture, str, "a str")
    blocks = blocks_of(operation, layers)
    _check_kept(operation, blocks)
    row = keys.known(operation, architecture or _architecture(operation, blocks))
    configs = {block: layer.config for block, layer in blocks.items()}
    values = keys.keys_of(row, configs) | _given(operation, metadata)
    tensors = [
        tensor
        for block, layer in blocks.items()
        for tensor in _tensors(operation, block, layer, row["architecture"], fused)
    ]
    steps = Steps(operation, progress, sum(tensor.nbytes for tensor in tensors))
    path = Path(os.fsdecode(path))
    with replacing(operation, path, overwrite) as temporary:
        with naming(path):
            start = begin(temporary, values, tensors)
        layout = layout_of(start, values, tensors)
        check_layers(operation, temporary, layout, tensors, configs)
        with temporary.open("r+b", buffering=0) as file:
            for tensor in tensors:
                offset = layout.offsets[tensor.name]
                for piece in pieces(tensor.unit(0)):
                    with naming(path):
                        write_at(file, offset, [piece])
                    offset += piece.nbytes
                    steps.advance(piece.nbytes, tensor.name)


def blocks_of(operation: str, layers: Any) -> dict[int, _core.MoeLayer]:
    """Layers by block, in order. Raises DTypeError and ConfigError."""
    if isinstance(layers, _core.MoeLayer):
        layers = [layers]
    if isinstance(layers, Sequence):
        layers = dict(enumerate(layers))
    if not isinstance(layers, Mapping):
        raise error_of(
            _core.DTypeError, operation, "layers",
            "a MoeLayer, a sequence or a mapping of them by block", type(layers).__name__,
        )  # fmt: skip
    blocks = {}
    for block, layer in layers.items():
        if not isinstance(layer, _core.MoeLayer):
            what, got = f"layers[{block!r}]", type(layer).__name__
            raise error_of(_core.DTypeError, operation, what, "a MoeLayer", got)
        number = _block_number(block)
        if number is None:
            expected = f"blocks of 0 to {(1 << 20) - 1}"
            raise error_of(_core.ConfigError, operation, "layers", expected, repr(block))
        blocks[number] = layer
    if not blocks:
        raise error_of(_core.ConfigError, operation, "layers", "at least one", "none")
    return dict(sorted(blocks.items()))


def _block_number(block: object) -> int | None:
    """An integer of Python or numpy as one of Python; None for what is no number of a block."""
    if isinstance(block, bool) or not isinstance(block, SupportsIndex):
        return None
    number = operator.index(block)
    return number if 0 <= number < 1 << 20 else None


def _check_kept(operation: str, blocks: Mapping[int, _core.MoeLayer]) -> None:
    for block, layer in blocks.items():
        kept, count = len(layer.stack.experts), layer.stack.num_experts
        if kept < count:
            raise error_of(
                _core.UnsupportedError, operation, f"layers[{block!r}]", "all experts in memory",
                f"{kept} of {count}", "load it without experts=",
            )  # fmt: skip


def _architecture(operation: str, blocks: Mapping[int, _core.MoeLayer]) -> str:
    found = {layer.config.architecture for layer in blocks.values()}
    if len(found) > 1:
        raise error_of(
            _core.ConfigError, operation, "layers", "layers of one architecture",
            ", ".join(sorted(map(repr, found))), "architecture= names one for all",
        )  # fmt: skip
    return found.pop()


def _given(operation: str, metadata: Mapping[str, Any] | None) -> dict[str, Value]:
    values = {}
    for key, value in (metadata or {}).items():
        if key == "general.architecture":
            hint = "architecture= says it"
            raise error_of(_core.ConfigError, operation, "metadata", "other keys", repr(key), hint)
        values[key] = value_of(operation, key, value)
    return values


def _tensors(
    operation: str, block: int, layer: _core.MoeLayer, architecture: str, fused: bool
) -> list[Tensor]:
    where = f"block {block}"
    config, shared, latent = layer.config, layer.shared, layer.latent
    if layer.router_weight is None:
        what = f"{where}: router_weight"
        raise error_of(_core.UnsupportedError, operation, what, "one", "none")
    if config.router.identity_experts:
        raise error_of(
            _core.UnsupportedError, operation, f"{where}: router.identity_experts",
            "0, as GGUF has no key for them", str(config.router.identity_experts),
        )  # fmt: skip
    tensors = stacks.routed(operation, where, layer.stack, fused)
    if shared is not None:
        # The factor of the model is in the scale of the stack, and comes back with the config.
        tensors += stacks.single(
            operation, where, shared.stack, names.shared, {"down": shared.scale}
        )
    if latent is not None:
        down, up = names.latent(architecture)
        stems = {"up": down, "down": up}  # which way it leads, and which role of the stack it is
        tensors += stacks.single(
            operation, where, latent, lambda role, kind: f"{stems[role]}.{kind}", {}
        )
    arguments: dict[str, Any] = {
        "config": config, "router_weight": layer.router_weight,
        "shared_gate": None if shared is None else shared.gate,
        "token_experts": layer.token_experts,
    }  # fmt: skip
    arguments.update(layer.norms.items())
    small = small_tensors(architecture, arguments)
    tensors += [of_array(name, values) for name, values in small.items()]
    return [replace(tensor, name=f"blk.{block}.{tensor.name}") for tensor in tensors]

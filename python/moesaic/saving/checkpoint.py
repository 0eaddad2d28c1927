"""Layers to a folder as Hugging Face has it: model.safetensors and config.json.

The container is 8 bytes with the length of a JSON header, the header with each tensor's dtype,
shape and place, and the data. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic import _core
from moesaic._errors import error_of, require_kind
from moesaic._files import shown
from moesaic.hf_config import find_family
from moesaic.hf_config.families import Family
from moesaic.safetensors.encoded import to_bf16
from moesaic.saving.atomic import check_target, naming, replacing
from moesaic.saving.container import pieces, write_at
from moesaic.saving.facts import first_difference
from moesaic.saving.hf_fields import fields_of
from moesaic.saving.hf_names import NAMINGS, Naming
from moesaic.saving.layers import blocks_of
from moesaic.saving.stacks import check_no_deltas
from moesaic.saving.steps import ProgressArgument, Steps
from moesaic.saving.tensors import Array

OPERATION = "save_safetensors"
_DENSE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]

    def data(self) -> memoryview:
        values = np.ascontiguousarray(self.read(), np.float32)
        if self.dtype == "F16":
            values = values.astype(np.float16)
        elif self.dtype == "BF16":
            values = to_bf16(values)
        return values.reshape(-1).view(np.uint8).data


def save(
    path: str | os.PathLike[str],
    layers: Any,
    *,
    model_type: str | None,
    dequantize: str | None,
    config: Mapping[str, Any] | None,
    overwrite: bool,
    progress: ProgressArgument,
) -> None:
    """See ``save_safetensors``."""
    require_kind(OPERATION, "model_type", model_type, str, "a str")
    require_kind(OPERATION, "dequantize", dequantize, str, "a str")
    require_kind(OPERATION, "config", config, Mapping, "a mapping")
    if dequantize is not None and dequantize not in _DENSE:
        expected, got = "f32, f16, bf16 or None", shown(dequantize)
        raise error_of(_core.ConfigError, OPERATION, "dequantize", expected, got)
    blocks = blocks_of(OPERATION, layers)
    fields = _model(blocks, model_type)
    naming_of = NAMINGS[fields["model_type"]]
    tensors = [
        tensor
        for block, layer in blocks.items()
        for tensor in _tensors(block, layer, naming_of, dequantize and _DENSE[dequantize])
    ]
    _write(Path(os.fsdecode(path)), tensors, {**(config or {}), **fields}, overwrite, progress)


def _model(blocks: Mapping[int, _core.MoeLayer], model_type: str | None) -> dict[str, Any]:
    """The fields of the first model type that says what all layers are."""
    configs = {block: layer.config for block, layer in blocks.items()}
    if model_type is None:
        candidates = _candidates(next(iter(configs.values())).architecture)
    else:
        candidates = [model_type]
    found = [name for name in candidates if name in NAMINGS]
    if not found:
        expected = f"one of {', '.join(NAMINGS)}"
        got = repr(model_type or next(iter(configs.values())).architecture)
        raise error_of(_core.ConfigError, OPERATION, "model_type", expected, got)
    problem: _core.Error | None = None
    for name in found:
        family = find_family({"model_type": name})[0]
        fields = fields_of(name, family, configs)
        try:
            for block, config in configs.items():
                _check(block, config, family, fields)
        except _core.Error as error:
            problem = problem or error
            continue
        return fields
    assert problem is not None
    raise problem


def _candidates(architecture: str) -> list[str]:
    stored = [
        row["model_types"].split()
        for row in _core.architecture_table()
        if row["architecture"] == architecture
    ]
    return [architecture, *(stored[0] if stored else [])]


def _check(block: int, config: _core.MoeConfig, family: Family, fields: dict[str, Any]) -> None:
    """Raises UnsupportedError naming what the fields do not say of the layer."""
    name = fields["model_type"]
    where = f"layer {block}"
    try:
        got = _core.MoeConfig.from_hf(fields, block)
    except _core.Error as error:
        raise error_of(
            _core.UnsupportedError, OPERATION, where,
            f"a layer as model type {name!r} has them", f"one that it does not open: {error}",
        ) from None  # fmt: skip
    for bias in ("router_bias", "selection_bias"):
        use = family.facts[bias]
        there = bool(getattr(config.router, bias))
        if (use == "required" and not there) or (use == "ignored" and there):
            wanted = "one" if use == "required" else "none"
            raise error_of(
                _core.UnsupportedError, OPERATION, f"{where}: router.{bias}",
                f"{wanted}, as model type {name!r} has", "one" if there else "none",
            )  # fmt: skip
    router = got.router.replace(
        router_bias=config.router.router_bias, selection_bias=config.router.selection_bias
    )
    difference = first_difference(config, got.replace(router=router))
    if difference is not None:
        path, stated, found = difference
        raise error_of(
            _core.UnsupportedError, OPERATION, f"{where}: {path}",
            f"{shown(stated)}, as the layer has", shown(found),
            f"model type {name!r} cannot say it; model_type= names another",
        )  # fmt: skip


def _tensors(
    block: int, layer: _core.MoeLayer, naming_of: Naming, decoded: str | None
) -> Iterator[_Tensor]:
    where, start = f"layer {block}", f"model.layers.{block}."
    config, shared = layer.config, layer.shared
    if layer.router_weight is None:
        what = f"{where}: router_weight"
        raise error_of(_core.UnsupportedError, OPERATION, what, "one", "none")

    def small(name: str, values: Any) -> _Tensor:
        array = np.asarray(values, np.float32)
        return _Tensor(f"{start}{naming_of.block}.{name}", "F32", array.shape, lambda: array)

    for role in layer.stack.quants:
        dtype = _dtype(where, layer.stack, role, decoded)
        for expert in range(layer.stack.num_experts):
            name = start + naming_of.expert(expert, role)
            yield _matrix(name, dtype, layer.stack, role, expert)
    yield small(naming_of.router, layer.router_weight)
    if config.router.selection_bias:
        bias = np.reshape(config.router.selection_bias, naming_of.bias_shape)
        yield small(naming_of.selection_bias, bias)
    if shared is None:
        return
    for role in shared.stack.quants:
        # The factor of the model is in the scale of the stack, and comes back with the config.
        dtype = _dtype(where, shared.stack, role, decoded, shared.scale if role == "down" else 1.0)
        yield _matrix(start + naming_of.shared_expert(role), dtype, shared.stack, role, 0)
    if shared.gate is not None:
        yield small(naming_of.shared_gate, shared.gate[None])


def _dtype(
    where: str, stack: _core.ExpertStack, role: Any, decoded: str | None, factor: float = 1.0
) -> str:
    """The dtype of a role in the file."""
    check_no_deltas(OPERATION, where, stack)
    if role in stack.biases:
        what, expected = f"{where}: biases[{role!r}]", "none, which no such checkpoint has"
        raise error_of(_core.UnsupportedError, OPERATION, what, expected, "one")
    if factor != 1.0:
        what = f"{where}: shared_scale"
        raise error_of(_core.UnsupportedError, OPERATION, what, "1", str(factor))
    type = stack.quants[role]
    scaled = role in stack.scales
    if type in _SIZES and not scaled:
        return type
    if decoded is None:
        got = f"{type} with scales" if scaled else type
        raise error_of(
            _core.UnsupportedError, OPERATION, f"{where}: {role}",
            "F32, F16 or BF16", got, "dequantize= decodes it",
        )  # fmt: skip
    return decoded


def _matrix(name: str, dtype: str, stack: _core.ExpertStack, role: Any, expert: int) -> _Tensor:
    hidden, intermediate = stack.hidden_size, stack.intermediate_size
    shape = (hidden, intermediate) if role == "down" else (intermediate, hidden)
    return _Tensor(name, dtype, shape, lambda: stack.dequantize(role, expert))


def _write(
    folder: Path,
    tensors: list[_Tensor],
    fields: dict[str, Any],
    overwrite: bool,
    progress: ProgressArgument,
) -> None:
    steps = Steps(OPERATION, progress, sum(tensor.nbytes for tensor in tensors))
    text = json.dumps(fields, indent=2) + "\n"
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    weights, config = folder / "model.safetensors", folder / "config.json"
    try:
        for path in (weights, config):
            check_target(OPERATION, path, overwrite)
        # The outer one takes its name last: a reader that finds the weights finds what they are.
        with (
            replacing(OPERATION, weights, overwrite) as weights_file,
            replacing(OPERATION, config, overwrite) as config_file,
        ):
            with naming(config):
                config_file.write_text(text, encoding="utf-8")
            _write_tensors(weights_file, weights, tensors, steps)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _write_tensors(file_path: Path, named: Path, tensors: list[_Tensor], steps: Steps) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end],
        }  # fmt: skip
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data of 8 bytes is aligned
    with file_path.open("r+b", buffering=0) as file:
        place = 8 + len(text)
        with naming(named):
            write_at(file, 0, [memoryview(len(text).to_bytes(8, "little") + text)])
        for tensor in tensors:
            for piece in pieces(tensor.data()):
                with naming(named):
                    write_at(file, place, [piece])
                place += piece.nbytes
                steps.advance(piece.nbytes, tensor.name)

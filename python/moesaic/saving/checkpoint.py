"""Layers to a folder as Hugging Face has it: model.safetensors and config.json.

The container is 8 bytes with the length of a JSON header, the header with each tensor's dtype,
shape and place, and the data. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesaic import _core
from moesaic._errors import error_of, require_kind
from moesaic._files import shown
from moesaic.hf_config import find_family
from moesaic.hf_config.families import Family
from moesaic.saving import fp8, gptq
from moesaic.saving.atomic import check_target, naming, replacing
from moesaic.saving.container import pieces, write_at
from moesaic.saving.facts import first_difference
from moesaic.saving.hf_fields import fields_of
from moesaic.saving.hf_names import NAMINGS, Naming
from moesaic.saving.hf_tensors import HfTensor
from moesaic.saving.layers import blocks_of
from moesaic.saving.stacks import check_no_deltas
from moesaic.saving.steps import ProgressArgument, Steps

OPERATION = "save_safetensors"
_DENSE = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


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
    decoded = _DENSE[dequantize] if dequantize else None
    tensors: list[HfTensor] = []
    floats: list[HfTensor] = []
    integers: list[gptq.Matrices] = []
    codes: list[fp8.Matrices] = []
    for block, layer in blocks.items():
        for part in _parts(block, layer, naming_of, decoded):
            if isinstance(part, gptq.Matrices):
                integers.append(part)
            elif isinstance(part, fp8.Matrices):
                codes.append(part)
            else:
                floats += part
        tensors += _small(block, layer, naming_of)
    if integers and codes:
        raise error_of(
            _core.UnsupportedError, OPERATION, codes[0].where,
            f"INT4 as {integers[0].where}, or floats, for config.json names one method",
            "E4M3", "dequantize= decodes both",
        )  # fmt: skip
    names = [tensor.name for tensor in floats]
    if integers:
        scheme = gptq.scheme_of(OPERATION, integers)
        fields["quantization_config"] = scheme.fields(names)
        tensors += gptq.tensors_of(scheme, integers)
    elif codes:
        scales = fp8.scheme_of(OPERATION, codes)
        fields["quantization_config"] = scales.fields(names)
        tensors += fp8.tensors_of(scales, codes)
    tensors += floats
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


def _small(block: int, layer: _core.MoeLayer, naming_of: Naming) -> Iterator[HfTensor]:
    """What is no matrix of an expert."""
    start = f"model.layers.{block}.{naming_of.block}."
    if layer.router_weight is None:
        what = f"layer {block}: router_weight"
        raise error_of(_core.UnsupportedError, OPERATION, what, "one", "none")

    def small(name: str, values: Any) -> HfTensor:
        array = np.asarray(values, np.float32)
        return HfTensor(f"{start}{name}", "F32", array.shape, lambda: array)

    yield small(naming_of.router, layer.router_weight)
    bias = layer.config.router.selection_bias
    if bias:
        yield small(naming_of.selection_bias, np.reshape(bias, naming_of.bias_shape))
    if layer.shared is not None and layer.shared.gate is not None:
        yield small(naming_of.shared_gate, layer.shared.gate[None])


def _parts(
    block: int, layer: _core.MoeLayer, naming_of: Naming, decoded: str | None
) -> Iterator[gptq.Matrices | fp8.Matrices | list[HfTensor]]:
    """The matrices of the experts, and of the shared ones."""
    start = f"model.layers.{block}."

    def routed(role: str) -> list[str]:
        experts = range(layer.stack.num_experts)
        return [start + naming_of.expert(expert, role) for expert in experts]

    def of_shared(role: str) -> list[str]:
        return [start + naming_of.shared_expert(role)]

    yield from _matrices(f"layer {block}", layer.stack, routed, decoded)
    if layer.shared is not None:
        # The factor of the model is in the scale of the stack, and comes back with the config.
        where, stack, scale = f"layer {block}: shared", layer.shared.stack, layer.shared.scale
        yield from _matrices(where, stack, of_shared, decoded, scale)


def _matrices(
    where: str,
    stack: _core.ExpertStack,
    names: Callable[[str], list[str]],
    decoded: str | None,
    factor: float = 1.0,
) -> Iterator[gptq.Matrices | fp8.Matrices | list[HfTensor]]:
    """As they are encoded where they are INT4 or E4M3 and nothing else is asked for."""
    dtypes = {
        role: _dtype(where, stack, role, decoded, factor if role == "down" else 1.0)
        for role in stack.quants
    }
    if "INT4" not in dtypes.values():
        for role, dtype in dtypes.items():
            if dtype == "E4M3":
                yield fp8.Matrices(f"{where}: {role}", stack, role, names(role))
                continue
            yield [
                _matrix(name, dtype, stack, role, expert) for expert, name in enumerate(names(role))
            ]
        return
    width = stack.intermediate_size
    phases: dict[Literal["up", "down"], dict[str, slice]] = {
        "up": {"gate": slice(0, width), "up": slice(width, 2 * width)},
        "down": {"down": slice(0, stack.hidden_size)},
    }
    for first, columns in phases.items():
        marlin = stack.marlin(first)
        if marlin is None:
            raise error_of(
                _core.UnsupportedError, OPERATION, f"{where}: {first}",
                "INT4 experts as they were loaded", "a selection of them",
                "dequantize= decodes them",
            )  # fmt: skip
        modules = {role: [name.removesuffix(".weight") for name in names(role)] for role in columns}
        yield gptq.Matrices(f"{where}: {first}", marlin, columns, modules)


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
    if type in _DENSE.values() and not scaled:
        return type
    if decoded is not None:
        return decoded
    if type not in ("INT4", "E4M3") or scaled:
        got = f"{type} with scales" if scaled else type
        raise error_of(
            _core.UnsupportedError, OPERATION, f"{where}: {role}",
            "F32, F16, BF16, E4M3 or INT4", got, "dequantize= decodes it",
        )  # fmt: skip
    return type


def _matrix(name: str, dtype: str, stack: _core.ExpertStack, role: Any, expert: int) -> HfTensor:
    hidden, intermediate = stack.hidden_size, stack.intermediate_size
    shape = (hidden, intermediate) if role == "down" else (intermediate, hidden)
    return HfTensor(name, dtype, shape, lambda: stack.dequantize(role, expert))


def _write(
    folder: Path,
    tensors: list[HfTensor],
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


def _write_tensors(file_path: Path, named: Path, tensors: list[HfTensor], steps: Steps) -> None:
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

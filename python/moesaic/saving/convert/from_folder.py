"""A checkpoint folder as the source of a conversion.

Only the headers of its files are read here, and what a layer has beside its experts; experts come
one matrix at a time when their turn is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic.safetensors.encoded import Encoded
from moesaic.safetensors.errors import as_format_errors
from moesaic.safetensors.experts import EncodedExperts, Experts
from moesaic.safetensors.layer import OpenedLayer, open_layer
from moesaic.safetensors.reader import Checkpoint
from moesaic.safetensors.sets import layers_with_experts
from moesaic.saving import keys, names
from moesaic.saving.container import Value
from moesaic.saving.convert.imatrix import Importances, Rows, rows_of
from moesaic.saving.convert.others import check_copied, other_tensors
from moesaic.saving.convert.plan import OPERATION, Plan, Types, check_rows, chosen, encode
from moesaic.saving.small import small_tensors
from moesaic.saving.tensors import Array, Tensor, of_array, type_of


def plan_from_folder(
    path: str | os.PathLike[str],
    types: Types,
    layers: Sequence[int] | None,
    architecture: str | None,
    copy: bool,
    importances: Importances | None,
) -> Plan:
    """The MoE layers of a checkpoint, with their experts in the asked types.

    With ``copy`` also its other tensors, for which all layers are to be converted.
    """
    with as_format_errors(os.fsdecode(path)):
        checkpoint = Checkpoint(path)
        there = layers_with_experts(checkpoint)
        asked = chosen(layers, there, os.fsdecode(path))
        if copy and asked != there:
            expected = "all, as other=copy asks for the whole of a checkpoint"
            got = f"{len(asked)} of {len(there)}"
            raise error_of(_core.ConfigError, OPERATION, "layers", expected, got)
        return _plan(checkpoint, types, asked, architecture, copy, importances)


def _plan(
    checkpoint: Checkpoint,
    types: Types,
    layers: Sequence[int],
    architecture: str | None,
    copy: bool,
    importances: Importances | None,
) -> Plan:
    tensors: list[Tensor] = []
    configs: dict[int, _core.MoeConfig] = {}
    row: dict[str, str] = {}
    for layer in layers:
        opened = _open(checkpoint, layer)
        config = configs[layer] = opened.arguments["config"]
        if not row:
            row = keys.known(OPERATION, architecture or config.architecture)
            if copy:
                check_copied(row["architecture"])
        tensors += _routed(layer, _encoded(opened.routed), types, importances)
        if opened.shared is not None:
            tensors += _shared(layer, _encoded(opened.shared))
        tensors += _small(checkpoint, layer, row["architecture"], opened)
    if copy:
        tensors += other_tensors(checkpoint, row["architecture"], layers, _blocks(checkpoint))
    metadata = keys.keys_of(row, configs)
    metadata["moesaic.content"] = Value("tensors" if copy else "moe_layers", "STRING")
    return Plan(metadata, tensors, _identity(checkpoint), configs, importances)


def _blocks(checkpoint: Checkpoint) -> int:
    """Blocks of the model, with and without experts."""
    numbers = re.findall(r"\blayers\.(\d{1,6})\.", "\n".join(checkpoint.tensors))
    return 1 + max(map(int, numbers))


def _open(checkpoint: Checkpoint, layer: int) -> OpenedLayer:
    return open_layer(checkpoint, layer, exact=True, keep_int4=False)


def _encoded(experts: Experts) -> EncodedExperts:
    assert isinstance(experts, EncodedExperts)  # as keep_int4=False asks
    return experts


def _identity(checkpoint: Checkpoint) -> list[Any]:
    files = {checkpoint.entry(name).path for name in checkpoint.tensors}
    found = [checkpoint.folder / "config.json", *sorted(files)]
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in found if p.exists()]


def _small(
    checkpoint: Checkpoint, layer: int, architecture: str, opened: OpenedLayer
) -> list[Tensor]:
    """What is no expert, read again when it is written: all routers together are much memory."""
    shapes = small_tensors(architecture, opened.arguments)

    @cache
    def read() -> dict[str, Array]:
        return small_tensors(architecture, _open(checkpoint, layer).arguments)

    last = list(shapes)[-1]

    def take(name: str) -> Callable[[int], Array]:
        def values(_: int) -> Array:
            found = read()[name]
            if name == last:
                read.cache_clear()
            return found

        return values

    return [
        Tensor(f"blk.{layer}.{name}", type_of(values), values.shape, take(name))
        for name, values in shapes.items()
    ]


def _roles(experts: EncodedExperts) -> Iterator[tuple[str, int, int, list[Encoded]]]:
    """Each role, its place among the roles of its matrices, their number, and the matrices."""
    for roles, group in experts.encoded.items():
        for place, role in enumerate(roles):
            yield role, place, len(roles), group


def _routed(
    layer: int, experts: EncodedExperts, types: Types, importances: Importances | None
) -> list[Tensor]:
    tensors = []
    for role, place, count, group in _roles(experts):
        name, first = f"blk.{layer}.{names.experts(role)}", group[0]
        type = types.of(role, first.type, name)
        check_rows(name, role, first.k, type)
        shape = (len(group), first.n // count, first.k)
        importance = None
        if type != first.type:
            importance = rows_of(importances, name, type, len(group), first.k)
        reader = _rows(experts, group, place, count, type, importance)
        tensors.append(Tensor(name, type, shape, reader, len(group)))
        scales = _scales(experts, role, group, kept=type == first.type)
        if scales is not None:
            tensors.append(of_array(f"blk.{layer}.{names.experts(role, 'scale')}", scales))
        if any(one.has_bias for one in group):
            tensors.append(
                Tensor(
                    f"blk.{layer}.{names.experts(role, 'bias')}", "F32", shape[:2],
                    _biases(experts, group, place, count),
                )
            )  # fmt: skip
    return tensors


def _shared(layer: int, experts: EncodedExperts) -> list[Tensor]:
    """Shared experts in the types that a load would keep them in."""
    tensors = []
    for role, place, count, group in _roles(experts):
        (one,) = group
        if one.has_bias:
            raise error_of(
                _core.UnsupportedError, OPERATION, one.name,
                "shared experts without biases", "one", "GGUF has no name for it",
            )  # fmt: skip
        tensors.append(
            Tensor(
                f"blk.{layer}.{names.shared(role)}", one.type, (one.n // count, one.k),
                _rows(experts, group, place, count, one.type),
            )
        )  # fmt: skip
        if one.factor() != 1.0:
            factor = np.array([one.factor()], np.float32)
            tensors.append(of_array(f"blk.{layer}.{names.shared(role, 'scale')}", factor))
    return tensors


def _rows(
    experts: EncodedExperts,
    group: list[Encoded],
    place: int,
    count: int,
    type: str,
    importance: Rows | None = None,
) -> Callable[[int], Array]:
    def read(expert: int) -> Array:
        one = group[expert]
        mine = experts.rows_of(place, count, one.n)
        if one.type == type:
            return one.rows()[0][mine]
        values, factor = one.values()
        counts = None if importance is None else importance(expert)
        return encode(values[mine] * np.float32(factor), type, counts)

    return read


def _scales(experts: EncodedExperts, role: str, group: list[Encoded], kept: bool) -> Array | None:
    """Factors that the rows do not have in them, [E]; None where all are 1."""
    factors = [one.factor() if kept else 1.0 for one in group]
    scales = np.array(factors, np.float32)
    if role == "down" and experts.output_scales is not None:
        scales = scales * experts.output_scales
    return scales if (scales != 1.0).any() else None


def _biases(
    experts: EncodedExperts, group: list[Encoded], place: int, count: int
) -> Callable[[int], Array]:
    def read(_: int) -> Array:
        rows = []
        for one in group:
            bias = one.bias()
            bias = np.zeros(one.n, np.float32) if bias is None else bias
            rows.append(bias[experts.rows_of(place, count, one.n)])
        return np.stack(rows)

    return read

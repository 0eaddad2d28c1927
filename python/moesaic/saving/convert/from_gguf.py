"""A GGUF file as the source of a conversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from moesaic import _core
from moesaic._errors import error_of
from moesaic.saving.container import PIECE, Value
from moesaic.saving.convert.imatrix import Importances, rows_of
from moesaic.saving.convert.plan import OPERATION, Plan, Types, check_rows, chosen, encode
from moesaic.saving.convert.shards import Shards
from moesaic.saving.names import EXPERT_WEIGHTS, MOE_TENSOR
from moesaic.saving.tensors import Array, Tensor


def plan_from_gguf(
    file: _core.GgufFile,
    shards: Shards,
    types: Types,
    layers: Sequence[int] | None,
    omit: bool,
    importances: Importances | None,
) -> Plan:
    """Experts of ``layers`` in other types; all else as it is, or left out with ``omit``."""
    layers = chosen(layers, file.moe_layers, file.path)
    tensors, changed = [], False
    for tensor in file.tensors.values():
        weights = EXPERT_WEIGHTS.fullmatch(tensor.name)
        if weights is not None and int(weights["layer"]) in layers:
            type = types.of(weights["part"], tensor.quant, tensor.name)
            changed |= type != tensor.quant
            tensors.append(_encoded(tensor, shards, weights["part"], type, importances))
            continue
        of_layer = MOE_TENSOR.fullmatch(tensor.name)
        if not omit or (of_layer is not None and int(of_layer["layer"]) in layers):
            tensors.append(_as_it_is(tensor, shards))
    metadata = _metadata(file)
    if changed:
        # The type of most weights of the file that this one was made from.
        metadata.pop("general.file_type", None)
    if omit:
        metadata["moesaic.content"] = Value("moe_layers", "STRING")
    source = [[path, *_identity(path)] for path in file.shard_paths]
    return Plan(metadata, tensors, source, importances=importances)


def _identity(path: str) -> list[int]:
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]


def _as_it_is(tensor: _core.GgufTensor, shards: Shards) -> Tensor:
    if tensor.quant not in _core.quant_types():
        tensor.data  # noqa: B018  raises, as nothing says how many bytes it takes
    units = _units(math.prod(tensor.shape[:-1]), tensor.nbytes)
    size, shard, offset = tensor.nbytes // units, tensor.shard, tensor.offset

    def read(unit: int) -> Array:
        return shards.read(shard, offset + unit * size, size)

    return Tensor(tensor.name, tensor.quant, tensor.shape, read, units)


def _units(rows: int, nbytes: int) -> int:
    """A number of equal parts of whole rows, of some PIECE bytes each where that comes out even."""
    units = max(1, min(rows, -(-nbytes // PIECE)))
    while rows % units:
        units += 1
    return units


def _encoded(
    tensor: _core.GgufTensor,
    shards: Shards,
    part: str,
    type: str,
    importances: Importances | None,
) -> Tensor:
    if type == tensor.quant:
        return _as_it_is(tensor, shards)
    stored, shape = tensor.quant, tensor.shape
    facts = _core.quant_types().get(stored)
    if facts is None or not facts["decodes"]:
        expected = "a type with a decoder"
        raise error_of(_core.UnsupportedError, OPERATION, tensor.name, expected, stored)
    check_rows(tensor.name, part, shape[-1], type)
    experts = math.prod(shape[:-2])
    size, shard, offset = tensor.nbytes // experts, tensor.shard, tensor.offset
    importance = rows_of(importances, tensor.name, type, experts, shape[-1])

    def expert(index: int) -> Array:
        data = shards.read(shard, offset + index * size, size)
        return encode(_core.dequantize(data, stored, shape[-2:]), type, importance(index))

    return Tensor(tensor.name, type, shape, expert, experts)


def _metadata(file: _core.GgufFile) -> dict[str, Value]:
    """All keys with the types that they are stored as; those of shards are gone with the shards."""
    import gguf

    values = {}
    for name, entry in gguf.GGUFReader(file.shard_paths[0]).fields.items():
        if name.startswith(("GGUF.", "split.")):
            continue
        kind = entry.types[0]
        if kind is not gguf.GGUFValueType.ARRAY:
            text = kind is gguf.GGUFValueType.STRING
            # Text need not be UTF-8.
            value = entry.parts[-1].tobytes() if text else entry.contents()
            values[name] = Value(value, kind.name)
            continue
        if len(entry.types) != 2 or not entry.data:
            raise error_of(
                _core.UnsupportedError, OPERATION, f"{file.path}: {name}",
                "an array of values", "an empty one or one of arrays",
            )  # fmt: skip
        element = entry.types[1]
        if element is gguf.GGUFValueType.STRING:
            array = [entry.parts[at].tobytes() for at in entry.data]
        else:
            array = entry.contents()
        values[name] = Value(array, "ARRAY", element.name)
    return values

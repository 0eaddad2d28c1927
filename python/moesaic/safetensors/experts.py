"""The experts of one layer: checked as a whole, then read one by one into builders."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic._pickling import CheckpointSource
from moesaic.hf_config import OUTPUT_SCALES, Family, find_family, given_facts, section
from moesaic.safetensors.bnb import Bnb4
from moesaic.safetensors.cache import Lookup, Origins, origin_of
from moesaic.safetensors.dense import DENSE, Dense, dense_name
from moesaic.safetensors.encoded import Decoded, Encoded, Requantized
from moesaic.safetensors.errors import Progress, as_format_errors, carried
from moesaic.safetensors.fp4 import Mxfp4, Nvfp4
from moesaic.safetensors.fp8 import CODES, FP8, Fp8
from moesaic.safetensors.int4 import Int4Experts, keeps_int4, which
from moesaic.safetensors.int_blocks import IntBlocks, as_q4_blocks
from moesaic.safetensors.ints import Linear, is_int
from moesaic.safetensors.names import (
    Block,
    Matrices,
    Matrix,
    check_all_used,
    find_block,
    names_of_experts,
    values_name,
)
from moesaic.safetensors.quantization import Quantization
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, unsupported, wrong
from moesaic.safetensors.sets import of_layer

#: What the end of a load takes: experts in a builder, or the Marlin stacks of gate_up and down with
#: the number of experts and those that are kept.
Gathered = Any


def recognise(
    checkpoint: Checkpoint,
    matrix: Matrix,
    quantization: Quantization,
    exact: bool,
    transposed: bool = False,
    keep_fp8: bool = True,
) -> Encoded:
    """The matrix in the form that its tensors have. Raises FormatError naming one of them.

    Without ``keep_fp8`` E4M3 is decoded as other codes of 8 bits are, as with ``exact``.
    """
    found: Encoded | None = Dense.open(checkpoint, matrix, transposed)
    name = dense_name(checkpoint, matrix)
    # Codes of 8 bits are of one form alone, and a model has many of them.
    if found is None and (name is None or checkpoint.entry(name).dtype not in FP8):
        found = (
            Bnb4.open(checkpoint, matrix, exact)
            or Mxfp4.open(checkpoint, matrix)
            or Nvfp4.open(checkpoint, matrix)
        )
    found = found or Fp8.open(checkpoint, matrix, transposed, quantization, exact, keep_fp8)
    found = found or IntBlocks.open(checkpoint, matrix, quantization, exact)
    if found is not None:
        return found
    name = values_name(checkpoint, matrix.base)
    if name is None:
        raise wrong(f"tensor '{matrix.base}.weight'", "to be there", "no such tensor")
    raise wrong(
        f"tensor {name!r} dtype",
        f"{', '.join((*DENSE, *CODES))}, or codes with scales",
        checkpoint.entry(name).dtype,
    )


def _transposed(checkpoint: Checkpoint, matrices: Matrices) -> bool:
    """Whether fused floats or FP8 lie as [E, H, 2I] and [E, I, H]: gate_up's second size tells."""
    if ("gate", "up") not in matrices:
        return False
    shapes = []
    for roles in (("gate", "up"), ("down",)):
        name = dense_name(checkpoint, matrices[roles][0])
        if name is None or checkpoint.entry(name).dtype not in (*DENSE, *CODES):
            return False
        shapes.append(checkpoint.entry(name).shape)
    gate_up, down = shapes
    # Plain: gate_up [2I, H], down [H, I]; transposed: gate_up [H, 2I], down [I, H].
    return len(gate_up) == len(down) == 3 and gate_up[1] == down[2] and gate_up[2] == 2 * down[1]


def _of_one_type(group: list[Encoded], exact: bool) -> list[Encoded]:
    """The experts of a role in one type, as they are or decoded: stacks have one for each role.

    Quantisers leave experts alone that saw no tokens.
    """
    types = {one.type for one in group}
    if len(types) == 1:
        return group
    wanted = "F32" if exact or types & {"F32", "F16"} else "BF16"
    return [one if one.type == wanted else Decoded.of(one, wanted) for one in group]


def _kind(one: Encoded) -> type[Encoded]:
    """The form of its tensors, whatever becomes of them."""
    stored = one.source if isinstance(one, Decoded) else one
    return Fp8 if isinstance(stored, Fp8) else type(stored)


def _check_zero_points(first: Encoded, other: Encoded) -> None:
    """Refuses codes that lost their zero points, which other experts have."""
    of_first, of_other = (
        {name for name in one.tensors() if name.endswith("zero_point")} for one in (first, other)
    )
    kinds = {_kind(one) for one in (first, other)}
    if len(kinds) == 1 and bool(of_first) != bool(of_other):
        lacking, there = (other, of_first) if of_first else (first, of_other)
        raise wrong(f"the zero point of {lacking.name!r}", f"one, as {min(there)!r}", "none")


class EncodedExperts:
    """Experts whose rows become rows of GGUF types."""

    def __init__(
        self,
        encoded: dict[tuple[str, ...], list[Encoded]],
        interleaved: bool,
    ) -> None:
        self.encoded, self.interleaved = encoded, interleaved
        #: A factor on the output of each expert, f32 [E].
        self.output_scales: Array | None = None
        #: The experts that are read, by their ids in the model; None: all.
        self.kept: list[int] | None = None
        for group in encoded.values():
            first = group[0]
            for other in group:
                if (other.n, other.k, other.type) != (first.n, first.k, first.type):
                    raise wrong(
                        f"tensor {other.name!r}",
                        f"{first.label} [{first.n}, {first.k}] as {first.name!r}",
                        f"{other.label} {other.type} [{other.n}, {other.k}]",
                    )
                _check_zero_points(first, other)
        down = encoded["down",][0]
        self.hidden_size, self.intermediate_size = down.n, down.k
        for roles, group in encoded.items():
            expected = (len(roles) * down.k, down.n)
            if roles != ("down",) and (group[0].n, group[0].k) != expected:
                raise wrong(
                    f"tensor {group[0].name!r} shape",
                    f"{list(expected)}, as {down.name!r} [{down.n}, {down.k}] says",
                    [group[0].n, group[0].k],
                )

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        matrices: Matrices,
        quantization: Quantization,
        exact: bool,
        interleaved: bool,
        keep_fp8: bool = True,
    ) -> "EncodedExperts":
        transposed = _transposed(checkpoint, matrices)
        encoded = {
            roles: [
                recognise(checkpoint, one, quantization, exact, transposed, keep_fp8)
                for one in group
            ]
            for roles, group in matrices.items()
        }
        return cls(
            {roles: _of_one_type(group, exact) for roles, group in encoded.items()}, interleaved
        )

    @property
    def num_experts(self) -> int:
        return len(self.encoded["down",])

    def tensors(self) -> set[str]:
        """The names of all tensors of the experts."""
        return {name for group in self.encoded.values() for one in group for name in one.tensors()}

    def scale_outputs(self, scales: Array) -> None:
        """Gives each expert a factor on its output, f32 [E]."""
        self.output_scales = scales

    def keep(self, ids: list[int]) -> None:
        """Reads and keeps only these experts."""
        self.kept = ids

    def encode(self, quant: dict[str, str]) -> None:
        """Gives roles the types of ``quant``; those that it leaves out stay in theirs.

        Raises UnsupportedError where gate and up are in one tensor and get different types.
        """
        for roles, group in self.encoded.items():
            wanted = {quant.get(role) for role in roles}
            if len(wanted) > 1:
                raise unsupported(
                    f"tensor {group[0].name!r}", "one type for gate and up, which it has both of",
                    ", ".join(map(str, wanted)),
                )  # fmt: skip
            kind = wanted.pop()
            if kind is not None and kind != group[0].type:
                self.encoded[roles] = [Requantized.of(one, kind) for one in group]

    def matrices(self) -> Iterator[tuple[str, int]]:
        """The name and bytes of each matrix that is read, in the order of gathering."""
        for group in self.encoded.values():
            for e in which(self.kept, len(group)):
                yield self._label(group[e]), group[e].nbytes

    @staticmethod
    def _label(one: Encoded) -> str:
        index = one.matrix.index
        return one.name if index is None else f"{one.name}[{index}]"

    def origins(self) -> Origins:
        """What each role is made of, for a weight cache."""
        found: Origins = {}
        for roles, group in self.encoded.items():
            for i, role in enumerate(roles):
                rows = self.rows_of(i, len(roles), group[0].n)
                found |= origin_of(role, group, self.kept, rows)
        return found

    def gather(
        self, step: Callable[[str], None], lookup: Lookup | None = None
    ) -> "_core.StackBuilder":
        """Reads and encodes the experts; ``step`` is called with each name.

        Of roles that ``lookup`` finds in a weight cache scales and biases alone are read.
        """
        specs: dict[str, tuple[str, str, str, str]] = {}
        for roles, group in self.encoded.items():
            # Where some are as stored and some decoded, the report has a decoded one.
            first = next((one for one in group if one.decision == "dequantized"), group[0])
            source = f"{first.name} ({first.label})"
            if len(group) > 1 and first.matrix.index is None:
                source = f"{group[0].name} to {group[-1].name} ({first.label})"
            for role in roles:
                specs[role] = (first.type, source, first.decision, first.reason)
        builder = _core.StackBuilder(
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            gate=specs.get("gate"),
            up=specs["up"],
            down=specs["down"],
            experts=self.kept,
        )
        cached = set() if lookup is None else set(lookup(builder, self.origins()))
        for roles, group in self.encoded.items():
            needed = not cached.issuperset(roles)
            for e in which(self.kept, len(group)):
                one = group[e]
                rows, scale = one.rows() if needed else (None, one.factor())
                if roles == ("down",) and self.output_scales is not None:
                    scale *= float(self.output_scales[e])
                bias = one.bias()
                for i, role in enumerate(roles):
                    mine = self.rows_of(i, len(roles), one.n)
                    builder.add(
                        role,
                        e,
                        None
                        if rows is None or role in cached
                        else np.ascontiguousarray(rows[mine]),
                        scale,
                        None if bias is None else np.ascontiguousarray(bias[mine]),
                    )
                step(self._label(one))
        return builder

    def rows_of(self, i: int, count: int, n: int) -> slice:
        """The rows of role ``i`` of ``count`` in a matrix of ``n`` rows."""
        if self.interleaved:
            return slice(i, None, count)
        return slice(i * n // count, (i + 1) * n // count)


Experts = EncodedExperts | Int4Experts


def open_experts(
    checkpoint: Checkpoint,
    matrices: Matrices,
    quantization: Quantization,
    exact: bool,
    interleaved: bool,
    keep_int4: bool = True,
    keep_fp8: bool = True,
) -> Experts:
    """Checks names, types and shapes of all experts before any is read."""
    if all(is_int(checkpoint, matrix) for group in matrices.values() for matrix in group):
        blocks = as_q4_blocks(checkpoint, matrices, quantization)
        if blocks is not None:
            return EncodedExperts(blocks, interleaved)
        linears = {
            roles: [Linear.open(checkpoint, matrix, quantization) for matrix in group]
            for roles, group in matrices.items()
        }
        if keep_int4 and keeps_int4(linears, interleaved):
            return Int4Experts(linears)
    return EncodedExperts.open(checkpoint, matrices, quantization, exact, interleaved, keep_fp8)


def keep(experts: Experts, ids: list[int] | None) -> None:
    """Reads only the experts of ``ids``; None: all. Raises ShapeError for ids that do not fit."""
    if ids is None:
        return
    count = experts.num_experts
    outside = [e for e in ids if not 0 <= e < count]
    twice = [e for e, times in Counter(ids).items() if times > 1]
    if outside or twice:
        expected = f"ids of 0 to {count - 1}" if outside else "each id once"
        got = str((outside or twice)[0])
        raise error_of(_core.ShapeError, "load_from_safetensors", "experts", expected, got)
    experts.keep(sorted(ids))


def interleaved(family: Family | None, block: Block) -> bool:
    """Whether gate and up rows alternate where both are in one tensor."""
    fused = block.matrices.get(("gate", "up"))
    if fused is None:
        return False
    base = fused[0].base
    if fused[0].index is not None:
        if family is None:
            raise wrong(
                f"tensor '{base}'",
                "config.json beside it, whose model_type says how gate and up lie",
                "none",
            )
        return family.interleaved
    if family is None or not family.interleaved:
        return False
    # Slices of the model's own tensor keep its order; a module for each expert may have either.
    if not base.rpartition(".")[2].isdigit():
        raise unsupported(
            f"tensor '{base}'", "gate and up apart, as their rows may alternate", "both in one"
        )
    return True


def _in_types(
    experts: Experts, quant: dict[str, str], checkpoint: Checkpoint, block: Block, turns: bool
) -> EncodedExperts:
    """The experts in types by role. INT4 has no rows that could stay beside encoded ones."""
    if isinstance(experts, Int4Experts):
        lacking = {"gate", "up", "down"} - set(quant)
        if lacking:
            raise unsupported(
                "quant", "a type for every role of INT4 experts", f"none for {min(lacking)}"
            )
        quantization = Quantization.of(checkpoint)
        experts = EncodedExperts.open(checkpoint, block.matrices, quantization, True, turns)
    experts.encode(quant)
    return experts


def read_floats(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Array:
    """f32 of ``shape``; the tensor may have sizes of 1 beside."""
    found = checkpoint.entry(name).shape
    if tuple(size for size in found if size != 1) != tuple(size for size in shape if size != 1):
        raise wrong(f"tensor {name!r} shape", str(list(shape)), list(found))
    values = checkpoint.read(name, FLOATS, found).reshape(shape)
    return np.ascontiguousarray(values, np.float32)


def _scale_outputs(checkpoint: Checkpoint, block: Block, experts: Experts, family: Family) -> None:
    """Factors on the outputs of experts are theirs, though the block keeps them beside its router.

    They are known by name alone, as no other model has tensors of these names; where config.json
    names a model that has them, they must be there.
    """
    for name in OUTPUT_SCALES:
        full = f"{block.name}.{name}"
        if full in checkpoint.tensors:
            experts.scale_outputs(read_floats(checkpoint, full, (block.num_experts,)))
        elif name == family.output_scale:
            raise wrong(f"tensor {full!r}", "to be there, as the model has it", "no such tensor")


def gather_all(
    experts: list[Experts], progress: Progress | None, lookup: Lookup | None = None
) -> list[Gathered]:
    sizes = [size for one in experts for size in one.matrices()]
    total, done, at = sum(size for _, size in sizes), 0, 0

    def step(name: str) -> None:
        nonlocal done, at
        done, at = done + sizes[at][1], at + 1
        if progress is not None:
            progress(name, done, total)

    return [one.gather(step, lookup) for one in experts]


def gather_experts(
    path: str | PathLike[str],
    layer: int,
    progress: Progress | None = None,
    exact: bool = False,
    prefix: str | None = None,
    source: CheckpointSource | None = None,
    kept: list[int] | None = None,
    keep_fp8: bool = True,
    lookup: Lookup | None = None,
    quant: dict[str, str] | None = None,
) -> Gathered:
    """The experts of one layer, of the part of the model that ``prefix`` names.

    ``exact`` decodes what GGUF has no type for to F32, ``keep_fp8=False`` E4M3 to BF16, for devices
    without kernels for it. ``progress`` is called after each matrix, ``source`` notes which files
    were read, ``kept`` are the experts to read (None: all), ``lookup`` takes roles from a weight
    cache, ``quant`` has types by role to encode in.
    Raises FormatError naming the tensor that is missing or does not fit.
    """
    with as_format_errors(os.fsdecode(path)):
        checkpoint = of_layer(Checkpoint(path), layer, prefix)
        if source is not None:
            source.note(checkpoint)
        block = find_block(checkpoint, layer)
        config = checkpoint.json("config.json")
        family = None
        if ("gate", "up") in block.matrices and config is not None:
            config = section(config, prefix)
            in_one = block.matrices["gate", "up"][0].index is not None
            if in_one or "model_type" in config:
                family = find_family(config)[0]
        experts = open_experts(
            checkpoint,
            block.matrices,
            Quantization.of(checkpoint),
            exact,
            interleaved(family, block),
            keep_fp8=keep_fp8,
        )
        if quant:
            experts = _in_types(experts, quant, checkpoint, block, interleaved(family, block))
        check_all_used(checkpoint, names_of_experts(checkpoint, block), experts.tensors())
        _scale_outputs(checkpoint, block, experts, given_facts(section(config, prefix)))
        keep(experts, kept)
        return gather_all([experts], carried(progress), carried(lookup))[0]

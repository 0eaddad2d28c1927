"""The experts of one layer: checked as a whole, then read one by one into builders."""

import os
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

import numpy as np

from moesaic import _core
from moesaic.hf_config import Family, find_family, section
from moesaic.safetensors.dense import Dense, dense_name
from moesaic.safetensors.encoded import Encoded
from moesaic.safetensors.errors import Progress, as_format_errors, carried
from moesaic.safetensors.fp4 import Mxfp4, Nvfp4
from moesaic.safetensors.fp8 import Fp8
from moesaic.safetensors.int4 import Int4Experts, as_q4_blocks, is_int4
from moesaic.safetensors.names import Block, Matrices, Matrix, find_block
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, wrong
from moesaic.safetensors.sets import of_layer

#: What the end of a load takes: experts in a builder, or the Marlin stacks of gate_up and down.
Gathered = Any


def _recognise(checkpoint: Checkpoint, matrix: Matrix, transposed: bool, exact: bool) -> Encoded:
    found = (
        Dense.open(checkpoint, matrix, transposed)
        or Mxfp4.open(checkpoint, matrix)
        or Nvfp4.open(checkpoint, matrix)
        or Fp8.open(checkpoint, matrix, exact)
    )
    if found is not None:
        return found
    name = dense_name(checkpoint, matrix)
    if name is None:
        raise wrong(f"tensor '{matrix.base}.weight'", "to be there", "no such tensor")
    raise wrong(
        f"tensor {name!r} dtype",
        f"{', '.join(FLOATS)}, F8_E4M3, or codes with scales",
        checkpoint.entry(name).dtype,
    )


def _transposed(checkpoint: Checkpoint, matrices: Matrices) -> bool:
    """Whether fused floats lie as [E, H, 2I] and [E, I, H]: gate_up's second size tells."""
    if ("gate", "up") not in matrices:
        return False
    shapes = []
    for roles in (("gate", "up"), ("down",)):
        name = dense_name(checkpoint, matrices[roles][0])
        if name is None or checkpoint.entry(name).dtype not in FLOATS:
            return False
        shapes.append(checkpoint.entry(name).shape)
    gate_up, down = shapes
    # Plain: gate_up [2I, H], down [H, I]; transposed: gate_up [H, 2I], down [I, H].
    return len(gate_up) == len(down) == 3 and gate_up[1] == down[2] and gate_up[2] == 2 * down[1]


class EncodedExperts:
    """Experts whose rows become rows of GGUF types."""

    def __init__(
        self,
        encoded: dict[tuple[str, ...], list[Encoded]],
        interleaved: bool,
    ) -> None:
        self.encoded, self.interleaved = encoded, interleaved
        self._output_scales: Array | None = None
        for group in encoded.values():
            first = group[0]
            for other in group:
                same = (other.n, other.k, other.type) == (first.n, first.k, first.type)
                if not same or type(other) is not type(first):
                    raise wrong(
                        f"tensor {other.name!r}",
                        f"{first.form} [{first.n}, {first.k}] as {first.name!r}",
                        f"{other.form} {other.type} [{other.n}, {other.k}]",
                    )
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
        cls, checkpoint: Checkpoint, matrices: Matrices, exact: bool, interleaved: bool
    ) -> "EncodedExperts":
        transposed = _transposed(checkpoint, matrices)
        encoded = {
            roles: [_recognise(checkpoint, matrix, transposed, exact) for matrix in group]
            for roles, group in matrices.items()
        }
        return cls(encoded, interleaved)

    def scale_outputs(self, scales: Array) -> None:
        """Gives each expert a factor on its output, f32 [E]."""
        self._output_scales = scales

    def matrices(self) -> Iterator[tuple[str, int]]:
        """The name and bytes of each matrix, in the order of gathering."""
        for group in self.encoded.values():
            for one in group:
                yield self._label(one), one.nbytes

    @staticmethod
    def _label(one: Encoded) -> str:
        index = one.matrix.index
        return one.name if index is None else f"{one.name}[{index}]"

    def gather(self, step: Callable[[str], None]) -> "_core.StackBuilder":
        """Reads and encodes all experts; ``step`` is called with each name."""
        specs: dict[str, tuple[str, str, str, str]] = {}
        for roles, group in self.encoded.items():
            first = group[0]
            source = f"{first.name} ({first.form})"
            if len(group) > 1 and first.matrix.index is None:
                source = f"{first.name} to {group[-1].name} ({first.form})"
            for role in roles:
                specs[role] = (first.type, source, first.decision, first.reason)
        builder = _core.StackBuilder(
            len(self.encoded["down",]),
            self.hidden_size,
            self.intermediate_size,
            gate=specs.get("gate"),
            up=specs["up"],
            down=specs["down"],
        )
        for roles, group in self.encoded.items():
            for e, one in enumerate(group):
                rows, scale = one.rows()
                if roles == ("down",) and self._output_scales is not None:
                    scale *= float(self._output_scales[e])
                bias = one.bias()
                for i, role in enumerate(roles):
                    mine = self._rows_of(i, len(roles), one.n)
                    builder.add(
                        role,
                        e,
                        np.ascontiguousarray(rows[mine]),
                        scale,
                        None if bias is None else np.ascontiguousarray(bias[mine]),
                    )
                step(self._label(one))
        return builder

    def _rows_of(self, i: int, count: int, n: int) -> slice:
        if self.interleaved:
            return slice(i, None, count)
        return slice(i * n // count, (i + 1) * n // count)


Experts = EncodedExperts | Int4Experts


def open_experts(
    checkpoint: Checkpoint, matrices: Matrices, exact: bool, interleaved: bool
) -> Experts:
    """Checks names, types and shapes of all experts before any is read."""
    some = next(iter(matrices.values()))[0]
    if not is_int4(checkpoint, some):
        return EncodedExperts.open(checkpoint, matrices, exact, interleaved)
    blocks = as_q4_blocks(checkpoint, matrices)
    if blocks is not None:
        return EncodedExperts(blocks, interleaved)
    return Int4Experts(checkpoint, matrices)


def interleaved(family: Family | None, block: Block) -> bool:
    """Whether gate and up rows alternate where both are in one tensor of all experts."""
    fused = block.matrices.get(("gate", "up"))
    if fused is None or fused[0].index is None:
        return False
    if family is None:
        raise wrong(
            f"tensor '{fused[0].base}'",
            "config.json beside it, whose model_type says how gate and up lie",
            "none",
        )
    return family.interleaved


def gather_all(experts: list[Experts], progress: Progress | None) -> list[Gathered]:
    sizes = [size for one in experts for size in one.matrices()]
    total, done, at = sum(size for _, size in sizes), 0, 0

    def step(name: str) -> None:
        nonlocal done, at
        done, at = done + sizes[at][1], at + 1
        if progress is not None:
            progress(name, done, total)

    return [one.gather(step) for one in experts]


def gather_experts(
    path: str | PathLike[str],
    layer: int,
    progress: Progress | None = None,
    exact: bool = False,
    prefix: str | None = None,
) -> Gathered:
    """The experts of one layer, of the part of the model that ``prefix`` names.

    ``exact`` decodes what GGUF has no type for to F32. ``progress`` is called after each matrix.
    Raises FormatError naming the tensor that is missing or does not fit.
    """
    with as_format_errors(os.fsdecode(path)):
        checkpoint = of_layer(Checkpoint(path), layer, prefix)
        block = find_block(checkpoint, layer)
        config = checkpoint.json("config.json")
        fused = block.matrices.get(("gate", "up"))
        told = fused is not None and fused[0].index is not None and config is not None
        family = find_family(section(config, prefix))[0] if told else None
        experts = open_experts(checkpoint, block.matrices, exact, interleaved(family, block))
        return gather_all([experts], carried(progress))[0]

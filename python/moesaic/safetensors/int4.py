"""INT4 experts of GPTQ, AWQ and compressed-tensors checkpoints, kept as INT4."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from moesaic import _core
from moesaic.safetensors.cache import Lookup
from moesaic.safetensors.encoded import Stored
from moesaic.safetensors.ints import Linear
from moesaic.safetensors.names import find
from moesaic.safetensors.reader import FLOATS, Array, unsupported, wrong

#: Two Marlin stacks, the number of experts of the model, and those that the stacks have (None:
#: all); or a builder without any.
Gathered: TypeAlias = (
    "tuple[_core.MarlinExpertStack, _core.MarlinExpertStack, int, list[int] | None]"
    " | _core.StackBuilder"
)
#: Every expert's matrix by the roles it holds, as ``names.Matrices``.
Linears = dict[tuple[str, ...], list[Linear]]


def which(kept: list[int] | None, count: int) -> Sequence[int]:
    """The experts that are read, of ``count``."""
    return range(count) if kept is None else kept


def keeps_int4(linears: Linears, interleaved: bool) -> bool:
    """Whether Marlin stacks hold these experts: 4 bits, one scheme, a gate, no biases."""
    schemes = {linear.scheme for group in linears.values() for linear in group}
    if len(schemes) > 1 or next(iter(schemes)).bits != 4:
        return False
    if interleaved or (("up",) in linears and ("gate",) not in linears):
        return False
    every = [linear for group in linears.values() for linear in group]
    if any(_has_bias(linear) or linear.has_plain_zeros for linear in every):
        return False
    return _same_orders([group for roles, group in linears.items() if roles != ("down",)])


def _same_orders(parts: list[list[Linear]]) -> bool:
    """Whether gate and up of an expert have their columns in one order, as a stack of both has.

    Where one cannot be read the answer is yes, and reading it says what is wrong.
    """
    for linears in zip(*parts, strict=True):
        if len(linears) < 2 or not all(linear.has_good_order for linear in linears):
            continue
        first, *others = (linear.order() for linear in linears)
        for order in others:
            if (order is None) != (first is None):
                return False
            if order is not None and not np.array_equal(order, first):
                return False
    return True


def _bias_name(linear: Linear) -> str | None:
    return find(linear.checkpoint, linear.matrix.base, "bias")


def _has_bias(linear: Linear) -> bool:
    name = _bias_name(linear)
    if name is None:
        return False
    return bool(np.any(linear.checkpoint.read(name, FLOATS, (linear.n,), linear.matrix.index)))


class Int4Experts:
    """INT4 experts on their way to two Marlin stacks, gate_up and down."""

    def __init__(self, linears: Linears) -> None:
        self.linears = linears
        self.scheme = linears["down",][0].scheme
        self._output_scales: Array | None = None
        #: The experts that are read, by their ids in the model; None: all.
        self.kept: list[int] | None = None
        for roles, group in linears.items():
            for linear in group:
                if (linear.k, linear.n) != (group[0].k, group[0].n):
                    raise wrong(
                        f"tensor '{linear.qweight}'",
                        f"[K, N] = [{group[0].k}, {group[0].n}] as in expert 0's {roles[0]}",
                        [linear.k, linear.n],
                    )
        self._check_sizes()

    @property
    def num_experts(self) -> int:
        return len(self.linears["down",])

    @property
    def hidden_size(self) -> int:
        return self.linears["down",][0].n

    @property
    def intermediate_size(self) -> int:
        return self.linears["down",][0].k

    @property
    def _gate_up(self) -> tuple[tuple[str, ...], ...]:
        return tuple(roles for roles in self.linears if roles != ("down",))

    def scale_outputs(self, scales: Array) -> None:
        """Gives each expert a factor on its output, f32 [E]."""
        self._output_scales = scales

    @property
    def scales_outputs(self) -> bool:
        """Whether experts have factors on their outputs."""
        return self._output_scales is not None

    def tensors(self) -> set[str]:
        """The names of all tensors of the experts."""
        names: set[str] = set()
        for group in self.linears.values():
            for linear in group:
                names |= linear.tensors()
                bias = _bias_name(linear)  # Nothing but zeros, or it would not be here.
                names |= set() if bias is None else {bias}
        return names

    def keep(self, ids: list[int]) -> None:
        """Reads and keeps only these experts."""
        self.kept = ids

    def matrices(self) -> Iterator[tuple[str, int]]:
        """The name and bytes of each matrix that is read, in the order of gathering."""
        for linears in self.linears.values():
            for e in which(self.kept, len(linears)):
                linear = linears[e]
                entry = linear.checkpoint.entry(linear.qweight)
                yield _label(linear), (entry.end - entry.begin) // linear.matrix.experts

    def gather(self, step: Callable[[str], None], lookup: Lookup | None = None) -> "Gathered":
        """Reads and packs the experts; ``step`` is called with each name.

        With the stacks of gate_up and down come the number of experts of the model, and those that
        the stacks have. Raises UnsupportedError for a weight cache, which has no INT4.
        """
        if lookup is not None:
            raise unsupported(
                "weight_cache", "experts that become rows of GGUF types",
                f"{_label(self.linears['down',][0])}, which stays INT4",
                "load it without a weight cache, or encoded in a type",
            )  # fmt: skip
        if self.kept == []:
            nothing = ("F16", "no experts", "left out", "none were asked for")
            sizes = (self.num_experts, self.hidden_size, self.intermediate_size)
            return _core.StackBuilder(*sizes, gate=nothing, up=nothing, down=nothing, experts=[])
        gate_up = self._stack(self._gate_up, step)
        return gate_up, self._stack((("down",),), step), self.num_experts, self.kept

    def _check_sizes(self) -> None:
        hidden, intermediate = self.hidden_size, self.intermediate_size
        for roles in self._gate_up:
            linear = self.linears[roles][0]
            expected = (hidden, len(roles) * intermediate)
            if (linear.k, linear.n) != expected:
                shape = "[H, 2I]" if len(roles) == 2 else "[H, I]"
                raise wrong(
                    f"tensor '{linear.qweight}'",
                    f"{shape} = {list(expected)}, as down says",
                    [linear.k, linear.n],
                )

    def _kept(self, part: tuple[str, ...]) -> list[Linear]:
        return [self.linears[part][e] for e in which(self.kept, self.num_experts)]

    def _orders(self, parts: tuple[tuple[str, ...], ...], size: int) -> Array | None:
        """g_idx of the experts, [K] or [n, K]; None where the columns are in order.

        All parts of an expert have one order (``keeps_int4``), and each is looked at.
        """
        orders, *_ = [[linear.order() for linear in self._kept(part)] for part in parts]
        if all(order is None for order in orders):
            return None
        plain = np.arange(self.linears[parts[0]][0].k, dtype=np.int32) // size
        rows = [plain if order is None else order for order in orders]
        same = all(np.array_equal(row, rows[0]) for row in rows)
        return rows[0] if same else np.stack(rows)

    def _stack(
        self, parts: tuple[tuple[str, ...], ...], step: Callable[[str], None]
    ) -> "_core.MarlinExpertStack":
        """The Marlin stack of some parts of all experts, columns one after another."""
        first = self.linears[parts[0]][0]
        scaled = parts == (("down",),) and self._output_scales is not None
        scale_types = {
            linear.checkpoint.entry(linear.tensor("scales")).dtype
            for part in parts
            for linear in self.linears[part]
        }
        ids = which(self.kept, self.num_experts)
        builder = _core.MarlinStackBuilder(
            len(ids),
            first.k,
            sum(self.linears[part][0].n for part in parts),
            self.scheme.group_size,
            first.marlin_format,
            f32_scales=scaled or scale_types != {"F16"},
            zeros=self.scheme.symmetric is not True,
            g_idx=self._orders(parts, first.group_size),
        )
        for place, e in enumerate(ids):
            first_col = 0
            for part in parts:
                linear = self.linears[part][e]
                scales = _stored_scales(linear)
                if scaled and self._output_scales is not None:
                    scales = scales.astype(np.float32) * np.float32(self._output_scales[e])
                builder.add(
                    place, first_col, _words(linear), scales, linear.zero_words(), _label(linear)
                )
                first_col += linear.n
                step(_label(linear))
        return builder.build()


def stored_linear(linear: Linear) -> Stored | None:
    """What a Marlin stack is made of, for the disk tier; None for columns in an order of their own,
    and for AWQ's other packing.
    """
    if linear.scheme.format == "awq_gemv" or linear.order() is not None:
        return None
    index = linear.matrix.index
    scales, zeros = linear.tensor("scales"), linear.zeros_tensor()
    facts = {
        "format": linear.marlin_format,
        "group_size": linear.scheme.group_size,
        "scale": linear.checkpoint.entry(scales).dtype,
    }
    return Stored(
        "int4", (linear.qweight, index), (scales, index),
        None if zeros is None else (zeros, index), facts,
    )  # fmt: skip


def _label(linear: Linear) -> str:
    index = linear.matrix.index
    return linear.matrix.base if index is None else f"{linear.matrix.base}[{index}]"


def _words(linear: Linear) -> Array:
    shape = (linear.k // 8, linear.n)
    if linear.scheme.format == "awq":
        shape = (linear.k, -(-linear.n // 8))
    if linear.by_rows:
        shape = (linear.n, linear.k // 8)
    return linear.read("qweight", ("I32",), shape)


def _stored_scales(linear: Linear) -> Array:
    return linear.stored_scales()

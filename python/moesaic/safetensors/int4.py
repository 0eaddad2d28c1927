"""INT4 experts of GPTQ, AWQ and compressed-tensors checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from moesaic import _core
from moesaic.safetensors.encoded import Encoded
from moesaic.safetensors.fp4 import halves
from moesaic.safetensors.names import Matrices, Matrix
from moesaic.safetensors.quantization import Quantization
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, unsupported, wrong

# What compressed-tensors calls the tensors of a matrix.
_PACKED = {
    "qweight": "weight_packed", "scales": "weight_scale",
    "qzeros": "weight_zero_point", "g_idx": "weight_g_idx",
}  # fmt: skip


def is_int4(checkpoint: Checkpoint, matrix: Matrix) -> bool:
    """Whether the matrix is stored as words of INT4 codes."""
    if f"{matrix.base}.qweight" in checkpoint.tensors:
        return True
    packed = checkpoint.tensors.get(f"{matrix.base}.weight_packed")
    return packed is not None and packed.dtype not in ("U8", "I8")


def _check_shape(checkpoint: Checkpoint, name: str, rows: int, cols: int) -> None:
    """A tensor [2] that says N and K once more, where there is one."""
    if name not in checkpoint.tensors:
        return
    shape = checkpoint.read(name, ("I64", "I32"), (2,)).tolist()
    if shape != [rows, cols]:
        raise wrong(f"tensor {name!r}", str([rows, cols]), shape)


@dataclass(frozen=True)
class Linear:
    """One quantised matrix: the name before ``.qweight``, and its sizes."""

    name: str
    k: int
    n: int
    packed: bool  # pack_quantized

    def tensor(self, kind: str) -> str:
        """The full name of its qweight, scales, qzeros or g_idx."""
        return f"{self.name}.{_PACKED[kind] if self.packed else kind}"

    @property
    def qweight(self) -> str:
        return self.tensor("qweight")


class Int4Experts:
    """INT4 experts on their way to two Marlin stacks, gate_up and down."""

    def __init__(self, checkpoint: Checkpoint, matrices: Matrices) -> None:
        self.checkpoint = checkpoint
        self.quantization = Quantization.of(checkpoint)
        self.linears = {
            roles: [self._linear(matrix.base) for matrix in group]
            for roles, group in matrices.items()
        }
        for roles, linears in self.linears.items():
            for linear in linears:
                if (linear.k, linear.n) != (linears[0].k, linears[0].n):
                    raise wrong(
                        f"tensor '{linear.qweight}'",
                        f"[K, N] = [{linears[0].k}, {linears[0].n}] as in expert 0's {roles[0]}",
                        [linear.k, linear.n],
                    )
        self._check_sizes()

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
        """INT4 stacks have no factors on outputs."""
        name = self.linears["down",][0].qweight
        raise unsupported(f"tensor '{name}'", "floats beside factors on outputs", "INT4")

    def matrices(self) -> Iterator[tuple[str, int]]:
        """The name and bytes of each matrix, in the order of gathering."""
        for linears in self.linears.values():
            for linear in linears:
                entry = self.checkpoint.entry(linear.qweight)
                yield linear.name, entry.end - entry.begin

    def gather(
        self, step: Callable[[str], None]
    ) -> "tuple[_core.MarlinExpertStack, _core.MarlinExpertStack]":
        """Reads and packs all experts; ``step`` is called with each name."""
        return self._stack(self._gate_up, step), self._stack((("down",),), step)

    def _linear(self, name: str) -> Linear:
        form = self.quantization.format
        linear = Linear(name, 0, 0, form == "pack_quantized")
        entry = self.checkpoint.entry(linear.qweight)
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise wrong(f"tensor '{linear.qweight}' shape", "two sizes", list(entry.shape))
        rows, cols = entry.shape
        if form == "awq":
            return replace(linear, k=rows, n=cols * 8)
        if form == "pack_quantized":
            _check_shape(self.checkpoint, f"{name}.weight_shape", rows, cols * 8)
            return replace(linear, k=cols * 8, n=rows)
        return replace(linear, k=rows * 8, n=cols)

    def _check_sizes(self) -> None:
        if ("up",) in self.linears and ("gate",) not in self.linears:
            name = self.linears["up",][0].qweight
            raise unsupported(f"tensor '{name}'", "a gate beside it", "ungated INT4 experts")
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

    def _groups(self, linear: Linear) -> int:
        size = self.quantization.group_size
        return 1 if size == -1 else -(-linear.k // size)

    def _g_idx(self, linear: Linear) -> Array | None:
        """The group of each column; None where the columns are in order."""
        name = linear.tensor("g_idx")
        if name not in self.checkpoint.tensors or self.quantization.format == "awq":
            if self.quantization.act_order:
                raise wrong(f"tensor {name!r}", "to be there, as desc_act says", "no such tensor")
            return None
        values = self.checkpoint.read(name, ("I32",), (linear.k,))
        groups = self._groups(linear)
        outside = (values < 0) | (values >= groups)
        if outside.any():
            at = int(outside.argmax())
            raise wrong(f"tensor {name!r} [{at}]", f"a group of 0 to {groups - 1}", values[at])
        size = linear.k if self.quantization.group_size == -1 else self.quantization.group_size
        if np.array_equal(values, np.arange(linear.k, dtype=np.int32) // size):
            return None
        if self.quantization.act_order is False:
            raise wrong(
                f"tensor {name!r}", "k // group_size, as desc_act=false says", "another order"
            )
        return values

    def _orders(self, parts: tuple[tuple[str, ...], ...], size: int) -> Array | None:
        """g_idx of all experts, [K] or [E, K]; None where the columns are in order."""
        orders = []
        for linears in zip(*(self.linears[part] for part in parts), strict=True):
            found = [self._g_idx(linear) for linear in linears]
            for linear, order in zip(linears[1:], found[1:], strict=True):
                same = order is found[0] or (
                    order is not None and found[0] is not None and np.array_equal(order, found[0])
                )
                if not same:
                    raise wrong(
                        f"tensor '{linear.tensor('g_idx')}'",
                        f"the order of '{linears[0].tensor('g_idx')}'",
                        "another one",
                    )
            orders.append(found[0])
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
        group_size = self.quantization.group_size
        scale_types = {
            self.checkpoint.entry(linear.tensor("scales")).dtype
            for part in parts
            for linear in self.linears[part]
        }
        experts = len(self.linears[parts[0]])
        builder = _core.MarlinStackBuilder(
            experts,
            first.k,
            sum(self.linears[part][0].n for part in parts),
            group_size,
            self.quantization.format,
            f32_scales=scale_types != {"F16"},
            zeros=self.quantization.symmetric is not True,
            g_idx=self._orders(parts, first.k if group_size == -1 else group_size),
        )
        for e in range(experts):
            first_col = 0
            for part in parts:
                linear = self.linears[part][e]
                self._add(builder, e, first_col, linear)
                first_col += linear.n
                step(linear.name)
        return builder.build()

    def _add(
        self, builder: "_core.MarlinStackBuilder", expert: int, first_col: int, linear: Linear
    ) -> None:
        read, groups = self.checkpoint.read, self._groups(linear)
        form, n_words = self.quantization.format, -(-linear.n // 8)
        shape, scales, zeros = (linear.k // 8, linear.n), (groups, linear.n), (groups, n_words)
        if form == "awq":
            shape = (linear.k, n_words)
        if form == "pack_quantized":
            shape, scales, zeros = (linear.n, linear.k // 8), scales[::-1], zeros[::-1]
        qzeros = None
        # GPTQ always has zero points; the others have none where they are symmetric.
        symmetric = self.quantization.symmetric
        optional = symmetric is True if form == "awq" else symmetric is not False
        optional &= form in ("awq", "pack_quantized")
        if not optional or linear.tensor("qzeros") in self.checkpoint.tensors:
            qzeros = read(linear.tensor("qzeros"), ("I32",), zeros)
        bias = f"{linear.name}.bias"
        if bias in self.checkpoint.tensors and np.any(read(bias, FLOATS, (linear.n,))):
            raise unsupported(f"tensor {bias!r}", "no bias", "values other than 0")
        builder.add(
            expert,
            first_col,
            read(linear.qweight, ("I32",), shape),
            read(linear.tensor("scales"), FLOATS, scales),
            qzeros,
            linear.name,
        )


@dataclass(frozen=True)
class Q4Blocks(Encoded):
    """Symmetric INT4 in groups of 32 with scales that f16 holds: exactly the blocks of Q4_0."""

    form = "INT4, groups of 32"

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix) -> "Q4Blocks | None":
        """None where one of these conditions is not met."""
        base = matrix.base
        entry = checkpoint.tensors.get(f"{base}.weight_packed")
        other = (f"{base}.weight_zero_point", f"{base}.weight_g_idx")
        if entry is None or entry.dtype != "I32" or any(n in checkpoint.tensors for n in other):
            return None
        n, k = entry.shape[0], 8 * entry.shape[-1]
        if len(entry.shape) != 2 or n == 0 or k == 0 or k % 32:
            return None
        _check_shape(checkpoint, f"{base}.weight_shape", n, k)
        scales = checkpoint.read(f"{base}.weight_scale", FLOATS, (n, k // 32))
        with np.errstate(over="ignore"):
            kept = scales.astype(np.float16)
        return cls(checkpoint, matrix, n, k) if np.array_equal(kept, scales) else None

    @property
    def name(self) -> str:
        return f"{self.matrix.base}.weight_packed"

    @property
    def type(self) -> str:
        return "Q4_0"

    def rows(self) -> tuple[Array, float]:
        scales = self.checkpoint.read(
            f"{self.matrix.base}.weight_scale", FLOATS, (self.n, self.k // 32)
        )
        out = np.empty((self.n, self.k // 32, 18), np.uint8)
        out[..., :2] = scales.astype("<f2").view(np.uint8).reshape(self.n, -1, 2)
        out[..., 2:] = halves(self.checkpoint.raw(self.name).view(np.uint8), 32)
        return out.reshape(self.n, -1), 1.0


def as_q4_blocks(
    checkpoint: Checkpoint, matrices: Matrices
) -> "dict[tuple[str, ...], list[Encoded]] | None":
    """All matrices as Q4_0, or None where one of them is not."""
    quantization = Quantization.of(checkpoint)
    fits = (quantization.format, quantization.group_size) == ("pack_quantized", 32)
    if not fits or not quantization.symmetric or quantization.act_order:
        return None
    found: dict[tuple[str, ...], list[Encoded]] = {}
    for roles, group in matrices.items():
        for matrix in group:
            blocks = Q4Blocks.open(checkpoint, matrix)
            if blocks is None:
                return None
            found.setdefault(roles, []).append(blocks)
    return found

"""One matrix of integers with groups of scales, as GPTQ, AWQ and compressed-tensors store it."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesaic.safetensors.names import Matrix, find
from moesaic.safetensors.quantization import IntScheme, Quantization
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, wrong

# What compressed-tensors calls the tensors of a matrix.
_PACKED = {"qweight": "packed", "scales": "scale", "qzeros": "zero_point", "g_idx": "g_idx"}
#: The nibble of each of the eight columns in a word of AWQ.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def is_int(checkpoint: Checkpoint, matrix: Matrix) -> bool:
    """Whether the matrix is stored as words of integers."""
    base = matrix.base
    packed = find(checkpoint, base, "packed", "qweight")
    if packed is not None:
        return checkpoint.entry(packed).dtype not in ("U8", "I8")
    # What is left of integers beside no other values: the error is about those that are missing.
    parts = (f"{base}.scales", f"{base}.qzeros")
    return f"{base}.weight" not in checkpoint.tensors and any(
        part in checkpoint.tensors for part in parts
    )


def unpack(words: Array, bits: int, count: int, padded: bool = False) -> Array:
    """The first ``count`` codes, u8, in the last dimension of words of 32 bits, low bits first.

    Codes of 3, 5, 6 or 7 bits go over the ends of words; ``padded`` ones do not.
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    if padded or 32 % bits == 0:
        per_word = 32 // bits
        out = np.empty((*words.shape, per_word), np.uint8)
        for i in range(per_word):
            out[..., i] = words >> (i * bits) & ((1 << bits) - 1)
        return out.reshape(*words.shape[:-1], -1)[..., :count]
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    stream = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    codes = np.zeros(stream.shape[:-1], np.uint8)
    for bit in range(bits):
        codes |= stream[..., bit] << bit
    return codes


def pack_rows(codes: Array) -> Array:
    """Codes of 4 bits [n, k] as words [ceil(n / 8), k] of eight neighbours in a column."""
    n, k = codes.shape
    padded = np.zeros((-(-n // 8), 8, k), np.uint32)
    padded.reshape(-1, k)[:n] = codes
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    words: Array = np.bitwise_or.reduce(padded << shifts, axis=1).view(np.int32)
    return words


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


@dataclass(frozen=True)
class Linear:
    """The tensors of one matrix [n, k], and what the configuration says of them."""

    checkpoint: Checkpoint
    matrix: Matrix
    scheme: IntScheme
    k: int = 0
    n: int = 0
    #: Codes of 3, 5, 6 or 7 bits keep within words, as older compressed-tensors wrote them.
    padded: bool = False

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix, quantization: Quantization) -> "Linear":
        """Raises FormatError naming a tensor that is missing or does not fit."""
        linear = cls(checkpoint, matrix, quantization.ints(matrix.base))
        bits = linear.scheme.bits
        entry = checkpoint.entry(linear.qweight)
        shape = entry.shape if matrix.index is None else entry.shape[1:]
        if len(shape) != 2 or 0 in entry.shape:
            raise wrong(f"tensor '{linear.qweight}' shape", "two sizes", list(entry.shape))
        rows, cols = shape
        if linear.scheme.format == "awq":
            linear = replace(linear, k=rows, n=cols * 32 // bits)
        elif linear.scheme.format == "awq_gemv":
            linear = replace(linear, k=cols * 32 // bits, n=rows)
        elif linear.packed:
            k, padded = linear._columns(rows, cols)
            linear = replace(linear, k=k, n=rows, padded=padded)
        else:
            linear = replace(linear, k=rows * 32 // bits, n=cols)
        linear._check_groups()
        return linear

    @property
    def packed(self) -> bool:
        """Whether the tensors are those of compressed-tensors."""
        return self.scheme.format == "pack_quantized"

    @property
    def by_rows(self) -> bool:
        """Whether words hold neighbours of a row, and scales and zero points follow the rows."""
        return self.packed or self.scheme.format == "awq_gemv"

    @property
    def marlin_format(self) -> Literal["gptq", "gptq_v2", "awq", "pack_quantized"]:
        """How a Marlin stack takes what ``read`` and ``zero_words`` give."""
        return "pack_quantized" if self.scheme.format == "awq_gemv" else self.scheme.format

    @property
    def has_good_order(self) -> bool:
        """Whether a g_idx that is there has a number for each column."""
        if not self.has("g_idx") or self._is_awq:
            return True
        return self.checkpoint.entry(self.tensor("g_idx")).shape[-1:] == (self.k,)

    def tensor(self, kind: str) -> str:
        """The full name of its qweight, scales, qzeros or g_idx."""
        kind = _PACKED[kind] if self.packed else kind
        usual = f"{self.matrix.base}.{'weight_' if self.packed else ''}{kind}"
        return find(self.checkpoint, self.matrix.base, kind) or usual

    @property
    def qweight(self) -> str:
        return self.tensor("qweight")

    def has(self, kind: str) -> bool:
        return self.tensor(kind) in self.checkpoint.tensors

    def tensors(self) -> set[str]:
        """The names of all tensors that are there and that this reads."""
        kinds = ["qweight", "scales", "qzeros"]
        if not self._is_awq:  # AWQ has no order of columns.
            kinds.append("g_idx")
        return {self.tensor(kind) for kind in kinds if self.has(kind)}

    def read(self, kind: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Array:
        return self.checkpoint.read(self.tensor(kind), dtypes, shape, self.matrix.index)

    @property
    def _is_awq(self) -> bool:
        return self.scheme.format in ("awq", "awq_gemv")

    @property
    def _stored_groups(self) -> int:
        """Groups for which there is room: AWQ's gemv fills up words, some of them together."""
        if self.scheme.format != "awq_gemv":
            return self.groups
        together = {64: 16, 32: 32}.get(self.group_size, 8)
        return -(-self.groups // together) * together

    @property
    def group_size(self) -> int:
        return self.k if self.scheme.group_size == -1 else self.scheme.group_size

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    def _columns(self, rows: int, cols: int) -> tuple[int, bool]:
        """K of words [n, cols], and whether codes keep within words."""
        bits, name = self.scheme.bits, find(self.checkpoint, self.matrix.base, "shape")
        if name is None:
            return cols * 32 // bits, False
        entry = self.checkpoint.entry(name)
        if entry.dtype not in ("I64", "I32") or entry.shape not in (
            (2,), (3,), (self.matrix.experts, 2),
        ):  # fmt: skip
            raise wrong(f"tensor {name!r}", "the two sizes", f"{entry.dtype} {list(entry.shape)}")
        n, k = (int(size) for size in self.checkpoint.raw(name).reshape(-1)[-2:])
        padded = cols == -(-k // (32 // bits)) != _words(k, bits)
        if n != rows or not (padded or cols == _words(k, bits)):
            raise wrong(f"tensor {name!r}", f"{[rows, cols * 32 // bits]} at {bits} bits", [n, k])
        return k, padded

    def _check_groups(self) -> None:
        """The scales count the columns once more, which shows a wrong number of bits."""
        entry = self.checkpoint.entry(self.tensor("scales"))
        shape = entry.shape if self.matrix.index is None else entry.shape[1:]
        groups = self._stored_groups
        want = (self.n, groups) if self.by_rows else (groups, self.n)
        if shape != want:
            raise wrong(
                f"tensor {self.tensor('scales')!r} shape",
                f"{list(want)}, groups of {self.group_size} of '{self.qweight}' [K, N] ="
                f" {[self.k, self.n]} at {self.scheme.bits} bits",
                list(entry.shape),
            )

    def order(self) -> Array | None:
        """The group of each column; None where the columns are in order."""
        name = self.tensor("g_idx")
        if not self.has("g_idx") or self._is_awq:
            if self.scheme.act_order:
                raise wrong(f"tensor {name!r}", "to be there, as desc_act says", "no such tensor")
            return None
        values = self.read("g_idx", ("I32",), (self.k,))
        outside = (values < 0) | (values >= self.groups)
        if outside.any():
            at = int(outside.argmax())
            raise wrong(f"tensor {name!r} [{at}]", f"a group of 0 to {self.groups - 1}", values[at])
        if np.array_equal(values, np.arange(self.k, dtype=np.int32) // self.group_size):
            return None
        if self.scheme.act_order is False:
            raise wrong(
                f"tensor {name!r}", "k // group_size, as desc_act=false says", "another order"
            )
        return values

    def zeros_tensor(self) -> str | None:
        """The tensor of qzeros, or None where they are not needed and not there."""
        symmetric, form = self.scheme.symmetric, self.scheme.format
        # GPTQ always has zero points; the others have none where they are symmetric.
        optional = symmetric is True if self._is_awq else symmetric is not False
        optional &= self._is_awq or form == "pack_quantized"
        if optional and not self.has("qzeros"):
            return None
        self.checkpoint.entry(self.tensor("qzeros"))  # which must be there
        return self.tensor("qzeros")

    def _stored_zeros(self) -> Array | None:
        """Stored qzeros, or None where they are not needed and not there."""
        form, bits = self.scheme.format, self.scheme.bits
        if self.zeros_tensor() is None:
            return None
        if form == "awq_gemv":
            shape = (self.n, self._stored_groups * bits // 32)
            codes = unpack(self.read("qzeros", ("I32",), shape), bits, self.groups)
            return pack_rows(codes)
        words = -(-self.n // (32 // bits)) if self.padded else _words(self.n, bits)
        shape = (words, self.groups) if self.packed else (self.groups, words)
        return self.read("qzeros", ("I32",), shape)

    def _above_stored(self, codes: Array) -> int:
        """What zero points of GPTQ are above the stored ones: one, in ``gptq_v2`` nothing.

        GPTQModel 5 stores those of ``gptq_v2`` and says ``gptq``. Where all are the middle of the
        codes or all one below it, the middle is meant, since no quantiser makes all others alike.
        """
        symmetric, middle = self.scheme.symmetric, 1 << (self.scheme.bits - 1)
        usual = int(self.scheme.format == "gptq")
        if symmetric is False or not self.scheme.format.startswith("gptq"):
            return usual
        for above in (0, 1):
            if (codes == middle - above).all():
                return above
        if symmetric:
            raise wrong(
                f"tensor {self.tensor('qzeros')!r}",
                f"zero points of {middle - 1} or of {middle}, as sym=true says",
                "others",
            )
        return usual

    @property
    def has_plain_zeros(self) -> bool:
        """Whether zero points are signed bytes, as older compressed-tensors wrote them."""
        name = self.tensor("qzeros")
        return self.packed and self.has("qzeros") and self.checkpoint.entry(name).dtype == "I8"

    def zero_words(self) -> Array | None:
        """Words of 4-bit qzeros as their format means them, or None: every zero point is 8."""
        words = self._stored_zeros()
        if words is None:
            return None
        more = self._above_stored(unpack(words, 4, self.n)) - int(self.scheme.format == "gptq")
        moved: Array = (words.view(np.uint32) + np.uint32(0x11111111 * more & 0xFFFFFFFF)).view(
            np.int32
        )
        return moved

    def zeros(self) -> Array:
        """The zero points that are subtracted from codes, i16 [n, groups]."""
        bits, middle = self.scheme.bits, 1 << (self.scheme.bits - 1)
        if self.has_plain_zeros:
            plain = self.read("qzeros", ("I8",), (self.n, self.groups)).astype(np.int16)
            return plain + np.int16(middle)
        words = self._stored_zeros()
        if words is None:
            return np.full((self.n, self.groups), middle, np.int16)
        if self.by_rows:
            codes = unpack(words.T, bits, self.n, self.padded).T
        elif self.scheme.format == "awq":
            codes = _awq(unpack(words, bits, self.n)).T
        else:
            codes = unpack(words, bits, self.n).T
        zeros: Array = codes.astype(np.int16) + np.int16(self._above_stored(codes))
        if self.scheme.symmetric and not (zeros == middle).all():
            raise wrong(
                f"tensor {self.tensor('qzeros')!r}", f"zero points that mean {middle}", "others"
            )
        return zeros

    def scales(self) -> Array:
        """f32 [n, groups]."""
        scales = self.stored_scales().astype(np.float32)
        return scales if self.by_rows else scales.T

    def stored_scales(self) -> Array:
        """[n, groups] by rows, else [groups, n], in the type of the file."""
        groups = self._stored_groups
        if self.by_rows:
            stored = self.read("scales", FLOATS, (self.n, groups))
            return np.ascontiguousarray(stored[:, : self.groups])
        return self.read("scales", FLOATS, (groups, self.n))

    def nibbles(self) -> Array:
        """Codes of 4 bits, two neighbours in a byte, u8 [n, k/2]; k is even."""
        if self.by_rows:  # Stored like this.
            words = self.read("qweight", ("I32",), (self.n, _words(self.k, 4)))
            return words.view(np.uint8)[:, : self.k // 2]
        codes = self.codes()
        pairs: Array = codes[:, 0::2] | codes[:, 1::2] << 4
        return pairs

    def codes(self) -> Array:
        """u8 [n, k], before zero points."""
        bits = self.scheme.bits
        if self.scheme.format == "awq":
            return _awq(unpack(self.read("qweight", ("I32",), (self.k, self.n * bits // 32)), bits,
                               self.n)).T  # fmt: skip
        if self.by_rows:
            cols = -(-self.k // (32 // bits)) if self.padded else _words(self.k, bits)
            words = self.read("qweight", ("I32",), (self.n, cols))
            return unpack(words, bits, self.k, self.padded)
        words = self.read("qweight", ("I32",), (self.k * bits // 32, self.n))
        return unpack(words.T, bits, self.k)


def _awq(codes: Array) -> Array:
    """Codes in the order of their columns; ``codes`` come by nibbles."""
    out: Array = codes.reshape(*codes.shape[:-1], -1, 8)[..., _AWQ_ORDER].reshape(codes.shape)
    return out

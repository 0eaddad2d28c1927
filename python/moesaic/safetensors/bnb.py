"""Matrices that bitsandbytes quantised to 4 bits, nf4 or fp4; its 8 bits are read by ``fp8``.

Codes stand for entries of a table of 16, times the largest magnitude of their block, which may
itself be a code of 8 bits. GGUF has no such type, so values are rounded to the floats that
bitsandbytes makes of them; with ``exact`` they become F32.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.safetensors.encoded import Encoded, bytes_of, to_bf16
from moesaic.safetensors.names import Matrix
from moesaic.safetensors.parsing import parse_json
from moesaic.safetensors.reader import Array, Checkpoint, wrong

_KINDS = ("nf4", "fp4")
_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
#: Of a description; more is none.
_MAX_STATE = 4096


@dataclass(frozen=True)
class Bnb4(Encoded):
    """Codes of 4 bits, the first of two in the upper half of a byte, rows without gaps."""

    state: str  # the name of the tensor that holds the description, as JSON
    block: int
    to: str  # F32, F16 or BF16
    nested: tuple[int, float] | None  # block and offset of magnitudes that are codes themselves

    form = "4 bits of bitsandbytes"
    decision = "dequantized"
    reason = "GGUF has no such type"

    @classmethod
    def open(cls, checkpoint: Checkpoint, matrix: Matrix, exact: bool) -> "Bnb4 | None":
        name = f"{matrix.base}.weight"
        states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in _KINDS]
        state = next((one for one in states if one in checkpoint.tensors), None)
        if state is None:
            return None
        facts = _description(checkpoint, state)
        shape, block = facts.get("shape"), facts.get("blocksize")
        if shape is None or not _sizes(shape, 2):
            raise wrong(f"tensor {state!r} shape", "two sizes", shape)
        if block is None or not _sizes([block], 1):
            raise wrong(f"tensor {state!r} blocksize", "a size", block)
        dtype = facts.get("dtype")
        if dtype not in _FLOATS:
            raise wrong(f"tensor {state!r} dtype", " or ".join(_FLOATS), dtype)
        to = "F32" if exact else _FLOATS[dtype]
        n, k = shape
        one = cls(checkpoint, matrix, n, k, state, block, to, _nested(facts, state))
        one._check_sizes()
        return one

    @property
    def name(self) -> str:
        return f"{self.matrix.base}.weight"

    @property
    def type(self) -> str:
        return self.to

    def tensors(self) -> set[str]:
        parts = ["absmax", "quant_map"]
        if self.nested is not None:
            parts += ["nested_absmax", "nested_quant_map"]
        return super().tensors() | {self.state} | {f"{self.name}.{part}" for part in parts}

    @property
    def _blocks(self) -> int:
        return -(-self.n * self.k // self.block)

    def _check_sizes(self) -> None:
        """The description counts what is stored, before anything is made of its numbers."""
        wanted = {self.name: -(-self.n * self.k // 2), f"{self.name}.absmax": self._blocks}
        for name, count in wanted.items():
            shape = self.checkpoint.entry(name).shape
            if math.prod(shape) != count:
                raise wrong(
                    f"tensor {name!r} shape",
                    f"{count} values, as {self.state!r} says [{self.n}, {self.k}]",
                    list(shape),
                )

    def _part(self, part: str, dtypes: tuple[str, ...], count: int) -> Array:
        return self.checkpoint.read(f"{self.name}.{part}", dtypes, (count,))

    def _magnitudes(self) -> Array:
        """f32, one for each block."""
        if self.nested is None:
            return self._part("absmax", ("F32",), self._blocks)
        block, offset = self.nested
        codes = self._part("absmax", ("U8",), self._blocks)
        scales = self._part("nested_absmax", ("F32",), -(-self._blocks // block))
        table = self._part("nested_quant_map", ("F32",), 256)
        magnitudes: Array = table[codes] * np.repeat(scales, block)[: self._blocks]
        magnitudes += np.float32(offset)
        return magnitudes

    def values(self) -> tuple[Array, float]:
        packed = self.checkpoint.read(self.name, ("U8",), self.checkpoint.entry(self.name).shape)
        packed = packed.reshape(-1)
        table = self._part("quant_map", ("F32",), 16)
        values = np.empty((self._blocks, self.block), np.float32)
        flat = values.reshape(-1)
        count = self.n * self.k
        flat[0:count:2] = table[packed >> 4]
        flat[1:count:2] = table[packed & 15][: count // 2]
        flat[count:] = 0
        with np.errstate(over="ignore", invalid="ignore"):
            values *= self._magnitudes()[:, None]
        if not np.isfinite(values).all():
            raise wrong(f"tensor '{self.name}.absmax'", "products that f32 holds", "others")
        return flat[:count].reshape(self.n, self.k), 1.0

    def rows(self) -> tuple[Array, float]:
        values, factor = self.values()
        if self.to == "BF16":
            return bytes_of(to_bf16(values)), factor
        with np.errstate(over="ignore"):
            floats = values.astype(np.float16 if self.to == "F16" else np.float32)
        if not np.isfinite(floats).all():
            raise wrong(f"tensor '{self.name}.absmax'", "products that f16 holds", "larger ones")
        return bytes_of(floats), factor


def _description(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    entry = checkpoint.entry(name)
    if entry.dtype != "U8" or entry.end - entry.begin > _MAX_STATE:
        raise wrong(f"tensor {name!r}", "JSON as U8", f"{entry.dtype} {list(entry.shape)}")
    return parse_json(checkpoint.raw(name).tobytes(), f"tensor {name!r}")


def _sizes(values: Any, count: int) -> bool:
    good = isinstance(values, list) and len(values) == count
    return good and all(type(one) is int and 0 < one < 1 << 31 for one in values)


def _nested(facts: dict[str, Any], state: str) -> tuple[int, float] | None:
    if "nested_blocksize" not in facts:
        return None
    block = facts["nested_blocksize"]
    offset: Any = facts.get("nested_offset")
    if not _sizes([block], 1):
        raise wrong(f"tensor {state!r} nested_blocksize", "a size", block)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise wrong(f"tensor {state!r} nested_offset", "a finite number", offset)
    return block, float(offset)

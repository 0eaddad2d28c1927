"""INT4 experts as the tensors of GPTQ, from which they come back bit by bit.

Codes are i32 [K/8, N], eight along K; scales [groups, N]; zero points i32 [groups, N/8], eight
along N; g_idx i32 [K] has the group of each column. ``gptq`` stores zero points one too small,
``gptq_v2`` as they are, so that a nibble has room for 1 to 16 or for 0 to 15 of them. The
configuration is that of GPTQModel, which transformers and vLLM read:
https://github.com/ModelCloud/GPTQModel/blob/main/gptqmodel/quantization/config.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic.safetensors.encoded import to_bf16
from moesaic.safetensors.ints import pack_rows
from moesaic.saving.hf_tensors import HfTensor
from moesaic.saving.tensors import Array

_MIDDLE = 8


@dataclass(frozen=True)
class Matrices:
    """The INT4 matrices of one role, or of gate and up, of all experts of a stack."""

    where: str  # for errors
    stack: _core.MarlinExpertStack
    #: What each role's columns are of those of an expert, and its names by expert.
    columns: dict[str, slice]
    names: dict[str, list[str]]


@dataclass(frozen=True)
class Scheme:
    """What all INT4 matrices of a checkpoint have in common."""

    group_size: int  # -1: one group per column
    act_order: bool
    symmetric: bool
    format: str  # gptq or gptq_v2
    #: The dtype of the scales, for each of the matrices in order.
    scales: tuple[str, ...]

    def fields(self, floats: Iterable[str]) -> dict[str, Any]:
        """``quantization_config`` of config.json; ``floats`` are matrices that are no integers."""
        fields = {
            "quant_method": "gptq", "bits": 4, "group_size": self.group_size,
            "desc_act": self.act_order, "sym": self.symmetric, "lm_head": False,
            "checkpoint_format": self.format, "pack_dtype": "int32",
        }  # fmt: skip
        # A rule leaves out a whole block: readers join its matrices under names of their own.
        blocks = dict.fromkeys(re.sub(r"(\.\d+)?\.\w+\.weight$", "", name) for name in floats)
        rules: dict[str, Any] = {f"-:^{re.escape(block)}\\.": {} for block in blocks}
        return {**fields, "dynamic": rules} if rules else fields


def scheme_of(operation: str, matrices: Sequence[Matrices]) -> Scheme:
    """Looks at every matrix. Raises UnsupportedError for some that no one scheme describes."""
    group_size = _group_size(operation, matrices)
    least, most, dtypes = _MIDDLE, _MIDDLE, []
    for one in matrices:
        fits = set(_NARROW)
        for expert in range(one.stack.num_experts):
            unpacked = one.stack.unpack(expert)
            zeros, scales = unpacked["zeros"], unpacked["scales"]
            least, most = min(least, int(zeros.min())), max(most, int(zeros.max()))
            fits = {dtype for dtype in fits if _same(_NARROW[dtype](scales), scales)}
        dtypes.append(next((dtype for dtype in _NARROW if dtype in fits), "F32"))
    if least == 0 and most == 16:
        raise error_of(
            _core.UnsupportedError, operation, matrices[0].where,
            "zero points of 0 to 15 or of 1 to 16, as GPTQ stores them", "0 to 16",
        )  # fmt: skip
    return Scheme(
        group_size,
        any(one.stack.act_order for one in matrices),
        all(one.stack.symmetric for one in matrices),
        "gptq" if least > 0 else "gptq_v2",
        tuple(dtypes),
    )


def _group_size(operation: str, matrices: Sequence[Matrices]) -> int:
    """One for all. Matrices of one group fit any size of at least their columns."""
    sizes = {one.stack.group_size for one in matrices if one.stack.group_size < one.stack.k}
    alone = {one.stack.k for one in matrices if one.stack.group_size >= one.stack.k}
    size = min(sizes, default=-1)
    if len(sizes) > 1 or (sizes and max(alone, default=0) > size):
        shown = ", ".join(map(str, sorted(sizes | alone)))
        raise error_of(
            _core.UnsupportedError, operation, matrices[0].where,
            "groups of one size, as GPTQ has them", shown, "dequantize= decodes them",
        )  # fmt: skip
    return size


def tensors_of(scheme: Scheme, matrices: Sequence[Matrices]) -> Iterator[HfTensor]:
    """The tensors of all matrices, in the order in which an expert is unpacked once."""
    for one, dtype in zip(matrices, scheme.scales, strict=True):
        yield from _tensors(scheme, one, dtype)


def _tensors(scheme: Scheme, one: Matrices, dtype: str) -> Iterator[HfTensor]:
    stack = one.stack
    unpacked: Callable[[int], dict[str, Any]] = lru_cache(maxsize=1)(stack.unpack)
    groups = -(-stack.k // stack.group_size)

    def part(expert: int, kind: str, columns: slice) -> Callable[[], Array]:
        def read() -> Array:
            values: Array = unpacked(expert)[kind][:, columns]
            if kind == "codes":
                return pack_rows(values)
            if kind == "zeros":
                stored = values - np.uint8(scheme.format == "gptq")
                return pack_rows(stored.T).T
            return values

        return read

    def order(expert: int) -> Callable[[], Array]:
        def read() -> Array:
            found: Array | None = unpacked(expert)["g_idx"]
            plain = np.arange(stack.k, dtype=np.int32) // np.int32(stack.group_size)
            return plain if found is None else found

        return read

    for expert in range(stack.num_experts):
        for role, columns in one.columns.items():
            name, n = one.names[role][expert], columns.stop - columns.start
            words = -(-n // 8)
            yield HfTensor(
                f"{name}.qweight", "I32", (stack.k // 8, n), part(expert, "codes", columns)
            )
            yield HfTensor(f"{name}.scales", dtype, (groups, n), part(expert, "scales", columns))
            yield HfTensor(f"{name}.qzeros", "I32", (groups, words), part(expert, "zeros", columns))
            yield HfTensor(f"{name}.g_idx", "I32", (stack.k,), order(expert))


def _same(a: Array, b: Array) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def _as_f16(values: Array) -> Array:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    return narrow.astype(np.float32)


def _as_bf16(values: Array) -> Array:
    return (to_bf16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)


#: What becomes of scales in types narrower than f32, the first choice first.
_NARROW: dict[str, Callable[[Array], Array]] = {"F16": _as_f16, "BF16": _as_bf16}

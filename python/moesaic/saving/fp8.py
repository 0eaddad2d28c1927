"""E4M3 experts as the tensors of an FP8 checkpoint, from which they come back bit by bit.

Codes are F8_E4M3 [rows, cols]; scales are F32, as few as say all: one for 128 x 128 values, as
DeepSeek and Qwen publish them, else one for a row, else one for 128 columns of a row, both of which
are as compressed-tensors has them. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic.safetensors.fp8 import BLOCK
from moesaic.saving.hf_tensors import HfTensor
from moesaic.saving.tensors import Array

_Strategy = Literal["block", "channel", "group"]


@dataclass(frozen=True)
class Matrices:
    """The E4M3 matrices of one role of a stack."""

    where: str  # for errors
    stack: _core.ExpertStack
    role: Literal["gate", "up", "down"]
    names: list[str]  #: of the tensors, by expert

    def blocks(self, expert: int) -> Array:
        """u8 [rows, cols / 128, 4 + 128]: the bytes of a scale, then codes."""
        rows = self.stack.encoded(self.role, expert)
        return rows.reshape(len(rows), -1, 4 + BLOCK)

    def scales(self, expert: int) -> Array:
        """f32 [rows, cols / 128]."""
        return np.ascontiguousarray(self.blocks(expert)[..., :4]).view("<f4")[..., 0]


@dataclass(frozen=True)
class Scheme:
    """What one scale of all E4M3 matrices of a checkpoint is for."""

    strategy: _Strategy

    def fields(self, floats: Iterable[str]) -> dict[str, Any]:
        """``quantization_config`` of config.json; ``floats`` are matrices without scales."""
        apart = [name.removesuffix(".weight") for name in floats]
        if self.strategy == "block":
            return {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
                **({"modules_to_not_convert": apart} if apart else {}),
            }  # fmt: skip
        weights = {
            "num_bits": 8, "type": "float", "symmetric": True, "dynamic": False,
            "strategy": self.strategy,
            **({"group_size": BLOCK} if self.strategy == "group" else {}),
        }  # fmt: skip
        group = {"targets": ["Linear"], "weights": weights, "format": "float-quantized"}
        return {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": group}, "ignore": apart,
        }  # fmt: skip

    @property
    def suffix(self) -> str:
        return "weight_scale_inv" if self.strategy == "block" else "weight_scale"

    def stored(self, scales: Array) -> Array:
        """Those of f32 [rows, cols / 128] that are stored."""
        if self.strategy == "block":
            return scales[::BLOCK]
        return scales[:, :1] if self.strategy == "channel" else scales


def scheme_of(operation: str, matrices: Sequence[Matrices]) -> Scheme:
    """Looks at the scales of every matrix. Raises UnsupportedError for some that are no numbers."""
    rows_alike = columns_alike = True
    for one in matrices:
        for expert in range(one.stack.num_experts):
            scales = one.scales(expert)
            if not np.isfinite(scales).all():
                raise error_of(
                    _core.UnsupportedError, operation, f"{one.where}: expert {expert}",
                    "finite scales", "others",
                )  # fmt: skip
            bits = scales.view(np.uint32)
            first = np.repeat(bits[::BLOCK], BLOCK, axis=0)[: len(bits)]
            rows_alike = rows_alike and bool((bits == first).all())
            columns_alike = columns_alike and bool((bits == bits[:, :1]).all())
    return Scheme("block" if rows_alike else "channel" if columns_alike else "group")


def tensors_of(scheme: Scheme, matrices: Iterable[Matrices]) -> Iterator[HfTensor]:
    """The codes and scales of all matrices."""
    for one in matrices:
        hidden, inner = one.stack.hidden_size, one.stack.intermediate_size
        shape = (hidden, inner) if one.role == "down" else (inner, hidden)
        grid = scheme.stored(np.empty((shape[0], shape[1] // BLOCK), np.uint8)).shape
        for expert, name in enumerate(one.names):
            yield HfTensor(name, "F8_E4M3", shape, _codes(one, expert, shape))
            base = name.removesuffix("weight")
            yield HfTensor(f"{base}{scheme.suffix}", "F32", grid, _scales(scheme, one, expert))


def _codes(one: Matrices, expert: int, shape: tuple[int, int]) -> Callable[[], Array]:
    return lambda: one.blocks(expert)[..., 4:].reshape(shape)


def _scales(scheme: Scheme, one: Matrices, expert: int) -> Callable[[], Array]:
    return lambda: scheme.stored(one.scales(expert))

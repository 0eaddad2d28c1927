"""A tensor on its way into a file of safetensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesaic.safetensors.encoded import to_bf16
from moesaic.saving.tensors import Array

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "F8_E4M3": 1}


@dataclass(frozen=True)
class HfTensor:
    """Name, dtype and shape; ``read`` gives the values as f32, or as i32; codes of FP8 as u8."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]

    def data(self) -> memoryview:
        values = self.read()
        if self.dtype == "F16":
            values = values.astype(np.float16)
        elif self.dtype == "BF16":
            values = to_bf16(np.ascontiguousarray(values, np.float32))
        elif self.dtype != "F8_E4M3":
            values = values.astype(np.float32 if self.dtype == "F32" else np.int32, copy=False)
        assert values.shape == self.shape, (self.name, values.shape, self.shape)
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

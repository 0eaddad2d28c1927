"""A tensor on its way into a file, in units that are made one by one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of

Array = npt.NDArray[Any]


@cache
def _facts() -> dict[str, dict[str, Any]]:
    return _core.quant_types()


def row_bytes(type: str, cols: int) -> int:
    """Bytes of a row of a ggml type. Raises ShapeError for a row that is not of whole blocks."""
    facts = _facts()[type]
    elems = int(facts["block_elems"])
    if cols % elems:
        expected = f"rows of a multiple of {elems} elements ({type})"
        raise error_of(_core.ShapeError, "write", "tensor", expected, str(cols))
    return cols // elems * int(facts["block_bytes"])


@dataclass(frozen=True)
class Tensor:
    """Name, ggml type and shape in elements, outermost first.

    ``read`` gives the bytes of one of ``units`` equal parts, which lie one behind the other.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[int], Array]
    units: int = 1

    @property
    def nbytes(self) -> int:
        *outer, cols = self.shape or (1,)
        return math.prod(outer) * row_bytes(self.type, cols)

    def unit(self, index: int) -> memoryview:
        """The bytes of one unit, checked for their number."""
        data = np.ascontiguousarray(self.read(index)).reshape(-1).view(np.uint8)
        assert data.nbytes * self.units == self.nbytes, (self.name, data.nbytes, self.nbytes)
        return data.data


def of_array(name: str, values: Array) -> Tensor:
    """A small tensor of f32 or i32."""
    return Tensor(name, type_of(values), values.shape, lambda _: values)


def type_of(values: Array) -> str:
    return {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32"}[values.dtype]

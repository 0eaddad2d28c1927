"""One matrix outside of any expert: an attention or output projection."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import nn

from moesaic import _core
from moesaic._errors import require_kind
from moesaic.torch.arrays import array_of
from moesaic.torch.frozen import FrozenMatrix
from moesaic.torch.ops import run_linear
from moesaic.torch.state import FrozenModule

if TYPE_CHECKING:
    from moesaic._core import _GgufSource, _Progress


class Linear(FrozenModule):
    """What ``torch.nn.Linear`` computes, over a matrix that stays encoded.

    It has no parameters: the weights are frozen. Gradients reach the input, through the decoded
    matrix.

    Parameters
    ----------
    matrix : QuantMatrix
        The weights [N, K], with their bias.

    Raises
    ------
    DTypeError
        Another object than a matrix.

    Examples
    --------
    >>> import torch
    >>> from moesaic.torch import Linear
    >>> linear = Linear.from_linear(torch.nn.Linear(256, 64), quant="Q4_K")
    >>> linear(torch.ones(2, 3, 256)).shape
    torch.Size([2, 3, 64])
    """

    _weights: FrozenMatrix

    def __init__(self, matrix: _core.QuantMatrix) -> None:
        super().__init__()
        require_kind("Linear", "matrix", matrix, _core.QuantMatrix, "a QuantMatrix")
        self._weights = FrozenMatrix(matrix)

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant: str | None = None) -> Linear:
        """Encode the weights of a module of torch.

        Parameters
        ----------
        linear : torch.nn.Linear
            In f32, f16 or bf16 on the CPU.
        quant : str, optional
            The type to encode in, such as 'Q4_K'. None: as they are.

        Returns
        -------
        Linear

        Raises
        ------
        ConfigError, ShapeError, UnsupportedError
            As ``QuantMatrix.from_dense``.
        """
        bias = None if linear.bias is None else array_of(linear.bias)
        return cls(_core.QuantMatrix.from_dense(array_of(linear.weight), quant, bias=bias))

    @classmethod
    def from_gguf(
        cls,
        file: _GgufSource,
        name: str,
        *,
        bias: str | None = None,
        weight_cache: bool | str | PathLike[str] = False,
        progress: _Progress = None,
    ) -> Linear:
        """Load one tensor of a GGUF file.

        Parameters
        ----------
        file : GgufFile or path
            The model.
        name : str
            Name of the tensor [N, K].
        bias : str, optional
            Name of a tensor [N].
        weight_cache : bool or path-like
            Where the repacked matrix is kept, as in ``QuantMatrix.from_gguf``.
        progress : callable or bool, optional
            As in ``QuantMatrix.from_gguf``, whose errors these are.

        Returns
        -------
        Linear
        """
        return cls(
            _core.QuantMatrix.from_gguf(
                file, name, bias=bias, weight_cache=weight_cache, progress=progress
            )
        )

    @property
    def matrix(self) -> _core.QuantMatrix:
        """The weights."""
        return self._weights.matrix

    @property
    def in_features(self) -> int:
        """K."""
        return self.matrix.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.matrix.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.matrix.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply rows with the matrix.

        Parameters
        ----------
        x : tensor [..., K]
            f32, f16 or bf16.

        Returns
        -------
        tensor [..., N]
            Of the same element type.

        Raises
        ------
        ShapeError, DTypeError
            The tensor does not fit.
        """
        return run_linear(x, self._weights.number)

    def extra_repr(self) -> str:
        """Return sizes, type and bytes."""
        matrix = self.matrix
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" {matrix.quant}, {matrix.nbytes / 2**20:.1f} MiB"
        )

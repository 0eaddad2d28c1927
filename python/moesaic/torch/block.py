"""A whole layer: router, experts and shared experts."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch

from moesaic import _core
from moesaic._errors import require_kind
from moesaic.torch.frozen import FrozenLayer
from moesaic.torch.ops import run_layer
from moesaic.torch.state import FrozenModule

if TYPE_CHECKING:
    from moesaic._core import _GgufSource, _Progress


class MoeBlock(FrozenModule):
    """A mixture-of-experts layer with its own router and shared experts.

    It has no parameters: the weights stay encoded and frozen, those of the router too. Gradients
    reach the input, through the experts and through the weights that the router gave them, decoded
    expert by expert. A model that trains its router routes in torch and calls ``Experts``.

    Parameters
    ----------
    layer : MoeLayer
        The layer, in host memory.

    Raises
    ------
    DTypeError
        Another object than a layer.

    Examples
    --------
    >>> import torch
    >>> import moesaic as mo
    >>> from moesaic.torch import MoeBlock
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> block = MoeBlock.from_gguf("model.gguf", 0)
    >>> block(torch.ones(1, 3, 256)).shape
    torch.Size([1, 3, 256])
    """

    _weights: FrozenLayer

    def __init__(self, layer: _core.MoeLayer) -> None:
        super().__init__()
        require_kind("MoeBlock", "layer", layer, _core.MoeLayer, "a MoeLayer")
        self._weights = FrozenLayer(layer)

    @classmethod
    def from_gguf(
        cls,
        file: _GgufSource,
        layer: int,
        *,
        weight_cache: bool | str | PathLike[str] = False,
        progress: _Progress = None,
    ) -> MoeBlock:
        """Load one block of a GGUF file.

        Parameters
        ----------
        file : GgufFile or path
            The model.
        layer : int
            Block number.
        weight_cache : bool or path-like
            Where repacked weights are kept, as in ``MoeLayer.from_gguf``.
        progress : callable or bool, optional
            As in ``MoeLayer.from_gguf``, whose errors these are.

        Returns
        -------
        MoeBlock
        """
        made = _core.MoeLayer.from_gguf(file, layer, weight_cache=weight_cache, progress=progress)
        return cls(made)

    @classmethod
    def from_safetensors(
        cls,
        path: str | PathLike[str],
        layer: int,
        *,
        weight_cache: bool | str | PathLike[str] = False,
        progress: _Progress = None,
    ) -> MoeBlock:
        """Load one layer of a Hugging Face checkpoint.

        Parameters
        ----------
        path : str or path-like
            A folder with config.json and the tensors.
        layer : int
            Number of the layer.
        weight_cache : bool or path-like
            Where repacked weights are kept, as in ``MoeLayer.from_safetensors``.
        progress : callable or bool, optional
            As in ``MoeLayer.from_safetensors``, whose errors these are.

        Returns
        -------
        MoeBlock
        """
        made = _core.MoeLayer.from_safetensors(
            path, layer, weight_cache=weight_cache, progress=progress
        )
        return cls(made)

    @property
    def layer(self) -> _core.MoeLayer:
        """The layer."""
        return self._weights.layer

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of the experts."""
        return self.layer.stack.nbytes

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the layer.

        Parameters
        ----------
        hidden_states : tensor [..., H]
            f32, f16 or bf16.

        Returns
        -------
        tensor [..., H]
            Of the same element type.

        Raises
        ------
        ShapeError, DTypeError
            The tensor does not fit.
        """
        return run_layer(hidden_states, self._weights.number)

    def extra_repr(self) -> str:
        """Return the sizes of the layer."""
        config, stack = self.layer.config, self.layer.stack
        return (
            f"{config.num_experts} experts, top_k={config.top_k},"
            f" hidden_size={config.hidden_size}, intermediate_size={config.intermediate_size},"
            f" {stack.nbytes / 2**20:.1f} MiB"
        )

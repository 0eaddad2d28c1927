"""The experts of a layer, routed by the model."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from moesaic import _core
from moesaic._errors import error_of, require_kind
from moesaic.torch.frozen import FrozenExperts, PooledExperts
from moesaic.torch.ops import run_experts
from moesaic.torch.state import FrozenModule

if TYPE_CHECKING:
    from moesaic._core import _ActivationName, _GgufSource, _OnMiss, _Precision, _Progress


class Experts(FrozenModule):
    """The experts of one layer; the model routes.

    It stands where a model of transformers has its ``experts``, and has no parameters: the weights
    stay encoded and frozen. Gradients reach the inputs and the routing weights, decoded expert by
    expert.

    Parameters
    ----------
    stack : ExpertStack
        The weights, in host memory.
    activation : Activation or str, optional
        What is between the products. None: 'swiglu', or 'relu_squared' for ungated experts.
    precision : str, optional
        'exact' or 'fast', as in ``MoeLayer.__call__``; None leaves it to the tuning.

    Raises
    ------
    DTypeError
        Another object than a stack.
    ConfigError
        An unknown activation, or one that is gated where the experts are not.

    Examples
    --------
    >>> import torch
    >>> import moesaic as mo
    >>> from moesaic.torch import Experts
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> experts = Experts.from_gguf("model.gguf", 0)
    >>> x, ids, weights = torch.ones(3, 256), torch.tensor([[0, 5]] * 3), torch.full((3, 2), 0.5)
    >>> experts(x, ids, weights).shape
    torch.Size([3, 256])
    """

    _weights: FrozenExperts

    def __init__(
        self,
        stack: _core.ExpertStack,
        activation: _core.Activation | _ActivationName | None = None,
        *,
        precision: _Precision | None = None,
    ) -> None:
        super().__init__()
        require_kind("Experts", "stack", stack, _core.ExpertStack, "an ExpertStack")
        if activation is None:
            activation = "swiglu" if stack.gated else "relu_squared"
        if isinstance(activation, str):
            activation = _core.Activation(activation)
        self._weights = FrozenExperts(stack, activation, precision)

    @classmethod
    def from_gguf(
        cls,
        file: _GgufSource,
        layer: int,
        *,
        precision: _Precision | None = None,
        weight_cache: bool | str | PathLike[str] = False,
        progress: _Progress = None,
    ) -> Experts:
        """Load the experts of one block of a GGUF file, with the activation of its architecture.

        Parameters
        ----------
        file : GgufFile or path
            The model.
        layer : int
            Block number.
        precision : str, optional
            As in the constructor.
        weight_cache : bool or path-like
            Where repacked weights are kept, as in ``ExpertStack.load_from_gguf``.
        progress : callable or bool, optional
            As in ``ExpertStack.load_from_gguf``, whose errors these are.

        Returns
        -------
        Experts
        """
        stack = _core.ExpertStack.load_from_gguf(
            file, layer, weight_cache=weight_cache, progress=progress
        )
        return cls(stack, _core.MoeConfig.from_gguf(file, layer).activation, precision=precision)

    @classmethod
    def from_safetensors(
        cls,
        path: str | PathLike[str],
        layer: int,
        *,
        precision: _Precision | None = None,
        weight_cache: bool | str | PathLike[str] = False,
        progress: _Progress = None,
    ) -> Experts:
        """Load the experts of one layer of a Hugging Face checkpoint, as it encodes them.

        Parameters
        ----------
        path : str or path-like
            A folder with config.json and the tensors.
        layer : int
            Number of the layer.
        precision : str, optional
            As in the constructor.
        weight_cache : bool or path-like
            Where repacked weights are kept, as in ``ExpertStack.load_from_safetensors``.
        progress : callable or bool, optional
            As in ``ExpertStack.load_from_safetensors``, whose errors these are.

        Returns
        -------
        Experts
        """
        stack = _core.ExpertStack.load_from_safetensors(
            path, layer, weight_cache=weight_cache, progress=progress
        )
        return cls(stack, _core.MoeConfig.from_hf(path, layer).activation, precision=precision)

    @classmethod
    def from_store(
        cls,
        store: _core.MoeExpertStore,
        layer: int,
        pool: _core.ExpertPool,
        on_miss: _OnMiss = "stage",
        *,
        activation: _core.Activation | _ActivationName | None = None,
        precision: _Precision | None = None,
    ) -> Experts:
        """Take the experts of a store, of which as many are in memory as the pool says.

        Parameters
        ----------
        store : MoeExpertStore
            Where the experts lie.
        layer : int
            Block number in the model.
        pool : ExpertPool
            Which experts have a slot.
        on_miss : str
            What a call does with an expert that has none, as in ``MoeLayer.from_store``.
        activation, precision
            As in the constructor.

        Returns
        -------
        Experts
            Its results are those of experts that are all in memory. A pickle, or an entry of a
            state_dict, refers to the file; experts made of one run where the file is mapped.

        Raises
        ------
        ShapeError
            No such block, or a pool of another size.
        ConfigError
            An unknown activation, or what ``MoeLayer.from_store`` raises.
        DTypeError
            Another object than a store.
        """
        require_kind("Experts", "store", store, _core.MoeExpertStore, "a MoeExpertStore")
        stacks = {one.layer_index: one.stack for one in store.layers}
        if layer not in stacks:
            known = ", ".join(map(str, stacks))
            raise error_of(
                _core.ShapeError, "Experts.from_store", "layer", f"one of {known}", str(layer)
            )
        made = cls(stacks[layer], activation, precision=precision)
        made._weights = PooledExperts(store, layer, pool, on_miss, made.activation, precision)
        return made

    @property
    def stack(self) -> _core.ExpertStack:
        """The weights; of a store all of them, as they lie there."""
        return self._weights.stack

    @property
    def activation(self) -> _core.Activation:
        """What is between the products."""
        return self._weights.activation

    @property
    def num_experts(self) -> int:
        """E."""
        return self.stack.num_experts

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.stack.nbytes

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each expert was used so far, by this module and its copies: int64 [E]."""
        return self._weights.uses.scores.astype(np.int64)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts of each token and sum what they give.

        Parameters
        ----------
        hidden_states : tensor [..., H]
            f32, f16 or bf16.
        top_k_index : int32 or int64 tensor [..., k]
            The experts of each token; -1 skips one.
        top_k_weights : tensor [..., k]
            Their weights.

        Returns
        -------
        tensor [..., H]
            Of the element type of ``hidden_states``.

        Raises
        ------
        ShapeError, DTypeError
            A tensor does not fit.
        """
        return run_experts(hidden_states, top_k_index, top_k_weights, self._weights.number)

    def extra_repr(self) -> str:
        """Return sizes, types and bytes."""
        stack, weights = self.stack, self._weights
        pooled = ""
        if isinstance(weights, PooledExperts):
            pooled = f", {weights.pool.budget} in memory"
        types = ", ".join(f"{role} {quant}" for role, quant in stack.quants.items())
        return (
            f"{stack.num_experts} experts, hidden_size={stack.hidden_size},"
            f" intermediate_size={stack.intermediate_size}, {types},"
            f" {self.activation.kind}, {stack.nbytes / 2**20:.1f} MiB{pooled}"
        )

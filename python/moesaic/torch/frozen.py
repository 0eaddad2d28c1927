"""Weights by the numbers that operators know them by.

Operators of torch take tensors and numbers, no objects of Python. So what a module holds has a
number, which a compiled or exported graph carries as a constant.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moesaic import _core
from moesaic._errors import error_of

if TYPE_CHECKING:
    from moesaic._core import _OnMiss

_numbers = itertools.count(1)
_alive: weakref.WeakValueDictionary[int, Frozen] = weakref.WeakValueDictionary()

_F = TypeVar("_F", bound="Frozen")


class Frozen:
    """Weights that no one changes, so that copies of a module share them."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        _alive[self.number] = self

    @property
    def sizes(self) -> dict[str, int]:
        """What other weights must have in common with these to take their place."""
        raise NotImplementedError

    def accepts(self, other: object) -> bool:
        """Whether other weights are of a kind that may take the place of these."""
        return isinstance(other, type(self))

    def __copy__(self: _F) -> _F:
        return self

    def __deepcopy__(self: _F, memo: dict[int, Any]) -> _F:
        return self


def frozen(number: int, kind: type[_F]) -> _F:
    """What has this number. Raises DeviceError where its module is gone."""
    found = _alive.get(number)
    if not isinstance(found, kind):
        raise error_of(
            _core.DeviceError,
            "torch.ops.moesaic",
            "weights",
            "those of a module that is still there",
            f"the number {number}, which none has",
            "a compiled or exported graph needs the model that it was made of, in its process",
        )
    return found


class FrozenExperts(Frozen):
    """A stack of experts, what happens between its products, and how often each was used."""

    def __init__(
        self,
        stack: _core.ExpertStack,
        activation: _core.Activation,
        precision: str | None,
    ) -> None:
        super().__init__()
        self.stack, self.activation, self.precision = stack, activation, precision
        # A pool of all experts moves nothing; without decay its scores are counts.
        self.uses = _core.ExpertPool(stack.num_experts, stack.num_experts, decay=1.0)

    @property
    def sizes(self) -> dict[str, int]:
        return {"experts": self.stack.num_experts, "hidden_size": self.stack.hidden_size}

    def forward(self, x: Any, routing: _core.Routing, out: Any) -> None:
        """Write what the experts make of rows x [T, H] to ``out``."""
        _core.moe_forward(
            x,
            None,
            self.stack,
            routing=routing,
            activation=self.activation,
            precision=self.precision,  # type: ignore[arg-type]
            out=out,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenExperts, (self.stack, self.activation, self.precision)


def _stack_of(store: _core.MoeExpertStore, block: int) -> _core.ExpertStack:
    """The experts of a block, where the store has them."""
    return {one.layer_index: one.stack for one in store.layers}[block]


class PooledExperts(FrozenExperts):
    """Experts of a store, as many of them in memory as a pool says.

    ``stack`` has all of them as the store has them: gradients decode from there. Of a checkpoint it
    has none, so there are no gradients, and nothing to pickle.
    """

    def __init__(
        self,
        store: _core.MoeExpertStore,
        block: int,
        pool: _core.ExpertPool,
        on_miss: _OnMiss,
        activation: _core.Activation,
        precision: str | None,
    ) -> None:
        stack = _stack_of(store, block)
        super().__init__(stack, activation, precision)
        self.store, self.block, self.pool = store, block, pool
        facts = _core.MoeConfig(
            hidden_size=stack.hidden_size,
            intermediate_size=stack.intermediate_size,
            num_experts=stack.num_experts,
            top_k=1,
            activation=activation,
        )
        # The layer has a router, which no call asks: each comes with its routing.
        router = np.zeros((stack.num_experts, stack.hidden_size), np.float32)
        self.layer = _core.MoeLayer.from_store(
            store, block, pool, on_miss, config=facts, router_weight=router
        )

    def accepts(self, other: object) -> bool:
        return isinstance(other, FrozenExperts)

    def forward(self, x: Any, routing: _core.Routing, out: Any) -> None:
        self.layer(x, routing=routing, precision=self.precision, out=out)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.stack.experts:
            raise error_of(
                _core.UnsupportedError, "pickle", "experts of a store",
                "those of a GGUF file, which run where it is mapped",
                "those of a checkpoint, which are read one by one",
            )  # fmt: skip
        return mapped_experts, (self.store, self.block, self.activation, self.precision)


def mapped_experts(
    store: _core.MoeExpertStore,
    block: int,
    activation: _core.Activation,
    precision: str | None,
) -> FrozenExperts:
    """Experts of a store where they are mapped, which is what pickles of pooled ones hold.

    Whoever loads one says anew how much memory experts may take.
    """
    return FrozenExperts(_stack_of(store, block), activation, precision)


class FrozenLayer(Frozen):
    """A layer with its router."""

    def __init__(self, layer: _core.MoeLayer) -> None:
        super().__init__()
        self.layer = layer

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "experts": self.layer.config.num_experts,
            "hidden_size": self.layer.config.hidden_size,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenLayer, (self.layer,)


class FrozenMatrix(Frozen):
    """One matrix, with its bias."""

    def __init__(self, matrix: _core.QuantMatrix) -> None:
        super().__init__()
        self.matrix, self.rows = matrix, matrix.shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        return {"out_features": self.rows, "in_features": self.matrix.shape[1]}

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMatrix, (self.matrix,)


class FrozenTable(Frozen):
    """The rows of a tensor of a file, which are decoded when they are asked for."""

    def __init__(self, file: _core.GgufFile, name: str) -> None:
        super().__init__()
        self.file, self.name = file, name
        tensor = file.tensors[name]
        self.rows, self.columns = tensor.shape
        self.quant, self.nbytes = tensor.quant, tensor.nbytes
        self.data = tensor.data.reshape(self.rows, -1)  # keeps the file open

    @property
    def sizes(self) -> dict[str, int]:
        return {"num_embeddings": self.rows, "embedding_dim": self.columns}

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenTable, (self.file, self.name)

"""Where the experts of a model lie in its files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .. import _core
from .._errors import error_of

if TYPE_CHECKING:
    from .._offload_store import Source

# One tensor for all experts of a role, or one for each expert.
_STACKED = re.compile(r"blk\.(?P<block>\d+)\.ffn_(gate|up|gate_up|down)_exps\.weight")
_SINGLE = re.compile(r"blk\.(?P<block>\d+)\.ffn_(gate|up|down)\.(?P<expert>\d+)\.weight")


@dataclass(frozen=True)
class Places:
    """The experts of all layers, in the order of a store."""

    paths: list[str]
    layers: list[npt.NDArray[np.int64]]  #: of each, [E, pieces, 3]: file, offset and bytes

    @property
    def expert_bytes(self) -> float:
        """Bytes of an expert as stored, the mean of all."""
        sizes = [layer[:, :, 2].sum(axis=1) for layer in self.layers]
        return float(np.concatenate(sizes).mean())


def places_of(source: Source) -> Places:
    """Return where the experts of a file or a checkpoint are.

    Raises FormatError for a model without.
    """
    if not isinstance(source, _core.GgufFile):
        paths = [path for path, _ in source.files]
        return _checked(Places(paths, [layer["ranges"] for layer in source.layers]), source.name)
    experts: dict[int, dict[int, list[tuple[int, int, int]]]] = {}
    for name, tensor in source.tensors.items():
        stacked, single = _STACKED.fullmatch(name), _SINGLE.fullmatch(name)
        if stacked is not None:
            each = tensor.nbytes // tensor.shape[0]
            block = experts.setdefault(int(stacked["block"]), {})
            for e in range(tensor.shape[0]):
                block.setdefault(e, []).append((tensor.shard, tensor.offset + e * each, each))
        elif single is not None:
            block = experts.setdefault(int(single["block"]), {})
            place = (tensor.shard, tensor.offset, tensor.nbytes)
            block.setdefault(int(single["expert"]), []).append(place)
    layers = [
        np.array([experts[block][e] for e in sorted(experts[block])], np.int64)
        for block in source.moe_layers
    ]
    return _checked(Places(list(source.shard_paths), layers), source.shard_paths[0])


def _checked(places: Places, name: str) -> Places:
    if not places.layers:
        raise error_of(_core.FormatError, "measure_disk", name, "layers with experts", "none")
    return places

"""A file read back before it takes its name: whether it says of its layers what they are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moesaic import _core
from moesaic._errors import error_of
from moesaic._files import shown
from moesaic.saving import names
from moesaic.saving.container import Layout, write_at
from moesaic.saving.facts import first_difference
from moesaic.saving.tensors import Tensor


def check_layers(
    operation: str,
    path: Path,
    layout: Layout,
    tensors: Sequence[Tensor],
    configs: Mapping[int, _core.MoeConfig],
) -> None:
    """Opens the layers of a file that is written but for its data.

    Every tensor must be one that a reader uses, and every configuration come out as it went in.
    Raises UnsupportedError naming what the architecture of the file cannot say.
    """
    with path.open("r+b", buffering=0) as file:
        for tensor in tensors:  # biases are parts of a configuration
            if tensor.name.endswith((names.ROUTER_BIAS, names.SELECTION_BIAS)):
                write_at(file, layout.offsets[tensor.name], [tensor.unit(0)])
    with _core.GgufFile(path) as gguf:
        architecture = gguf.metadata["general.architecture"]
        for block, config in configs.items():
            where = f"block {block}"
            try:
                with _core.MoeLayer.from_gguf(gguf, block, layout="file") as layer:
                    got = layer.config
            except _core.Error as error:
                raise error_of(
                    _core.UnsupportedError, operation, where,
                    f"a layer as architecture {architecture!r} has them",
                    f"one that it does not open: {error}",
                ) from None  # fmt: skip
            difference = first_difference(config, got)
            if difference is not None:
                name, wanted, found = difference
                raise error_of(
                    _core.UnsupportedError, operation, f"{where}: {name}",
                    f"{shown(wanted)}, as the layer has", shown(found),
                    f"architecture {architecture!r} cannot say it; architecture= names another",
                )  # fmt: skip

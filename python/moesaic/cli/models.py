"""What a command opens: a GGUF file, or a checkpoint of safetensors, by the same few questions.

A layer is named by the number of its block in the model, whatever holds it.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import moesaic as mo
from moesaic._errors import error_of
from moesaic._files import printable, snapshot_of
from moesaic._offload_store import Source
from moesaic.safetensors import Checkpoint, CheckpointExperts
from moesaic.safetensors.names import find_block
from moesaic.safetensors.sets import layers_with_experts, of_layer

# Router, experts (stacked, fused, or one tensor per expert), shared experts, projections of latent
# ones and norms of a block.
_GGUF_TENSOR = re.compile(
    r"blk\.(?P<layer>\d+)\."
    r"(?P<role>ffn_gate_inp(_shexp)?|ffn_gate_tid2eid|exp_probs_b(_vl)?"
    r"|ffn_(latent|routed)_(down|up|norm)|ffn_norm_exps|pre_ffw_norm_2"
    r"|ffn_(gate|up|gate_up|down)(_exps|_shexp|_chexps|(?=\.\d+\.)))"
    r"(\.\d+)?(\.(weight|bias|scale|input_scale))?$"
)


@dataclass(frozen=True)
class Tensors:
    """Tensors of one layer that differ in nothing but the number of an expert."""

    layer: int
    name: str  # of the block; the number of an expert is "*"
    shape: tuple[int, ...]
    type: str
    count: int
    nbytes: int  # of all of them


class Model(Protocol):
    """A file or folder with layers."""

    @property
    def path(self) -> str: ...
    @property
    def layers(self) -> list[int]:
        """The blocks with experts."""

    @property
    def nbytes(self) -> int:
        """Of the whole model, as stored."""

    def summary(self) -> str:
        """One line: what it is, and how large."""

    def config(self, layer: int) -> mo.MoeConfig: ...
    def open(self, layer: int, device: str = "cpu") -> mo.MoeLayer: ...
    def source(self) -> Source:
        """What ``open_store`` takes, opened. Raises UnsupportedError for what it cannot read."""

    def tensors(self) -> list[Tensors]:
        """Those of the MoE blocks, layer by layer."""


def _size_text(nbytes: int) -> str:
    from .table import size

    return size(nbytes)


class GgufModel:
    """The layers of a GGUF file."""

    def __init__(self, path: str, file: mo.GgufFile) -> None:
        self.path, self.file = path, file

    @property
    def layers(self) -> list[int]:
        return self.file.moe_layers

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    def summary(self) -> str:
        architecture = self.file.metadata.get("general.architecture", "unknown architecture")
        shards = len(self.file.shard_paths)
        where = f"{shards} shards" if shards > 1 else "1 file"
        count = f"{len(self.layers)} MoE layers"
        return f"{architecture}: {count}, {_size_text(self.nbytes)} in {where}"

    def config(self, layer: int) -> mo.MoeConfig:
        return mo.MoeConfig.from_gguf(self.file, layer)

    def open(self, layer: int, device: str = "cpu") -> mo.MoeLayer:
        return mo.MoeLayer.from_gguf(self.file, layer, device=device)

    def source(self) -> mo.GgufFile:
        return self.file

    def tensors(self) -> list[Tensors]:
        groups: dict[tuple[int, str, tuple[int, ...], str], list[int]] = defaultdict(list)
        for name, tensor in self.file.tensors.items():
            match = _GGUF_TENSOR.match(name)
            if match:
                short = re.sub(r"\.\d+\.", ".*.", name.split(".", 2)[2])
                groups[int(match["layer"]), short, tensor.shape, tensor.quant].append(tensor.nbytes)
        rows = [Tensors(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]
        known = set(self.layers)
        return sorted((r for r in rows if r.layer in known), key=lambda r: r.layer)


class CheckpointModel:
    """The layers of a folder, or of one file, of safetensors."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.checkpoint = Checkpoint(path)
        self._layers: list[int] | None = None

    @property
    def layers(self) -> list[int]:
        if self._layers is None:
            self._layers = layers_with_experts(self.checkpoint)
        return self._layers

    @property
    def nbytes(self) -> int:
        entries = map(self.checkpoint.entry, self.checkpoint.tensors)
        return sum(entry.end - entry.begin for entry in entries)

    def summary(self) -> str:
        config = self.checkpoint.json("config.json") or {}
        kind = printable(str(config.get("model_type", "unknown model type"))[:80])
        files = len({self.checkpoint.entry(name).path for name in self.checkpoint.tensors})
        where = f"{files} files" if files > 1 else "1 file"
        return f"{kind}: {len(self.layers)} MoE layers, {_size_text(self.nbytes)} in {where}"

    def config(self, layer: int) -> mo.MoeConfig:
        return mo.MoeConfig.from_hf(self.checkpoint.folder, layer)

    def open(self, layer: int, device: str = "cpu") -> mo.MoeLayer:
        return mo.MoeLayer.from_safetensors(self.path, layer, device=device)

    def source(self) -> CheckpointExperts:
        return CheckpointExperts(self.path)

    def tensors(self) -> list[Tensors]:
        rows = []
        for layer in self.layers:
            one = of_layer(self.checkpoint, layer)
            block = find_block(one, layer)
            groups: dict[tuple[str, tuple[int, ...], str], list[int]] = defaultdict(list)
            for name in one.tensors:
                if not block.owns(name):
                    continue
                entry = one.entry(name)
                short = re.sub(r"\.\d+\.", ".*.", printable(name.removeprefix(block.stem)))
                groups[short, entry.shape, entry.dtype].append(entry.end - entry.begin)
            rows += [Tensors(layer, *key, len(v), sum(v)) for key, v in groups.items()]
        return rows


@contextlib.contextmanager
def open_model(path: str) -> Iterator[GgufModel | CheckpointModel]:
    """Open a file or folder. Raises FormatError where it has no experts.

    A folder of GGUF files counts as the one model that it holds.
    """
    place = Path(path)
    if place.is_dir():
        place = snapshot_of(place)
        files = sorted(place.glob("*.gguf"))
        if files and not any(place.glob("*.safetensors")):
            path, place = str(files[0]), files[0]
            names = {re.sub(r"-\d{5}-of-\d{5}", "", file.name) for file in files}
            if len(names) > 1:
                shown = ", ".join(sorted(names)[:3])
                raise error_of(
                    mo.FormatError, "open", str(place.parent), "one model", shown,
                    "the path of a file names it",
                )  # fmt: skip
    if place.is_dir() or place.suffix in (".safetensors", ".json"):
        model = CheckpointModel(path)
        _require_layers(model, "layers.N.mlp.experts")
        yield model
        return
    with mo.GgufFile(path) as file:
        gguf = GgufModel(path, file)
        _require_layers(gguf, "blk.N.ffn_down_exps.weight")
        yield gguf


def _require_layers(model: Model, example: str) -> None:
    if not model.layers:
        expected = f"a layer with experts ({example})"
        raise error_of(mo.FormatError, "open", model.path, expected, "none")


def choose_layer(model: Model, wanted: int | None) -> int:
    """Return `wanted`, or the first layer with experts."""
    return model.layers[0] if wanted is None else choose_layers(model, [wanted])[0]


def choose_layers(model: Model, wanted: list[int] | None) -> list[int]:
    """Return those of `wanted`, or all with experts. Raises ShapeError for a block without."""
    layers = model.layers
    if wanted is None:
        return layers
    for layer in wanted:
        if layer not in layers:
            shown = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
            expected = f"one with experts ({shown})"
            raise error_of(mo.ShapeError, "open", "layer", expected, str(layer))
    return sorted(set(wanted))


def config_facts(config: mo.MoeConfig) -> dict[str, Any]:
    """The sizes of a layer, for the JSON of several commands."""
    names = ("architecture", "layer", "hidden_size", "intermediate_size", "num_experts", "top_k")
    return {name: getattr(config, name) for name in names}

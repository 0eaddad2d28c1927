"""A whole layer: router, experts and shared experts as MoeLayer takes them."""

import os
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from moesaic import _core
from moesaic._pickling import CheckpointSource
from moesaic.hf_config import Family, given_facts, layer_facts, section
from moesaic.safetensors.cache import Lookup
from moesaic.safetensors.errors import Progress, as_format_errors, carried
from moesaic.safetensors.experts import (
    Experts,
    gather_all,
    interleaved,
    keep,
    open_experts,
    read_floats,
    recognise,
)
from moesaic.safetensors.names import (
    Block,
    Matrices,
    Matrix,
    check_all_used,
    find_block,
    find_dense,
    values_name,
)
from moesaic.safetensors.quantization import Quantization
from moesaic.safetensors.reader import FLOATS, Array, Checkpoint, wrong
from moesaic.safetensors.sets import of_layer

_ROUTER = (
    "gate.weight", "router.weight", "router.layer.weight", "gate.wg.weight", "router.gate.weight",
    "router.classifier.weight", "router.proj.weight",
)  # fmt: skip
_SELECTION_BIAS = (
    "gate.e_score_correction_bias", "e_score_correction_bias", "expert_bias", "gate.expert_bias",
    "moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias",
    "router.e_score_correction_bias", "experts.e_score_correction_bias", "gate.bias",
)  # fmt: skip
_SHARED = ("shared_experts", "shared_expert", "shared_mlp")


class _Tensors:
    """The tensors of one block that are no experts, and which of them were taken."""

    def __init__(self, checkpoint: Checkpoint, block: Block) -> None:
        self.checkpoint, self.block = checkpoint, block
        self.quantization = Quantization.of(checkpoint)
        self.used: set[str] = set()

    def find(self, *names: str) -> str:
        """The first of these names in the block that is there. Raises FormatError when none is."""
        for name in names:
            full = f"{self.block.name}.{name}"
            if full in self.checkpoint.tensors:
                self.used.add(full)
                return full
        raise wrong(f"tensor '{self.block.name}.{names[0]}'", "to be there", "no such tensor")

    def floats(self, shape: tuple[int, ...], *names: str) -> Array:
        """f32 of ``shape``; the tensor may have sizes of 1 beside."""
        return read_floats(self.checkpoint, self.find(*names), shape)

    def matrix(self, shape: tuple[int, int], *names: str) -> Array:
        """f32 of ``shape``, of a matrix that may be quantised as experts are."""
        for name in names:
            base = f"{self.block.name}.{name.removesuffix('.weight')}"
            found = values_name(self.checkpoint, base)
            if found is None:
                continue
            if self.checkpoint.entry(found).dtype in FLOATS:
                return self.floats(shape, found.removeprefix(f"{self.block.name}."))
            one = recognise(self.checkpoint, Matrix(base, ()), self.quantization, exact=True)
            if (one.n, one.k) != shape:
                raise wrong(f"tensor {found!r} shape", str(list(shape)), [one.n, one.k])
            self.used |= one.tensors()
            values, factor = one.values()
            return np.ascontiguousarray(values * np.float32(factor))
        raise wrong(f"tensor '{self.block.name}.{names[0]}'", "to be there", "no such tensor")


def gather_layer(
    path: str | PathLike[str],
    layer: int,
    progress: Progress | None = None,
    exact: bool = False,
    prefix: str | None = None,
    config: _core.MoeConfig | None = None,
    top_k: int | None = None,
    source: CheckpointSource | None = None,
    kept: list[int] | None = None,
    keep_fp8: bool = True,
    lookup: Lookup | None = None,
) -> dict[str, Any]:
    """The arguments of MoeLayer by name, with stack and shared as ``gather_experts`` gives them.

    ``config`` stands for what config.json says of the layer, ``top_k`` for its experts per token;
    ``source`` notes which files were read, ``kept`` are the experts to read (None: all);
    ``keep_fp8`` and ``lookup`` as for ``gather_experts``. Raises as ``gather_experts`` and
    ``config_from_hf``, and UnsupportedError for a tensor of the block that has no place in the
    layer.
    """
    with as_format_errors(os.fsdecode(path)):
        opened = open_layer(
            Checkpoint(path), layer, exact, prefix, config, top_k,
            source=source, keep_fp8=keep_fp8,
        )  # fmt: skip
        keep(opened.routed, kept)
        both = [opened.routed] if opened.shared is None else [opened.routed, opened.shared]
        stack, *shared = gather_all(both, carried(progress), carried(lookup))
        return {**opened.arguments, "stack": stack, "shared": shared[0] if shared else None}


@dataclass(frozen=True)
class OpenedLayer:
    """A layer whose experts are checked and not read yet."""

    routed: Experts
    shared: Experts | None
    #: The other arguments of MoeLayer, by name.
    arguments: dict[str, Any]


def open_layer(
    checkpoint: Checkpoint,
    layer: int,
    exact: bool = False,
    prefix: str | None = None,
    config: _core.MoeConfig | None = None,
    top_k: int | None = None,
    keep_int4: bool = True,
    source: CheckpointSource | None = None,
    keep_fp8: bool = True,
) -> OpenedLayer:
    """Checks the tensors of a layer, and reads those that are no experts.

    Without ``keep_int4`` INT4 experts are rows of GGUF types too; ``keep_fp8`` as for
    ``gather_experts``. Raises as ``gather_layer``.
    """
    checkpoint = of_layer(checkpoint, layer, prefix)
    if source is not None:
        source.note(checkpoint)
    facts, family = _facts(checkpoint, layer, prefix, config)
    if top_k is not None:
        router = facts.router.replace(top_k=top_k)
        facts = facts.replace(top_k=top_k, router=router)
    return _open(checkpoint, layer, facts, family, exact, keep_int4, keep_fp8)


def _facts(
    checkpoint: Checkpoint, layer: int, prefix: str | None, config: _core.MoeConfig | None
) -> tuple[_core.MoeConfig, Family]:
    """What config.json says, or the caller instead, and how the model lays its tensors out."""
    source = checkpoint.json("config.json")
    if config is not None:
        return config, given_facts(section(source, prefix))
    if source is None:
        raise wrong(
            str(checkpoint.folder), "config.json beside the tensors", "none",
            "config= says it instead",
        )  # fmt: skip
    return layer_facts(section(source, prefix), layer, is_part=prefix is not None)


def _open(
    checkpoint: Checkpoint,
    layer: int,
    config: _core.MoeConfig,
    family: Family,
    exact: bool,
    keep_int4: bool,
    keep_fp8: bool,
) -> OpenedLayer:
    block = find_block(checkpoint, layer)
    if block.num_experts != config.num_experts:
        raise wrong(f"{block.name} experts", str(config.num_experts), block.num_experts)
    tensors = _Tensors(checkpoint, block)
    routed = open_experts(
        checkpoint, block.matrices, tensors.quantization, exact, interleaved(family, block),
        keep_int4, keep_fp8,
    )  # fmt: skip
    tensors.used |= routed.tensors()
    _check_sizes(
        routed, block.matrices, config.latent_size or config.hidden_size, config.intermediate_size
    )
    if family.output_scale:
        routed.scale_outputs(tensors.floats((config.num_experts,), family.output_scale))
    shared = _open_shared(config, tensors, exact, keep_int4, keep_fp8)
    arguments: dict[str, Any] = {
        "config": config.replace(router=_router(config, family, tensors)),
        "router_weight": tensors.matrix((config.router.num_experts, config.hidden_size), *_ROUTER),
        "shared_gate": None,
        "latent": _latent(config, tensors),
        **_norms(config, family, tensors),
        "token_experts": _token_experts(config, tensors),
    }
    if config.shared == "sigmoid_gated":
        gate = tensors.matrix((1, config.hidden_size), "shared_expert_gate.weight")
        arguments["shared_gate"] = gate.reshape(-1)
    check_all_used(checkpoint, filter(block.owns, checkpoint.tensors), tensors.used)
    return OpenedLayer(routed, shared, arguments)


def _router(config: _core.MoeConfig, family: Family, tensors: _Tensors) -> _core.RouterConfig:
    """The router with the biases that its family has."""

    def bias(use: str, names: tuple[str, ...]) -> list[float]:
        there = any(f"{tensors.block.name}.{name}" in tensors.checkpoint.tensors for name in names)
        if use == "ignored" or (use == "optional" and not there):
            return []
        values: list[float] = tensors.floats((config.router.num_experts,), *names).tolist()
        return values

    given = config.router.select_on == "given"
    return config.router.replace(
        router_bias=bias(family.facts["router_bias"], ("router.bias",)),
        selection_bias=bias(
            "ignored" if given else family.facts["selection_bias"], _SELECTION_BIAS
        ),
    )


def _open_shared(
    config: _core.MoeConfig, tensors: _Tensors, exact: bool, keep_int4: bool, keep_fp8: bool
) -> Experts | None:
    if config.shared == "none":
        return None
    block = tensors.block
    matrices = find_dense(
        tensors.checkpoint,
        [start + name for start in (f"{block.name}.", block.stem) for name in _SHARED],
    )
    if matrices is None:
        raise wrong(f"tensor '{block.name}.{_SHARED[0]}.*'", "to be there", "no such tensor")
    shared = open_experts(
        tensors.checkpoint, matrices, tensors.quantization, exact, False, keep_int4, keep_fp8
    )
    tensors.used |= shared.tensors()
    start = matrices["down",][0].base.rpartition(".")[0]
    names = [name for name in tensors.checkpoint.tensors if name.startswith(f"{start}.")]
    check_all_used(tensors.checkpoint, names, tensors.used)
    _check_sizes(shared, matrices, config.hidden_size, config.shared_intermediate_size)
    return shared


def _latent(config: _core.MoeConfig, tensors: _Tensors) -> tuple[Array, Array] | None:
    """The projections into the space of the experts and back."""
    if not config.latent_size:
        return None
    latent, hidden = config.latent_size, config.hidden_size
    return (
        tensors.matrix((latent, hidden), "fc1_latent_proj.weight"),
        tensors.matrix((hidden, latent), "fc2_latent_proj.weight"),
    )


def _norms(config: _core.MoeConfig, family: Family, tensors: _Tensors) -> dict[str, Array]:
    """The weights of the norms that are inside the block."""
    found: dict[str, Array] = {}
    if family.input_norm:
        found["input_norm"] = tensors.floats((config.hidden_size,), family.input_norm)
    if family.router_norm:
        scale = tensors.floats((config.hidden_size,), family.router_norm)
        found["router_norm"] = scale * np.float32(config.hidden_size**-0.5)
    return found


def _token_experts(config: _core.MoeConfig, tensors: _Tensors) -> Array | None:
    """The experts of each token, where the layer routes by them."""
    if not config.vocab_size:
        return None
    name = tensors.find("gate.tid2eid")
    table = tensors.checkpoint.read(name, ("I64", "I32"), (config.vocab_size, config.top_k))
    outside = (table < 0) | (table >= config.router.num_experts)
    if outside.any():
        raise wrong(
            f"tensor {name!r}",
            f"experts of 0 to {config.router.num_experts - 1}",
            table[outside][0],
        )
    return table.astype(np.int32)


def _check_sizes(experts: Experts, matrices: Matrices, hidden: int, intermediate: int) -> None:
    found = [experts.hidden_size, experts.intermediate_size]
    if found != [hidden, intermediate]:
        base = matrices["down",][0].base
        raise wrong(
            f"tensor '{base}' [H, I]", f"{[hidden, intermediate]}, as config.json says", found
        )

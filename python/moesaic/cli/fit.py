"""``moesaic fit FILE --memory 64GiB``: what of a model fits, in which layout, before loading it.

Sizes in memory are measured: a few experts of zeros, of each layer's sizes and types, are made as
a load makes them. Nothing of the file but its index is read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

import moesaic as mo

from .models import Tensors, choose_layers, open_model
from .options import add_json, add_model, integer, integers, memory
from .table import filled, size, table

HEADER = ("layers", "experts", "types", "as stored", "repacked", "other parts")
LEGEND = """\
as stored, repacked: experts of one of these layers, with layout="file" and layout="auto". other
parts: router, shared experts and norms of one. Attention and the rest of a model come on top."""

#: Experts of zeros that are made at most, in bytes.
_MOST = 512 << 20
_ROLES: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")
_DENSE = {"F32": 4, "F16": 2, "BF16": 2}
_EXPERTS = re.compile(
    r"(?:ffn_(?P<ggml>gate_up|gate|up|down)(?:_exps|\.\*)\b"
    r"|experts\..*?(?P<hf>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)\b"
    r"|(?P<linear>input_linear|output_linear)\b)"
)
_PARTS: dict[str, tuple[str, ...]] = {
    "gate_up": ("gate", "up"), "gate": ("gate",), "up": ("up",), "down": ("down",),
    "gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",),
    "down_proj": ("down",), "w1": ("gate",), "w3": ("up",), "w2": ("down",),
    "input_linear": ("gate", "up"), "output_linear": ("down",),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What layers of equal size have in common; bytes are of one layer."""

    num_experts: int
    top_k: int
    types: str  # of gate, up and down
    stored: int
    repacked: int
    other: int
    workspace: int
    exact: bool  # whether the experts in memory were measured; else they count as they are stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--memory", type=memory, help="such as 64GiB (default: what this machine has available)"
    )
    parser.add_argument("--reserve", type=memory, default=0, help="of that for everything else")
    parser.add_argument(
        "--tokens", type=integer(1), default=512, help="of the largest call (default: 512)"
    )
    parser.add_argument(
        "--layers", type=integers(0), metavar="N,N", help="of these blocks (default: all)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda:N or metal")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    with open_model(options.file) as model:
        layers = choose_layers(model, options.layers)
        tensors: dict[int, list[Tensors]] = {layer: [] for layer in layers}
        for one in model.tensors():
            if one.layer in tensors:
                tensors[one.layer].append(one)
        kinds: dict[Kind, list[int]] = {}
        measured: dict[tuple[Any, ...], tuple[int, int, int] | None] = {}
        for layer in layers:
            kind = kind_of(model.config(layer), tensors[layer], options, measured)
            kinds.setdefault(kind, []).append(layer)
        summary = model.summary()
    total = available() if options.memory is None else options.memory
    found = verdict(kinds, max(total - options.reserve, 0))
    if options.json:
        rows = [{"layers": layers, **asdict(kind)} for kind, layers in kinds.items()]
        print(json.dumps({"path": options.file, "kinds": rows, **found}, indent=2))
    else:
        print(summary)
        print()
        print(table(HEADER, [cells(k, n) for k, n in kinds.items()], left=("experts", "types")))
        print()
        print(filled(LEGEND))
        print()
        print("\n".join(map(filled, lines(found, options.tokens))))
    return 0 if found["layout"] in ("auto", "file") else 1


def available() -> int:
    """Return the bytes of memory that this machine could give now."""
    try:
        with open("/proc/meminfo", encoding="ascii") as info:  # noqa: PTH123
            return next(int(l.split()[1]) << 10 for l in info if l.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kind_of(
    config: mo.MoeConfig,
    tensors: list[Tensors],
    options: argparse.Namespace,
    measured: dict[tuple[Any, ...], tuple[int, int, int] | None],
) -> Kind:
    """Return the sizes of a layer; `measured` keeps those of types and sizes seen before."""
    types: dict[str, str] = {}
    stored = other = 0
    for one in tensors:
        part = _EXPERTS.search(one.name)
        if part is not None and "shexp" not in one.name and "shared" not in one.name:
            stored += one.nbytes
            if not one.name.endswith((".bias", ".scale")) and "scale" not in one.name:
                for role in _PARTS[part["ggml"] or part["hf"] or part["linear"]]:
                    types.setdefault(role, one.type)
        else:
            # Routers and norms are read as f32, shared experts as they are.
            shared = "sh" in one.name and one.name.count("_") > 1
            elements = one.count * int(np.prod(one.shape, dtype=np.int64))
            other += one.nbytes if shared else 4 * elements
    key = (tuple(types.items()), config.hidden_size, config.latent_size, config.intermediate_size,
           config.top_k)  # fmt: skip
    if key not in measured:
        measured[key] = measure(config, types, options.tokens, options.device)
    found = measured[key]
    file_bytes, auto_bytes, workspace = found or (0, 0, 0)
    return Kind(
        config.num_experts,
        config.top_k,
        " ".join(types.get(role, "-") for role in _ROLES),
        file_bytes * config.num_experts if found else stored,
        auto_bytes * config.num_experts if found else stored,
        other,
        workspace,
        found is not None,
    )


def measure(
    config: mo.MoeConfig, types: dict[str, str], tokens: int, device: str
) -> tuple[int, int, int] | None:
    """Return bytes of an expert in both layouts, and of a workspace; None for other encodings."""
    facts = mo.testing.quant_types()
    if any(not facts.get(t, {}).get("decodes") for t in types.values()) or "down" not in types:
        return None
    width, inner = config.latent_size or config.hidden_size, config.intermediate_size
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    row_bytes = {}
    for role, name in types.items():
        columns = shapes[role][1]
        if columns % facts[name]["block_elems"]:
            return None
        row_bytes[role] = columns // facts[name]["block_elems"] * facts[name]["block_bytes"]
    expert = sum(shapes[role][0] * row_bytes[role] for role in types)
    count = config.top_k if config.top_k * expert <= _MOST else 1

    def role_argument(role: str) -> Any:
        if role not in types:
            return None
        rows = shapes[role][0]
        data = np.zeros((count, rows, row_bytes[role]), np.uint8)
        return data, types[role], (count, *shapes[role])

    roles = [role_argument(role) for role in _ROLES]
    stacks = {
        layout: mo.ExpertStack.from_encoded(*roles, device=device, layout=layout)
        for layout in ("file", "auto")
    }
    layer = mo.MoeLayer(
        stacks["auto"],
        mo.MoeConfig(width, inner, count, count, activation=config.activation),
        np.zeros((count, width), np.float32),
    )
    # One expert in place of top_k has as many pairs at more tokens, which takes a little more.
    with layer:
        calls = tokens * (config.top_k // count)
        workspace = mo.Workspace.for_layer(layer, calls).nbytes
    return stacks["file"].nbytes // count, stacks["auto"].nbytes // count, workspace


def verdict(kinds: dict[Kind, list[int]], memory: int) -> dict[str, Any]:
    """Return the sums, and what fits into `memory`."""
    stored = sum(kind.stored * len(layers) for kind, layers in kinds.items())
    repacked = sum(kind.repacked * len(layers) for kind, layers in kinds.items())
    other = sum(kind.other * len(layers) for kind, layers in kinds.items())
    workspace = max(kind.workspace for kind in kinds)
    sums = {"stored": stored, "repacked": repacked, "other": other, "workspace": workspace}
    fixed = other + workspace
    found: dict[str, Any] = {**sums, "memory": memory}
    for layout, experts in (("auto", repacked), ("file", stored)):
        if experts + fixed <= memory:
            return {**found, "layout": layout, "left": memory - experts - fixed}
    one_each = sum(-(-kind.stored // kind.num_experts) * len(n) for kind, n in kinds.items())
    most = max(kind.num_experts for kind in kinds)
    budget = max(memory - fixed, 0) // max(one_each, 1)
    return {**found, "layout": "pools" if budget > 0 else "none", "budget": budget, "of": most}


def lines(found: dict[str, Any], tokens: int) -> list[str]:
    """The verdict as text."""
    parts = [
        f"other parts {size(found['other'])}",
        f"workspace of {tokens} tokens {size(found['workspace'])}",
    ]
    head = [
        f"experts as stored {size(found['stored'])}, repacked {size(found['repacked'])}; "
        + "; ".join(parts),
    ]
    memory = size(found["memory"])
    layout = found["layout"]
    if layout == "auto":
        text = f'{memory} hold all layers, repacked (layout="auto"); {size(found["left"])} are left'
    elif layout == "file":
        text = (
            f'{memory} hold all layers as stored (layout="file"), not repacked; '
            f"{size(found['left'])} are left"
        )
    elif layout == "pools":
        text = (
            f"{memory} do not hold all layers; they hold about {found['budget']} of {found['of']}"
            " experts a layer, and open_store reads the others when they are needed: moesaic"
            " simulate-offload says how fast"
        )
    else:
        text = f"{memory} hold no expert of each layer"
    return [*head, text]


def cells(kind: Kind, layers: list[int]) -> list[str]:
    """Return one row of the table."""
    about = "" if kind.exact else "about "
    return [
        ranges(layers),
        f"{kind.num_experts}, top {kind.top_k}",
        kind.types,
        size(kind.stored),
        about + size(kind.repacked),
        size(kind.other),
    ]


def ranges(numbers: list[int]) -> str:
    """Return "0-3, 7"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

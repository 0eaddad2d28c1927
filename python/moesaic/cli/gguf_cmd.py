"""``moesaic gguf FILE``: the MoE layers of a file, their tensors, types and bytes."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict

import moesaic as mo
from moesaic.saving.names import MOE_TENSOR

from .table import size, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file, or any of its shards")


def run(options: argparse.Namespace) -> int:
    with mo.GgufFile(options.file) as file:
        layers = file.moe_layers
        if not layers:
            raise mo.FormatError(
                f"{options.file}: expected expert tensors (blk.N.ffn_down_exps.weight), "
                f"got {len(file.tensors)} tensors and none of them"
            )
        print(summary(file))
        print()
        print(table(HEADER, layer_rows(file), left=("tensor", "shape", "type")))
    return 0


HEADER = ("layer", "tensor", "shape", "type", "count", "bytes")


def summary(file: mo.GgufFile) -> str:
    """Return one line: architecture, MoE layers, size."""
    architecture = file.metadata.get("general.architecture", "unknown architecture")
    layers = file.moe_layers
    shards = len(file.shard_paths)
    where = f"{shards} shards" if shards > 1 else "1 file"
    return f"{architecture}: {len(layers)} MoE layers, {size(file.nbytes)} in {where}"


def layer_rows(file: mo.GgufFile) -> list[list[str]]:
    """Return table rows: each tensor of each MoE layer, and the layer's bytes."""
    groups: dict[tuple[int, str, tuple[int, ...], str], list[int]] = defaultdict(list)
    for name, tensor in file.tensors.items():
        match = MOE_TENSOR.match(name)
        if match:
            short = re.sub(r"\.\d+\.", ".*.", name.split(".", 2)[2])
            groups[int(match["layer"]), short, tensor.shape, tensor.quant].append(tensor.nbytes)
    rows: list[list[str]] = []
    for layer in file.moe_layers:
        total = 0
        first = True
        for (at, name, shape, quant), sizes in groups.items():
            if at == layer:
                shape_text = " x ".join(map(str, shape))
                label = str(layer) if first else ""
                rows.append([label, name, shape_text, quant, str(len(sizes)), size(sum(sizes))])
                total += sum(sizes)
                first = False
        rows.append(["", "sum", "", "", "", size(total)])
    return rows

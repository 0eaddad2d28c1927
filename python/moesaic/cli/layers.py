"""``moesaic layers FILE``: the MoE layers of a model, their tensors, types and bytes."""

from __future__ import annotations

import argparse
import dataclasses
import json

from .models import Model, Tensors, open_model
from .options import add_json, add_model
from .table import size, table

HEADER = ("layer", "tensor", "shape", "type", "count", "bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    with open_model(options.file) as model:
        if options.json:
            print(json.dumps(facts(model), indent=2))
            return 0
        print(model.summary())
        print()
        print(table(HEADER, layer_rows(model.tensors()), left=("tensor", "shape", "type")))
    return 0


def facts(model: Model) -> dict[str, object]:
    """The JSON form."""
    return {
        "path": model.path,
        "bytes": model.nbytes,
        "layers": model.layers,
        "tensors": [dataclasses.asdict(tensors) for tensors in model.tensors()],
    }


def layer_rows(tensors: list[Tensors]) -> list[list[str]]:
    """Return table rows: each tensor of each MoE layer, and the layer's bytes."""
    rows: list[list[str]] = []
    for layer in dict.fromkeys(t.layer for t in tensors):
        here = [t for t in tensors if t.layer == layer]
        for i, t in enumerate(here):
            shape = " x ".join(map(str, t.shape))
            label = str(layer) if i == 0 else ""
            rows.append([label, t.name, shape, t.type, str(t.count), size(t.nbytes)])
        rows.append(["", "sum", "", "", "", size(sum(t.nbytes for t in here))])
    return rows

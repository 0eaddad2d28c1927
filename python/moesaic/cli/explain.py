"""``moesaic explain FILE --layer N --tokens 1,8,512``: how the layer would run, and why."""

from __future__ import annotations

import argparse

import moesaic as mo

from .table import pairs


def token_counts(text: str) -> list[int]:
    """Parse "1,8,512"."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise argparse.ArgumentTypeError(f"expected token counts such as 1,8,512, got {text!r}")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file, or any of its shards")
    parser.add_argument("--layer", type=int, help="block number (default: the first with experts)")
    parser.add_argument("--tokens", type=token_counts, default=[1, 8, 512], help="default: 1,8,512")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda:N or metal")


def run(options: argparse.Namespace) -> int:
    with mo.GgufFile(options.file) as file:
        layer_index = first_layer(file, options.layer)
        with mo.MoeLayer.from_gguf(file, layer_index, device=options.device) as layer:
            print(f"{options.file}, layer {layer_index}")
            for role in layer.report.roles:
                kept = role.kept if role.kept == role.stored else f"{role.stored} -> {role.kept}"
                reason = f" ({role.reason})" if role.reason else ""
                print(f"  {role.role}: {kept}, {role.decision}{reason}")
            for tokens in options.tokens:
                print(f"\n{tokens} token{'' if tokens == 1 else 's'}")
                facts = mo.explain(layer, num_tokens=tokens)
                print("  " + pairs(list(facts.items())).replace("\n", "\n  "))
    return 0


def first_layer(file: mo.GgufFile, wanted: int | None) -> int:
    """Return `wanted`, or the first layer with experts."""
    layers = file.moe_layers
    if not layers:
        raise mo.FormatError(f"{file.path}: expected a layer with experts, got none")
    if wanted is None:
        return layers[0]
    if wanted not in layers:
        shown = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
        raise mo.ShapeError(f"--layer: expected a layer with experts ({shown}), got {wanted}")
    return wanted

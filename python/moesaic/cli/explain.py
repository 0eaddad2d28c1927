"""``moesaic explain FILE --layer N --tokens 1,8,512``: how the layer would run, and why."""

from __future__ import annotations

import argparse
import json

import moesaic as mo

from .models import choose_layer, config_facts, open_model
from .options import add_json, add_layer, add_model, integers
from .table import pairs

ROLE_FACTS = ("role", "stored", "kept", "decision", "reason", "nbytes", "source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_layer(parser)
    parser.add_argument("--tokens", type=integers(0), default=[1, 8, 512], help="default: 1,8,512")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda:N or metal")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    with open_model(options.file) as model:
        index = choose_layer(model, options.layer)
        with model.open(index, options.device) as layer:
            calls = {tokens: mo.explain(layer, num_tokens=tokens) for tokens in options.tokens}
            if options.json:
                print(json.dumps(facts(options.file, layer, calls), indent=2))
                return 0
            print(f"{options.file}, layer {index}")
            for role in layer.report.roles:
                kept = role.kept if role.kept == role.stored else f"{role.stored} -> {role.kept}"
                reason = f" ({role.reason})" if role.reason else ""
                print(f"  {role.role}: {kept}, {role.decision}{reason}")
            for tokens, found in calls.items():
                print(f"\n{tokens} token{'' if tokens == 1 else 's'}")
                print("  " + pairs(list(found.items())).replace("\n", "\n  "))
    return 0


def facts(path: str, layer: mo.MoeLayer, calls: dict[int, mo.Facts]) -> dict[str, object]:
    """The JSON form."""
    return {
        "path": path,
        **config_facts(layer.config),
        "roles": [{name: getattr(r, name) for name in ROLE_FACTS} for r in layer.report.roles],
        "calls": [{**found, "tokens": tokens} for tokens, found in calls.items()],
    }

"""``moesaic info [--json]``: what this build can do on this machine, and how it is configured."""

from __future__ import annotations

import argparse
import json
import platform
import textwrap
from collections import defaultdict
from typing import Any

import moesaic as mo

from .options import add_json
from .table import pairs, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Return everything as plain data; the JSON form is this."""
    return {
        "version": mo.__version__,
        "build": mo.build_info(),
        "python": platform.python_version(),
        "backends": [
            {
                "name": backend.name,
                "available": backend.available,
                "reason": backend.reason,
                "devices": backend.devices,
                "detail": backend.detail,
                "kernels": [
                    {key: getattr(k, key) for key in ("operation", "type", "layout", "isa", "name")}
                    for k in backend.kernels
                ],
            }
            for backend in mo.backends()
        ],
        "architectures": mo.known_architectures(),
        "config": [
            {key: getattr(e, key) for key in ("knob", "variable", "value", "source", "help")}
            for e in mo.show_config()
        ],
    }


def render(facts: dict[str, Any]) -> str:
    """Return the text form."""
    build = [("python", facts["python"]), *facts["build"].items()]
    build.append(("architectures", ", ".join(facts["architectures"])))
    sections = [pairs(build), "Backends\n" + backend_lines(facts["backends"])]
    for backend in facts["backends"]:
        if backend["kernels"]:
            sections.append(f"Kernels of {backend['name']}\n" + kernel_table(backend["kernels"]))
    columns = ("knob", "variable", "value", "source")
    rows = [[entry[c] for c in columns] for entry in facts["config"]]
    sections.append("Configuration\n" + table(columns, rows, left=columns))
    return "\n\n".join(sections)


def backend_lines(backends: list[dict[str, Any]]) -> str:
    """Return one line per backend: devices and detail, or why it is absent."""
    lines = []
    for backend in backends:
        if backend["available"]:
            state = "available: " + ", ".join([*backend["devices"], backend["detail"]]).rstrip(", ")
        else:
            state = "absent: " + backend["reason"]
        lines.append((backend["name"], state))
    return pairs(lines)


def kernel_table(kernels: list[dict[str, str]]) -> str:
    """Return one row for all kernels that cover the same quant types."""
    types: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for kernel in kernels:
        types[kernel["operation"], kernel["layout"], kernel["isa"]].append(kernel["type"])
    groups: dict[tuple[str, str], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for (operation, layout, isa), names in types.items():
        layouts, isas = groups[operation, " ".join(dict.fromkeys(names))]
        layouts.append(layout)
        isas.append(isa)
    lines: list[tuple[str, str]] = []
    for (operation, covered), (layouts, isas) in groups.items():
        first, *rest = textwrap.wrap(covered, 80)
        lines += [
            (operation, f"isa {', '.join(dict.fromkeys(isas))}"),
            ("", f"layout {', '.join(dict.fromkeys(layouts))}"),
            ("", f"types {first}"),
            *(("", f"      {line}") for line in rest),
        ]
    return pairs(lines)

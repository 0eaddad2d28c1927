"""``moesaic bench --model``: a whole model of a GGUF file in several engines."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import moesaic as mo
from moesaic._errors import error_of

from .bench import peers_of
from .table import filled, table
from .whole import place_of, quiet, require_packages

#: Options of layers, which say nothing of a model, and what they are when nobody gives them.
_OF_LAYERS = {
    "device": "cpu", "precision": ["auto"], "busy": False, "plot": None, "compare": None,
    "shape": None, "seconds": 1.0,
}  # fmt: skip
#: Those of the model that is made for this.
_OF_MADE = ("layers", "gate_up_type", "down_type")


def run(options: argparse.Namespace) -> int:
    require_packages("bench", "torch", "transformers")
    _check(options)
    from ..bench import whole_models, whole_report
    from ..bench.whole_file import NAME, WholeShape, write_whole_gguf

    measured = whole_models.WholeOptions(
        threads=options.threads[0] if options.threads else _processors(),
        peers=peers_of(options.peers, dict.fromkeys(whole_models.PEERS)),
        prompt=options.tokens[0] if options.tokens else whole_models.WholeOptions.prompt,
        rounds=options.rounds,
    )
    with quiet():
        if options.model:
            result = whole_models.run_whole(Path(options.model), measured)
        else:
            asked = {name: getattr(options, name) for name in _OF_MADE}
            shape = WholeShape(**{k: v for k, v in asked.items() if v is not None})
            if measured.prompt + measured.new >= shape.context:
                raise _wrong(
                    "--tokens", f"at most {shape.context - measured.new - 1}", measured.prompt
                )
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.gguf"
                write_whole_gguf(path, shape)
                result = whole_models.run_whole(path, measured, shape.config(), NAME)
    print(filled(whole_report.about(result)))
    print(table(whole_report.HEADER, whole_report.rows(result), left=("engine",)))
    print("of a forward alone: no word is chosen")
    if options.markdown:
        print(f"\n{whole_report.markdown(result)}")
    _save(result, options.json)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that a model has no use for."""
    for name, default in _OF_LAYERS.items():
        if getattr(options, name) != default:
            raise _wrong(f"--{name}", "none beside --model", getattr(options, name))
    if options.model:
        for name in _OF_MADE:
            if getattr(options, name) is not None:
                expected = "none beside a file, which has its own"
                raise _wrong(f"--{name.replace('_', '-')}", expected, getattr(options, name))
        if not place_of(options.model).gguf:
            raise _wrong("--model", "a GGUF file, which all engines open", options.model)
    for name in ("tokens", "threads"):
        values = getattr(options, name)
        if values is not None and len(values) > 1:
            raise _wrong(f"--{name}", "one number beside --model", ",".join(map(str, values)))


def _wrong(what: str, expected: str, got: object) -> mo.ConfigError:
    return error_of(mo.ConfigError, "bench", what, expected, str(got))


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _save(result: dict[str, Any], path: str | None) -> None:
    if path is None:
        return
    text = json.dumps(result, indent=1) + "\n"
    if path == "-":
        print(text, file=sys.__stdout__, end="")
        return
    place = Path(path)
    if place.is_dir():
        place = place / f"{result['date']}.json"
    place.write_text(text, encoding="utf-8")

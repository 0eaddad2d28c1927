"""``moesaic cache FOLDER``: whether files of repacked weights are still what was written.

Loads look at the heads of such files alone. This reads all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import moesaic as mo
from moesaic import _core
from moesaic._errors import error_of

from .options import add_json
from .table import table

#: What files of a cache are called.
_FILES = "*.panels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", help="one that weight_cache= made: model.gguf.panels, checkpoint/moesaic.panels"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(folder))
    files = sorted(path for path in folder.glob(_FILES) if path.is_file())
    if not files:
        raise error_of(
            mo.FormatError, "cache", str(folder), f"files {_FILES}", "none",
            "that of model.gguf is model.gguf.panels, that of a checkpoint moesaic.panels in it",
        )  # fmt: skip
    check = _core._check_cached  # type: ignore[attr-defined]
    rows = [(path.name, path.stat().st_size, check(path)) for path in files]
    bad = sum(bool(wrong) for _, _, wrong in rows)
    if options.json:
        entries = [{"name": n, "bytes": size, "wrong": wrong or None} for n, size, wrong in rows]
        print(json.dumps({"folder": str(folder), "files": entries}, indent=2))
        return 1 if bad else 0
    lines = [(name, f"{size:,}", wrong or "good") for name, size, wrong in rows]
    print(table(["file", "bytes", "state"], lines, ["state"]))
    total = sum(size for _, size, _ in rows)
    print(f"\n{len(rows)} files, {total:,} bytes, {bad} of them bad")
    return 1 if bad else 0

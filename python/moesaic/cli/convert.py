"""``moesaic convert SRC DST --experts Q4_K``: a GGUF file with the experts in other types."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import moesaic as mo
from moesaic.saving.convert import Types, planned, write_plan

from .options import add_json, integer
from .table import size

DESCRIPTION = """\
Write a GGUF file with the experts of a checkpoint folder or of another GGUF file in other types.

From a GGUF file everything else is copied as it is, metadata too (--other omit: only the MoE layers
are written). From a checkpoint folder the MoE layers are written, with routers, shared experts and
what else they have, and nothing of the rest of the model: no attention, no embeddings, no
tokenizer. Such a file says so in its metadata (moesaic.content = moe_layers). --other copy adds the
tensors of the rest under their names in GGUF (moesaic.content = tensors), for the architectures
whose tensors llama.cpp's converter only renames: qwen2moe, qwen3moe, olmoe. A tokenizer and keys of
the attention have no place in a checkpoint's tensors, so that such a file is no whole model either.
"""
EPILOG = """\
Memory: a matrix of some experts at a time. The file grows beside DST (.DST.partial, with a journal)
and takes its name when it is whole; --resume goes on where a conversion ended that was killed, that
Ctrl-C ended or for which the disk was too small, and gives the same bytes.
"""


def layer_numbers(text: str) -> list[int]:
    """Parse "0-3,7"."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [first, last] if dash else [first, first]
        if not all(end.isdecimal() and len(end) < 8 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"expected layers such as 0-3,7, got {text!r}")
        numbers += range(int(ends[0]), int(ends[1]) + 1)
    return numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, or a GGUF file")
    parser.add_argument("target", metavar="DST", help="the GGUF file to write")
    parser.add_argument("--experts", metavar="TYPE", help="type of all expert matrices, as Q4_K")
    for role in ("gate", "up", "down"):
        parser.add_argument(f"--{role}", metavar="TYPE", help=f"type of the {role} matrices")
    parser.add_argument(
        "--layers",
        type=layer_numbers,
        help="layers to convert, as 0-3,7 (default: all); others are copied from a GGUF file, and "
        "left out from a folder or with --other omit",
    )
    parser.add_argument(
        "--other",
        choices=("copy", "omit"),
        help="tensors beside the MoE layers (default: copy from a GGUF file, omit from a folder)",
    )
    parser.add_argument(
        "--architecture", help="GGUF architecture of the file, from a folder (default: its model's)"
    )
    parser.add_argument(
        "--imatrix",
        metavar="FILE",
        help="importance matrix for the encoders, as llama-imatrix writes it (GGUF or .dat)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with what is there")
    parser.add_argument("--overwrite", action="store_true", help="replace DST")
    parser.add_argument(
        "--threads", type=integer(1, 4096), help="default: all CPUs of this process"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    types = Types(options.experts, options.gate, options.up, options.down)
    target = Path(options.target)
    try:
        with planned(
            options.source,
            types,
            options.layers,
            options.other,
            options.architecture,
            options.imatrix,
        ) as plan:
            importances = plan.importances
            if importances is not None and not options.json:
                # Before the work, which may take hours.
                print("\n".join(importances.report()), file=sys.stderr)
            write_plan(
                plan,
                target,
                resume=options.resume,
                overwrite=options.overwrite,
                progress=sys.stderr.isatty() and not options.quiet,
                threads=options.threads,
            )
    except KeyboardInterrupt:
        print(f"moesaic convert: {target}: interrupted; --resume goes on", file=sys.stderr)
        return 130
    with mo.GgufFile(target) as file:
        layers, nbytes = file.moe_layers, file.nbytes
    if options.json:
        facts = {"path": str(target), "layers": layers, "bytes": nbytes}
        if importances is not None:
            facts["imatrix"] = importances.facts()
        print(json.dumps(facts, indent=2))
    else:
        print(f"{target}: {len(layers)} MoE layers, {size(nbytes)}")
    return 0

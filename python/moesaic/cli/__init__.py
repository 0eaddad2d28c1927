"""The command line: ``moesaic demo | info | layers | explain | ...`` (also ``python -m moesaic``).

Each command is a module with ``add_arguments(parser)`` and ``run(options) -> exit status``.
Results go to stdout, errors as one line to stderr with exit status 2.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("demo", "run every path of one layer and check it against the reference"),
    "info": ("info", "version, instruction sets, backends, kernels, configuration"),
    "layers": ("layers", "the layers with experts of a model, and their tensors"),
    "gguf": ("layers", "the same as layers"),
    "fit": ("fit", "what of a model fits into memory, before loading it"),
    "explain": ("explain", "how a layer would run, and why"),
    "bench": ("bench", "our layer beside the machine's limits and other engines"),
    "generate": ("generate", "text of a whole model, its speed, and how its experts are used"),
    "cache": ("cache", "whether files of a weight cache are what was written"),
    "convert": ("convert", "a GGUF file with experts of other types"),
    "trace": ("trace", "which experts a file's routers ask for"),
    "simulate-offload": ("simulate", "hit rate and speed of expert pools on routing traces"),
    "plan-ep": ("plan_ep", "which experts each rank keeps, of a layer over many processes"),
    "simulate-ep": ("simulate_ep", "loads, bytes, memory and time of expert parallelism"),
    "check-ep": ("check_ep", "a layer over the ranks of torchrun or mpiexec against one process"),
    "completion": ("completion", "completion of commands and options for a shell"),
}


#: Stands for all commands in place of the name of one.
ALL = "*"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands; only `command` is imported and gets its arguments."""
    import moesaic

    parser = argparse.ArgumentParser(prog="moesaic", description="Mixture-of-experts layer engine.")
    parser.add_argument("--version", action="version", version=f"moesaic {moesaic.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if command in (name, ALL):
            implementation = importlib.import_module(f".{module}", __name__)
            implementation.add_arguments(sub)
            sub.set_defaults(run=implementation.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 good, 1 a check failed, 2 bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if a in COMMANDS), None)
    options = build_parser(command).parse_args(arguments)

    import moesaic

    # Paths and texts of files need not be UTF-8; their bytes go out as they came in.
    if sys.stdout is None:  # closed by the caller, who wants the exit status alone
        sys.stdout = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    logging.basicConfig(format="moesaic: %(message)s")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (head, less) left; point stdout elsewhere so that the flush at exit is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (moesaic.Error, OSError) as error:
        # Errors of a command begin with its name, as those of functions with theirs, and name
        # options where functions name arguments.
        message = " ".join(str(error).split()).removeprefix(f"{options.command}: ")
        message = message.replace("overwrite=True", "--overwrite")
        if isinstance(error, OSError) and error.filename is not None and error.errno:
            message = f"{os.fspath(error.filename)}: {os.strerror(error.errno)}"
        print(f"moesaic {options.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

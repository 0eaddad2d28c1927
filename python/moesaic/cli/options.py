"""Values of options, checked by the parser, so that a bad one is refused before any work."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic._sizes import parse_size

if TYPE_CHECKING:
    from ..distributed import Network


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a parser of integers of a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            high = f" to {most}" if most < 2**31 - 1 else " or more"
            raise argparse.ArgumentTypeError(f"expected an integer, {least}{high}, got {text!r}")
        return value

    return parse


def number(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return a parser of finite numbers of a range, without its lower end where `above`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        good = math.isfinite(value) and least <= value <= most and not (above and value == least)
        if not good:
            words = f"above {least:g}" if above else f"of at least {least:g}"
            words += f" and at most {most:g}" if most < math.inf else ""
            raise argparse.ArgumentTypeError(f"expected a number {words}, got {text!r}")
        return value

    return parse


def integers(least: int) -> Callable[[str], list[int]]:
    """Return a parser of "1,8,512"."""

    def parse(text: str) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            values = [least - 1]
        if min(values) < least or max(values) >= 2**31:
            raise argparse.ArgumentTypeError(
                f"expected integers of at least {least}, such as 1,8,512, got {text!r}"
            )
        return values

    return parse


def words(known: list[str]) -> Callable[[str], list[str]]:
    """Return a parser of some of these words, separated by commas."""

    def parse(text: str) -> list[str]:
        values = text.split(",")
        unknown = [value for value in values if value not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"expected some of {', '.join(known)}, got {unknown[0]!r}"
            )
        return values

    return parse


def memory(text: str) -> int:
    """Parse bytes: "64GiB", "64G", "1.5T", "1000000"; units are powers of 1024."""
    value = parse_size(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 64GiB, got {text!r}")
    return value


def memories(text: str) -> list[int]:
    """Parse sizes separated by commas: "12GiB,24GiB"."""
    return [memory(part) for part in text.split(",")]


def rate(text: str) -> float:
    """Parse bytes per second: "3GB/s", "500MB/s", "3e9"; units are powers of 1000."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?)(B(/s)?)?\s*", text, re.IGNORECASE)
    try:
        value = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ") if match else 0.0
    except ValueError:
        value = 0.0
    if not 1 <= value < 2**62:
        raise argparse.ArgumentTypeError(f"expected bytes per second such as 3GB/s, got {text!r}")
    return value


def network(text: str) -> Network:
    """Parse "LATENCY,BYTES_PER_S": "50e-6,1.1e9"."""
    from ..distributed import Network

    parts = text.split(",")
    try:
        latency, bandwidth = (float(part) for part in parts)
    except ValueError:
        latency = bandwidth = math.nan
    if not (0 <= latency < math.inf and 0 < bandwidth < math.inf):
        raise argparse.ArgumentTypeError(
            f"expected seconds and bytes per second such as 50e-6,1.1e9, got {text!r}"
        )
    return Network(latency, bandwidth)


def output(text: str) -> str:
    """A file that can be written later. Opens nothing."""
    path = Path(text)
    folder = path.parent
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write, got the folder {text!r}")
    if not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}")
    return text


def picture(text: str) -> str:
    """An output that matplotlib is to draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib (pip install 'moesaic[plot]')")
    from moesaic import ConfigError
    from moesaic._plots import check_picture

    try:
        check_picture("--plot", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}") from None
    return output(text)


def add_model(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add the file that a command opens."""
    text = "a GGUF file or any of its shards, a checkpoint folder, or one of safetensors"
    if optional:
        parser.add_argument("file", nargs="?", help=f"{text} (default: a small one made for this)")
    else:
        parser.add_argument("file", help=text)


def add_layer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer",
        type=integer(0),
        metavar="N",
        help="number of the block in the model (default: the first with experts)",
    )


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="machine readable")

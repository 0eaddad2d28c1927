"""What tests read of a shared library of Linux, by readelf."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple


class Symbol(NamedTuple):
    """A row of the table that the loader reads; `where` is UND for what another library has."""

    binding: str
    where: str
    name: str
    version: str


def readelf(*arguments: str | Path) -> str:
    command = ["readelf", "--wide", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(library: Path) -> list[Symbol]:
    found = []
    for line in readelf("--dyn-syms", library).splitlines():
        parts = line.split()
        if len(parts) >= 8 and parts[0].rstrip(":").isdigit():
            name, _, version = parts[7].partition("@")
            found.append(Symbol(parts[4], parts[6], name, version.lstrip("@")))
    return found


def exported(table: list[Symbol]) -> list[str]:
    return [symbol.name for symbol in table if symbol.where != "UND" and symbol.name]


def unversioned(table: list[Symbol]) -> list[str]:
    """What it takes from elsewhere, with no word on which library's it is."""
    return [
        symbol.name
        for symbol in table
        if symbol.where == "UND" and symbol.name and not symbol.version
        if symbol.binding != "WEAK"
    ]


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def newer_than(glibc: tuple[int, ...], table: list[Symbol]) -> list[str]:
    """The versions of glibc that it asks for and that came later than this one."""
    versions = {symbol.version for symbol in table if symbol.version.startswith("GLIBC_")}
    assert len(versions) > 3
    return [version for version in versions if numbers(version) > glibc]


def needed(library: Path) -> list[str]:
    lines = readelf("--dynamic", library).splitlines()
    return [line.split()[-1].strip("[]") for line in lines if "(NEEDED)" in line]


def check_is_hardened(library: Path) -> None:
    """Tables and stack that no overrun makes executable or finds writable."""
    headers = readelf("--program-headers", library)
    assert "GNU_RELRO" in headers
    (stack,) = [line for line in headers.splitlines() if "GNU_STACK" in line]
    assert "E" not in stack.split()[-2], "the stack is executable"
    dynamic = readelf("--dynamic", library)
    assert "NOW" in dynamic, "symbols are bound while it runs"
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, "libraries of other folders"


def check_is_stripped(library: Path) -> None:
    sections = readelf("--sections", library)
    assert ".symtab" not in sections and ".debug" not in sections

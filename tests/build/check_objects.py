"""Checks of the library's object files, on both sides of the kernels/<isa>/ folders.

baseline:   objects outside hold no AVX instruction, so they run on every x86-64 CPU.
isolation:  objects inside define no symbol that generic code could be linked to instead of its
            own: every defined name, weak ones above all, carries its instruction set's namespace.
lifetime:   nothing is destroyed when a process ends, which it may do while threads are inside of
            calls: what lives as long as the process is never destroyed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# VEX and EVEX instructions are spelled with a leading v; these three are not AVX.
NOT_AVX = {"verr", "verw", "vmcall"}
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t(?:[0-9a-f]{2} )+\s*\t?(?P<text>\S.*)$")
AVX_REGISTER = re.compile(r"%[yzt]mm\d|%k[0-7]\b")
NO_OPERAND = {"ldtilecfg", "sttilecfg", "tilerelease"}  # of AMX, which name no tile


def is_avx(text: str) -> bool:
    """Whether one disassembled instruction needs AVX or later."""
    mnemonic = next(
        (w for w in text.split() if w not in ("lock", "rep", "repz", "repnz", "data16")), ""
    )
    if mnemonic in NO_OPERAND or (mnemonic.startswith("v") and mnemonic not in NOT_AVX):
        return True
    return AVX_REGISTER.search(text) is not None


def avx_in(listing: str) -> Iterator[str]:
    """Yields "function: instruction" for each AVX instruction of an objdump listing."""
    function = "?"
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif (match := INSTRUCTION.match(line)) and is_avx(match["text"]):
            yield f"{function}: {match['text'].strip()}"


def foreign_symbols(listing: str, isa: str) -> Iterator[str]:
    """Yields the defined global symbols of an `nm` listing whose name lacks the namespace `isa`."""
    component = f"{len(isa)}{isa}"  # as a namespace is spelled in a mangled name
    for line in listing.splitlines():
        parts = line.split()
        if len(parts) < 3:
            continue
        kind, name = parts[-2], parts[-1]
        if kind in "TDBRWVuw" and component not in name and not name.startswith("DW.ref."):
            yield f"{kind} {name}"


def destroyed_at_exit(listing: str) -> Iterator[str]:
    """Yields the calls of an `nm` listing that have a destructor or function run at the end."""
    for line in listing.splitlines():
        if line.split()[-1].split("@")[0] in ("__cxa_atexit", "atexit"):
            yield "a destructor runs when the process ends"


def isa_of(path: str, isas: list[str]) -> str | None:
    match = re.search(r"/kernels/([^/]+)/", path)
    return match[1] if match and match[1] in isas else None


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=("baseline", "isolation", "lifetime"))
    parser.add_argument(
        "--objects", type=Path, required=True, help="file with one object path per line"
    )
    parser.add_argument(
        "--isas", default="", help="comma separated folders that have flags of their own"
    )
    parser.add_argument("--objdump", default="objdump")
    parser.add_argument("--nm", default="nm")
    options = parser.parse_args()

    isas = [isa for isa in options.isas.split(",") if isa]
    findings: list[str] = []
    seen = 0
    for path in options.objects.read_text().split():
        isa = isa_of(path, isas)
        if options.check == "baseline" and isa is None:
            found = list(avx_in(output_of(options.objdump, "-d", "-C", path)))
        elif options.check == "isolation" and isa is not None:
            found = list(foreign_symbols(output_of(options.nm, "--defined-only", path), isa))
        elif options.check == "lifetime":
            found = list(destroyed_at_exit(output_of(options.nm, "--undefined-only", path)))
        else:
            continue
        seen += 1
        findings += [f"{path}: {finding}" for finding in found[:5]]
    for finding in findings:
        print(finding)
    print(f"{options.check}: {seen} objects, {len(findings)} findings")
    if seen == 0 and (options.check != "isolation" or isas):
        print("no object was checked")
        return 1
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

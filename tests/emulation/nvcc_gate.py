"""Compiles every .cu file of a folder for each architecture and reads what ptxas says of it.

    python nvcc_gate.py cuda/ --include cuda --include cpp/include [--arch sm_80 --arch sm_90a]

Prints a table (kernel, registers, shared memory); fails on an error, on a spill and on serialised
wgmma (C7510, C7511). Without nvcc it says so and ends with 77, which ctest shows as skipped.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SKIPPED = 77

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SERIALISED = re.compile(r"C7510|C7511")


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    spilled: int = 0


@dataclass
class Compilation:
    source: Path
    arch: str
    status: int
    messages: str
    kernels: list[Kernel]

    def complaints(self) -> list[str]:
        found = []
        if self.status != 0:
            found.append(f"{self.source} does not compile for {self.arch}:\n{self.messages}")
        found += [
            f"{kernel.name} spills {kernel.spilled} bytes on {kernel.arch}"
            for kernel in self.kernels
            if kernel.spilled
        ]
        if SERIALISED.search(self.messages):
            found.append(f"{self.source} has serialised wgmma on {self.arch}:\n{self.messages}")
        return found


def kernels_in(messages: str) -> list[Kernel]:
    """What `-Xptxas -v` says of each entry function, in its order."""
    kernels: list[Kernel] = []
    for line in messages.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry[1], entry[2]))
        elif kernels:
            if spill := SPILL.search(line):
                kernels[-1].spilled += int(spill[1]) + int(spill[2])
            if used := USED.search(line):
                kernels[-1].registers = int(used[1])
                shared = SHARED.search(line)
                kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def compiled(source: Path, arch: str, options: list[str]) -> Compilation:
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "kernel.cubin")  # device code alone
        command = ["nvcc", "-std=c++20", f"-arch={arch}", "-Xptxas", "-v", *options]
        command += ["-cubin", str(source), "-o", target]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{source} for {arch}", file=sys.stderr, flush=True)
    messages = run.stdout + run.stderr
    return Compilation(source, arch, run.returncode, messages, kernels_in(messages))


def readable(names: list[str]) -> dict[str, str]:
    """Demangled names, or the mangled ones where no demangler is installed."""
    if not names or not shutil.which("c++filt"):
        return {name: name for name in names}
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    noise = r"\(anonymous namespace\)::|moesaic::(cuda::)?|^void |\(.*\)$"
    short = [re.sub(noise, "", line) for line in run.stdout.splitlines()]
    return dict(zip(names, short, strict=True))


def print_table(kernels: list[Kernel], archs: list[str]) -> None:
    names = readable(sorted({kernel.name for kernel in kernels}))
    facts = {(kernel.name, kernel.arch): kernel for kernel in kernels}
    header = [f"{arch}: registers  shared" for arch in archs]
    print("kernel | " + " | ".join(header))
    for name, shown in sorted(names.items(), key=lambda item: item[1]):
        cells = []
        for arch, title in zip(archs, header, strict=True):
            kernel = facts.get((name, arch))
            text = f"{kernel.registers}  {kernel.shared}" if kernel else "-"
            cells.append(text.rjust(len(title)))
        print(f"{shown} | " + " | ".join(cells))
    print(f"{len(names)} kernels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--include", action="append", default=[], type=Path)
    parser.add_argument("--arch", action="append", default=[])
    given = parser.parse_args()
    if not shutil.which("nvcc"):
        print("SKIP: nvcc is not on the PATH: no CUDA kernel was compiled, for no architecture.")
        return SKIPPED
    archs = given.arch or ["sm_80", "sm_90a"]
    options = [f"-I{folder}" for folder in given.include]
    # host/ is the plug-in: no kernels, and definitions that its own build gives.
    sources = sorted(file for file in given.folder.rglob("*.cu") if file.parent.name != "host")
    jobs = [(source, arch, options) for source in sources for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(*job), jobs))
    print_table([kernel for result in results for kernel in result.kernels], archs)
    complaints = [line for result in results for line in result.complaints()]
    for line in complaints:
        print(f"FAIL: {line}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

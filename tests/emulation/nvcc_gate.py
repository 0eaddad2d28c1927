"""Compiles every .cu file of a folder for each architecture and reads what ptxas says of it.

    python nvcc_gate.py cuda/ --include cuda --include cpp/include [--arch sm_80 --arch sm_90a]
                        [--loops loops.tsv [--write]]

Prints a table (kernel, registers, shared memory); fails on an error, on a spill and on serialised
wgmma (C7510, C7511). Without nvcc it says so and ends with 77, which ctest shows as skipped.

With `--loops` the main loops of the products on sm_90a are counted (sass.py) and compared with the
bounds of that table; `--write` takes over those that got better, and never a worse one. This needs
cuobjdump, of the toolkit or of the package nvidia-cuda-cuobjdump; without it that is said.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sass

SKIPPED = 77
# The architecture whose loops are counted.
COUNTED = "sm_90a"

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
    loops: dict[str, sass.Loop]

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


def cuobjdump() -> str | None:
    """Of the toolkit, else of a package of this environment."""
    if found := shutil.which("cuobjdump"):
        return found
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    return str(packaged[-1]) if packaged else None


def loops_of(cubin: str, tool: str) -> dict[str, sass.Loop]:
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    loops = {name: sass.main_loop(body) for name, body in sass.functions(text).items()}
    return {name: loop for name, loop in loops.items() if loop is not None}


def compiled(source: Path, arch: str, options: list[str], tool: str | None) -> Compilation:
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "kernel.cubin")  # device code alone
        command = ["nvcc", "-std=c++20", f"-arch={arch}", "-Xptxas", "-v", *options]
        command += ["-cubin", str(source), "-o", target]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        counted = tool is not None and arch == COUNTED and run.returncode == 0
        loops = loops_of(target, tool) if counted else {}
    print(f"{source} for {arch}", file=sys.stderr, flush=True)
    messages = run.stdout + run.stderr
    return Compilation(source, arch, run.returncode, messages, kernels_in(messages), loops)


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


LOOP_NAME = re.compile(r"(narrow|wide|down_sum)_kernel")
PLANES_OF_X = re.compile(r"Li(\d)EEEv")


def loop_rows(results: list[Compilation]) -> dict[str, sass.Loop]:
    """By "format kernel planes of x"; the file of a kernel names its format."""
    rows = {}
    for result in results:
        for name, loop in result.loops.items():
            kernel, planes = LOOP_NAME.search(name), PLANES_OF_X.search(name)
            if kernel and planes:
                weights = result.source.stem.removeprefix("product_")
                rows[f"{weights} {kernel[1]} {planes[1]}"] = loop
    return rows


def read_bounds(path: Path) -> dict[str, tuple[float, int]]:
    """Most instructions per HMMA, and least distance from a load (0 where there is none)."""
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [line.split("\t") for line in lines[1:]]
    return {name: (float(per_hmma), int(distance)) for name, per_hmma, distance in cells}


def bounds_with(
    bounds: dict[str, tuple[float, int]], rows: dict[str, sass.Loop]
) -> dict[str, tuple[float, int]]:
    """The bounds, better where the loops are, and of the loops that had none."""
    result = {name: bound for name, bound in bounds.items() if name in rows}
    for name, loop in rows.items():
        per_hmma, distance = bounds.get(name, (float("inf"), 0))
        now = round(loop.per_hmma, 2)
        result[name] = (min(per_hmma, now), max(distance, loop.load_distance or 0))
    return result


def write_bounds(path: Path, bounds: dict[str, tuple[float, int]]) -> None:
    rows = [f"{name}\t{per:.2f}\t{distance}\n" for name, (per, distance) in sorted(bounds.items())]
    path.write_text("format loop planes\tper HMMA\tload distance\n" + "".join(rows))


def loop_complaints(bounds: dict[str, tuple[float, int]], rows: dict[str, sass.Loop]) -> list[str]:
    found = [f"no loop of {name}, which has a bound" for name in bounds if name not in rows]
    for name, (per_hmma, distance) in bounds.items():
        loop = rows.get(name)
        if loop is None:
            continue
        if round(loop.per_hmma, 2) > per_hmma:
            found.append(f"{name}: {loop.per_hmma:.2f} instructions per HMMA, at most {per_hmma}")
        if (loop.load_distance or 0) < distance:
            found.append(
                f"{name}: a load is used after {loop.load_distance} instructions, "
                f"not before {distance}"
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--include", action="append", default=[], type=Path)
    parser.add_argument("--arch", action="append", default=[])
    parser.add_argument("--loops", type=Path, help="table of bounds on the main loops")
    parser.add_argument("--write", action="store_true", help="lower the bounds to what was counted")
    given = parser.parse_args()
    if not shutil.which("nvcc"):
        print("SKIP: nvcc is not on the PATH: no CUDA kernel was compiled, for no architecture.")
        return SKIPPED
    archs = given.arch or ["sm_80", COUNTED]
    tool = cuobjdump() if given.loops else None
    if given.loops and tool is None:
        print("SKIP: no cuobjdump here: no loop was counted (pip install nvidia-cuda-cuobjdump).")
    options = [f"-I{folder}" for folder in given.include]
    # host/ is the plug-in: no kernels, and definitions that its own build gives.
    sources = sorted(file for file in given.folder.rglob("*.cu") if file.parent.name != "host")
    jobs = [(source, arch, options, tool) for source in sources for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compiled(*job), jobs))
    print_table([kernel for result in results for kernel in result.kernels], archs)
    complaints = [line for result in results for line in result.complaints()]
    if tool is not None:
        rows = loop_rows(results)
        bounds = read_bounds(given.loops)
        for name, loop in sorted(rows.items()):
            bound = "" if name in bounds else " (no bound yet: --write)"
            print(f"{name}: {loop.per_hmma:.2f} per HMMA, loads {loop.load_distance} ahead{bound}")
        if given.write:
            write_bounds(given.loops, bounds_with(bounds, rows))
        complaints += loop_complaints(read_bounds(given.loops), rows)
    for line in complaints:
        print(f"FAIL: {line}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

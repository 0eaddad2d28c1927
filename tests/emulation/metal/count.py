"""What the loops of the expert kernels cost in instructions, without a GPU of any kind.

    python count.py [--metal FOLDER] [--formats q4_k,f16] [--tile 32] [--bounds FILE [--write]]

The kernels are compiled for a GPU that clang knows (gfx1030: simdgroups of 32 threads, as on Apple
GPUs, scalar and vector units, threadgroup memory), since no compiler for Apple's exists here. The
loop over the columns of a weight row is then counted by what its instructions are: those of one
simdgroup for one turn, with both ways of every branch, and a loop inside as often as it turns. What
a load waits for is not in it. It says how two versions of a kernel compare and where instructions
go, not how long they take on a Mac. `per weight` is per weight that a lane multiplies (GEMV) or
decodes (GEMM) in that turn. Needs clang-19 with the target amdgcn, which Debian's has.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CLANG = [
    *("clang-19", "-x", "clcpp", "-cl-std=clc++2021", "-target", "amdgcn-amd-amdhsa"),
    *(
        "-mcpu=gfx1030",
        "-Xclang",
        "-cl-ext=+__opencl_c_generic_address_space,+__opencl_c_program_scope_global_variables,+cl_khr_fp16",
        "-nogpulib",
        "-O2",
        "-Wno-everything",
        "-ffp-contract=off",
        "-S",
    ),
]
# Of the loops inside the one over columns: those that stage x have 256 quads for 128 threads.
INNER_TURNS = 2
KINDS = {
    "global": re.compile(r"^(global|flat|buffer)_"),
    "tile": re.compile(r"^ds_"),
    "matrix": re.compile(r"^v_multiply_matrix"),
    "fma": re.compile(r"^v_fma"),
    "vector": re.compile(r"^v_"),
    "scalar": re.compile(r"^s_"),
}


@dataclass
class Loop:
    """Instructions by kind of the blocks that are in no deeper loop."""

    parent: str | None = None
    depth: int = 0
    counts: Counter[str] = field(default_factory=Counter)


def kind_of(instruction: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if pattern.match(instruction))


def loops_of(assembly: str) -> dict[str, Loop]:
    """The loops of a kernel by the label of their header, as the compiler's comments tell them."""
    loops: dict[str, Loop] = {}
    block, current = "", ""
    for line in assembly.splitlines():
        text, _, comment = line.partition(";")
        if label := re.match(r"\.L(BB\d+_\d+):", text):
            block, current = label[1], ""
        elif "%bb." in comment:
            block, current = "", ""
        if found := re.search(r"in Loop: Header=(BB\d+_\d+) Depth=", comment):
            current = found[1]
        if found := re.search(r"Parent Loop (BB\d+_\d+) Depth=", comment):
            loops.setdefault(block, Loop()).parent = found[1]  # the last one named is the nearest
        if found := re.search(r"Loop Header: Depth=(\d+)", comment):
            current = block
            loops.setdefault(block, Loop()).depth = int(found[1])
        words = text.split()
        if current and words and not words[0].startswith(".") and not words[0].endswith(":"):
            loops.setdefault(current, Loop()).counts[kind_of(words[0])] += 1
    return loops


def with_inner(loops: dict[str, Loop], header: str, turns: int) -> Counter[str]:
    """A loop with what is inside, each loop in it `turns` times."""
    total = Counter(loops[header].counts)
    for name, loop in loops.items():
        if loop.parent == header:
            for kind, count in with_inner(loops, name, turns).items():
                total[kind] += turns * count
    return total


def compiled(metal: Path, kernel: str, suffix: str, decoder: str, defines: list[str]) -> str:
    """The assembly of one kernel file for one format."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "metal"
        shutil.copytree(metal, copy)
        quant = Path("cpp") / "src" / "quant"
        shutil.copytree(metal.parent / quant, Path(folder) / quant)
        source = copy / "kernels" / f"{kernel}.metal"
        text = re.sub(r"EXPERT_FORMATS\((\w+)\)", rf"\1({suffix}, {decoder})", source.read_text())
        own = "{ const uint lane = counted_lane(), simdgroup = counted_simdgroup();"
        source.write_text(re.sub(r"THREAD_POSITION\)\s*\{", "THREAD_POSITION) " + own, text))
        command = [*CLANG, f"-I{HERE / 'count'}", *defines, "-o", "-", str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(run.stderr)
    return run.stdout


def decoders(metal: Path) -> dict[str, str]:
    """Suffix and decoder of every format."""
    text = (metal / "kernels" / "decode" / "formats.h").read_text()
    return dict(re.findall(r"F\((\w+), ([\w<>]+)\)", text))


@dataclass(frozen=True)
class Kernel:
    """Where the loop over columns is, and what a turn of it takes."""

    file: str
    name: str
    depth: int  # of that loop: 2 inside the one over entries, or 1
    weights: int  # that a lane multiplies, or decodes, in a turn


def rows_of(metal: Path) -> int:
    """Rows of a simdgroup in the GEMV kernels."""
    found = re.search(r"kGemvRows = (\d+)", (metal / "arguments.h").read_text())
    assert found is not None
    return int(found[1]) // 4


@dataclass(frozen=True)
class Count:
    """What the loop over columns of one kernel costs."""

    name: str
    entries: int  # that a turn computes; 0 where a matrix unit does
    kinds: Counter[str]
    weights: int
    registers: int

    @property
    def per_weight(self) -> float:
        return sum(self.kinds.values()) / self.weights

    def row(self) -> str:
        cells = [f"`{self.name}`", str(self.entries or ""), str(sum(self.kinds.values()))]
        cells += [str(self.kinds[kind]) for kind in KINDS]
        return f"| {' | '.join([*cells, f'{self.per_weight:.1f}', str(self.registers)])} |"


def counts(
    metal: Path, suffix: str, decoder: str, kernels: list[Kernel], tile: str
) -> Iterator[Count]:
    """The loops of one format."""
    for file in sorted({kernel.file for kernel in kernels}):
        assembly = compiled(metal, file, suffix, decoder, [f"-DCOUNTED_TILE={tile}"])
        for kernel in kernels:
            if kernel.file != file:
                continue
            name = kernel.name.format(suffix)
            text = assembly[assembly.index(f"\n{name}:") :]
            text = text[: text.index(".end_amdhsa_kernel")]
            found = re.search(r"\.amdhsa_next_free_vgpr (\d+)", text)
            registers = int(found[1]) if found else 0
            loops = loops_of(text)
            for header, loop in loops.items():
                total = with_inner(loops, header, INNER_TURNS)
                if loop.depth == kernel.depth and total["fma"] + total["matrix"] >= 16:
                    # The codes times x, and a few more for scales.
                    entries = total["fma"] // kernel.weights if kernel.depth == 2 else 0
                    yield Count(name, entries, total, kernel.weights, registers)


def compare(found: list[Count], path: Path, write: bool) -> int:
    """Hold the counts to the bounds of a file, or write them there."""
    text = "loop\tinstructions per weight\n" + "".join(
        f"{count.name} {count.entries}\t{count.per_weight:.2f}\n" for count in found
    )
    if write:
        path.write_text(text)
        return 0
    bounds = dict(line.split("\t") for line in path.read_text().splitlines()[1:])
    worse = [
        f"{count.name}, {count.entries} entries: {count.per_weight:.2f} instructions per weight, "
        f"expected at most {bounds.get(f'{count.name} {count.entries}', 'a bound')}"
        for count in found
        if count.per_weight > float(bounds.get(f"{count.name} {count.entries}", 0)) + 0.005
    ]
    print("\n".join(worse) or f"{len(found)} loops within {path.name}")
    return 1 if worse else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--metal", type=Path, default=ROOT / "metal", help="another version of it")
    parser.add_argument("--formats", default="q4_k,q6_k,mxfp4,int4,f16")
    parser.add_argument("--tile", default="32", help="entries of a tile: 8, 16 or 32")
    parser.add_argument("--bounds", type=Path, help="fail where a loop got longer")
    parser.add_argument("--write", action="store_true", help="take the counts over as bounds")
    arguments = parser.parse_args()
    metal = arguments.metal.resolve()
    rows = rows_of(metal)
    kernels = [
        Kernel("expert_gemv", "expert_gemv_{}", 2, 32 * rows),
        Kernel("expert_gate_up", "expert_gate_up_{}", 2, 32 * rows),
        Kernel("expert_gemm", "expert_gemm_{}", 1, 32),
        Kernel("expert_gemm", "expert_gemm_half_{}", 1, 32),
    ]
    known = decoders(metal)
    found = [
        count
        for suffix in arguments.formats.split(",")
        if suffix in known
        for count in counts(metal, suffix, known[suffix], kernels, arguments.tile)
    ]
    if arguments.bounds is not None:
        return compare(found, arguments.bounds, arguments.write)
    print(f"| kernel | entries | instructions | {' | '.join(KINDS)} | per weight | registers |")
    print("| --- |" + " --: |" * (len(KINDS) + 4))
    for count in found:
        print(count.row())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Link with the interface of an older glibc than this machine's.

A glibc still exports what its predecessors did, each symbol under the version that brought it; a
linker takes the newest. So libraries are made here that hold nothing but the names and versions of
the old one, for the linker to read. `old_glibc.c` has what the C++ library expects beyond them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Libraries that were merged into libc in 2.34, and are empty since: needed where they are not.
MERGED = ("libpthread.so.0", "libdl.so.2")
# A line of `readelf --dyn-syms`: type, section, name and version.
DEFINED = re.compile(r" (FUNC|OBJECT|TLS|IFUNC) .* (?:\d+) (\w+)@@?(GLIBC_2[.\d]+)$")


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.removeprefix("GLIBC_").split(".")))


def exports(library: Path, limit: tuple[int, ...]) -> dict[str, tuple[str, str]]:
    """The version and the type of each symbol that a glibc of this age exports."""
    command = ["readelf", "--wide", "--dyn-syms", str(library)]
    found: dict[str, tuple[str, str]] = {}
    for line in subprocess.check_output(command, text=True).splitlines():
        match = DEFINED.search(line)
        if match is None or number(match[3]) > limit:
            continue
        kind, symbol, version = match.groups()
        if symbol not in found or number(found[symbol][0]) < number(version):
            found[symbol] = (version, kind)
    return found


def write_stub(
    compiler: str, folder: Path, soname: str, symbols: dict[str, tuple[str, str]]
) -> None:
    """A shared library of this name for the linker, with the symbols and no code behind them."""
    assembly, script = folder / f"{soname}.s", folder / f"{soname}.map"
    lines = [".data"]
    for i, (symbol, (version, kind)) in enumerate(sorted(symbols.items())):
        where = '.section .tbss,"awT",%nobits' if kind == "TLS" else ".data"
        assembled = {"OBJECT": "object", "TLS": "tls_object"}.get(kind, "function")
        stub = f"moesaic_stub_{i}"
        lines += [where, f".globl {stub}", f".type {stub}, %{assembled}", f"{stub}: .zero 8"]
        lines += [f".size {stub}, 8", f".symver {stub}, {symbol}@@{version}"]
    assembly.write_text("\n".join(lines) + "\n")
    text, before = "", ""
    for version in sorted({version for version, _ in symbols.values()}, key=number):
        text += f"{version} {{ {'' if before else 'local: moesaic_stub_*;'} }} {before};\n"
        before = version
    script.write_text(text)
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-o", str(folder / soname)]
    if text:
        options.append(f"-Wl,--version-script={script}")
    subprocess.run([compiler, *options, str(assembly)], check=True)


def make(compiler: str, folder: Path, version: str) -> None:
    """Make a folder that a linker finds this version of glibc in, with -L before its own."""
    folder.mkdir(parents=True, exist_ok=True)

    def of_this_machine(name: str) -> Path:
        command = [compiler, f"-print-file-name={name}"]
        return Path(subprocess.check_output(command, text=True).strip()).resolve()

    libc = of_this_machine("libc.so.6")
    for soname in ("libc.so.6", "libm.so.6"):
        write_stub(compiler, folder, soname, exports(of_this_machine(soname), number(version)))
    for soname in MERGED:
        write_stub(compiler, folder, soname, {})
    (folder / "libm.so").write_text(f"INPUT({folder / 'libm.so.6'})\n")
    compat = folder / "old_glibc.o"
    flags = ["-O2", "-fPIC", "-fstack-protector-strong", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, "-x", "c", *flags, "-c", str(HERE / "old_glibc.c"), "-o", str(compat)]
    subprocess.run(command, check=True)
    # As glibc's own libc.so: a few functions that are part of every program, and the loader.
    (loader,) = libc.parent.glob("ld-linux-*.so.?")
    parts = [folder / "libc.so.6", compat, of_this_machine("libc_nonshared.a")]
    parts.append(f"AS_NEEDED({loader})")
    (folder / "libc.so").write_text(f"GROUP({' '.join(map(str, parts))})\n")


def flags(folder: Path) -> list[str]:
    """What the linker is told to link with a folder that was made."""
    merged = ",".join(f"-l:{soname}" for soname in MERGED)
    return [f"-L{folder}", f"-Wl,--push-state,--no-as-needed,{merged},--pop-state"]

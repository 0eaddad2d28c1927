"""The wheel as a user gets it: content, exports, what it asks of a system, and a run on one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into ELF files")

MAX_BYTES = 5_000_000
SMOKE = Path(__file__).with_name("smoke.py")


def readelf(*arguments: str | Path) -> str:
    command = ["readelf", "--wide", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def core(wheel: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    (name,) = [n for n in names if Path(n).name.startswith("_core.") and n.endswith(".so")]
    return Path(zipfile.ZipFile(wheel).extract(name, tmp_path_factory.mktemp("core")))


@pytest.fixture(scope="module")
def symbols(core: Path) -> list[tuple[str, str, str, str]]:
    """Binding, section, name and version of each dynamic symbol."""
    found = []
    for line in readelf("--dyn-syms", core).splitlines():
        parts = line.split()
        if len(parts) >= 8 and parts[0].rstrip(":").isdigit():
            name, _, version = parts[7].partition("@")
            found.append((parts[4], parts[6], name, version.lstrip("@")))
    return found


@pytest.fixture(scope="module")
def needed(core: Path) -> list[str]:
    lines = readelf("--dynamic", core).splitlines()
    return [line.split()[-1].strip("[]") for line in lines if "(NEEDED)" in line]


@pytest.fixture
def glibc(wheel: Path) -> tuple[int, ...]:
    """The version that the wheel's tag promises to run with."""
    tag = re.search(r"manylinux_(\d+_\d+)", wheel.name)
    if tag is None:
        pytest.skip("made for this machine alone: its name promises no version of glibc")
    return numbers(tag[1])


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES


def test_content(names: list[str]) -> None:
    wanted = {"moesaic/__init__.py", "moesaic/_core.pyi", "moesaic/py.typed", "moesaic/cli/demo.py"}
    assert wanted <= set(names)
    roots = {n.split("/", 1)[0] for n in names}
    assert {r for r in roots if not r.startswith("moesaic")} == set()
    unwanted = (".a", ".hpp", ".cpp", ".cmake", ".txt.in", ".gguf", ".npz")
    assert [n for n in names if n.endswith(unwanted) or "/tests/" in n] == []


def test_licences(wheel: Path, names: list[str]) -> None:
    """Also of what is part of the module: ggml's tables, pybind11, the C++ library."""
    (own,) = [n for n in names if n.endswith("licenses/LICENSE")]
    (others,) = [n for n in names if n.endswith("licenses/third_party/README.md")]
    with zipfile.ZipFile(wheel) as archive:
        assert b"Apache License" in archive.read(own)
        text = archive.read(others).decode()
    assert "Copyright (c) 2023-2026 The ggml authors" in text
    assert "GCC Runtime Library Exception" in text
    assert "Copyright (c) 2016 Wenzel Jakob" in text


def test_says_what_it_is_made_of(wheel: Path, names: list[str], needed: list[str]) -> None:
    (name,) = [n for n in names if n.endswith(".dist-info/sboms/moesaic.cdx.json")]
    bill = json.loads(zipfile.ZipFile(wheel).read(name))
    assert bill["metadata"]["component"]["version"] == wheel.name.split("-")[1]
    parts = {part["name"]: part["licenses"] for part in bill["components"]}
    linked = set() if any(n.startswith("libstdc++") for n in needed) else {"libstdc++"}
    assert set(parts) == {"pybind11", "ggml"} | linked
    assert all(parts.values())


def test_module_and_wheel_are_for_the_same(wheel: Path, core: Path) -> None:
    """Python finds a module by its name, pip a wheel by its own."""
    processor = re.search(r"_(x86_64|aarch64)$", wheel.stem)[1]
    assert core.name.endswith(f"-{processor}-linux-gnu.so")
    assert core.name.split("-")[1] == re.search(r"-cp(\d+t?)-cp\1-", wheel.name)[1]
    machine = {"x86_64": "X86-64", "aarch64": "AArch64"}[processor]
    assert machine in readelf("--file-header", core)


def test_exports_only_the_module_entry(symbols: list[tuple[str, str, str, str]]) -> None:
    assert [name for _, where, name, _ in symbols if where != "UND" and name] == ["PyInit__core"]


def test_is_hardened(core: Path, symbols: list[tuple[str, str, str, str]]) -> None:
    headers = readelf("--program-headers", core)
    assert "GNU_RELRO" in headers
    (stack,) = [line for line in headers.splitlines() if "GNU_STACK" in line]
    assert "E" not in stack.split()[-2], "the stack is executable"
    assert "NOW" in readelf("--dynamic", core), "symbols are bound while it runs"
    imported = {name for _, where, name, _ in symbols if where == "UND"}
    assert "__stack_chk_fail" in imported
    assert any(name.endswith("_chk") for name in imported), "no function that checks sizes"


def test_is_stripped(core: Path) -> None:
    sections = readelf("--sections", core)
    assert ".symtab" not in sections and ".debug" not in sections


def test_looks_for_libraries_where_the_system_does(core: Path) -> None:
    dynamic = readelf("--dynamic", core)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_needs_only_the_system(needed: list[str]) -> None:
    allowed = ("libgcc_s.so", "libc.so", "libm.so", "libpthread.so", "libdl.so", "ld-linux")
    assert [n for n in needed if not n.startswith((*allowed, "libstdc++.so"))] == []


def test_brings_the_cpp_library(needed: list[str], glibc: tuple[int, ...]) -> None:
    """An old system's has not what C++20 needs."""
    assert [n for n in needed if n.startswith("libstdc++")] == []
    assert {"libpthread.so.0", "libdl.so.2"} <= set(needed), "parts of glibc until 2.34"


def test_asks_for_no_newer_glibc(
    symbols: list[tuple[str, str, str, str]], glibc: tuple[int, ...]
) -> None:
    versions = {version for *_, version in symbols if version.startswith("GLIBC_")}
    assert len(versions) > 3
    assert [v for v in versions if numbers(v) > glibc] == []


def test_what_is_missing_is_pythons(
    symbols: list[tuple[str, str, str, str]], glibc: tuple[int, ...]
) -> None:
    """A symbol without a version is one that nothing at the link had."""
    missing = [
        name
        for binding, where, name, version in symbols
        if where == "UND" and name and not version and binding != "WEAK"
    ]
    assert any(name.startswith("Py") for name in missing)
    assert [name for name in missing if not name.startswith(("Py", "_Py"))] == []


def test_demo(run_installed) -> None:
    assert "within their bound" in run_installed("moesaic", "demo").stdout


def test_every_format(run_installed) -> None:
    assert " 0 failures" in run_installed("python", SMOKE).stdout


def test_import_is_quiet_and_light(run_installed) -> None:
    code = (
        "import sys, moesaic; "
        "print([m for m in ('torch', 'gguf', 'jax', 'matplotlib') if m in sys.modules])"
    )
    done = run_installed("python", "-W", "error", "-c", code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")

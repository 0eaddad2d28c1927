"""The module of a wheel for Linux: exports, hardening, what it asks of a system."""

from __future__ import annotations

import re
from pathlib import Path

import elf
import pytest


@pytest.fixture(scope="module", autouse=True)
def is_for_linux(wheel: Path) -> None:
    if "linux" not in wheel.name:
        pytest.skip("for another system")


@pytest.fixture(scope="module")
def symbols(core: Path) -> list[elf.Symbol]:
    return elf.symbols(core)


@pytest.fixture(scope="module")
def needed(core: Path) -> list[str]:
    return elf.needed(core)


@pytest.fixture
def glibc(wheel: Path) -> tuple[int, ...]:
    """The version that the wheel's tag promises to run with."""
    tag = re.search(r"manylinux_(\d+_\d+)", wheel.name)
    if tag is None:
        pytest.skip("its name promises no version of glibc")
    return elf.numbers(tag[1])


def test_module_and_wheel_are_for_the_same(wheel: Path, core: Path) -> None:
    """Python finds a module by its name, pip a wheel by its own."""
    processor = re.search(r"_(x86_64|aarch64)$", wheel.stem)[1]
    python = re.search(r"-cp(\d+t?)-cp\1-", wheel.name)[1]
    assert core.name == f"_core.cpython-{python}-{processor}-linux-gnu.so"
    machine = {"x86_64": "X86-64", "aarch64": "AArch64"}[processor]
    assert machine in elf.readelf("--file-header", core)


def test_exports_only_the_module_entry(symbols: list[elf.Symbol]) -> None:
    assert elf.exported(symbols) == ["PyInit__core"]


def test_is_hardened(core: Path, symbols: list[elf.Symbol]) -> None:
    elf.check_is_hardened(core)
    imported = {symbol.name for symbol in symbols if symbol.where == "UND"}
    assert "__stack_chk_fail" in imported
    assert any(name.endswith("_chk") for name in imported), "no function that checks sizes"


def test_is_stripped(core: Path) -> None:
    elf.check_is_stripped(core)


def test_needs_only_the_system(needed: list[str]) -> None:
    allowed = ("libgcc_s.so", "libc.so", "libm.so", "libpthread.so", "libdl.so", "ld-linux")
    assert [n for n in needed if not n.startswith((*allowed, "libstdc++.so"))] == []


def test_brings_the_cpp_library(needed: list[str], glibc: tuple[int, ...]) -> None:
    """An old system's has not what C++20 needs."""
    assert [n for n in needed if n.startswith("libstdc++")] == []
    assert {"libpthread.so.0", "libdl.so.2"} <= set(needed), "parts of glibc until 2.34"


def test_asks_for_no_newer_glibc(symbols: list[elf.Symbol], glibc: tuple[int, ...]) -> None:
    assert elf.newer_than(glibc, symbols) == []


def test_what_is_missing_is_pythons(symbols: list[elf.Symbol], glibc: tuple[int, ...]) -> None:
    """A symbol without a version is one that nothing at the link had."""
    missing = elf.unversioned(symbols)
    assert any(name.startswith("Py") for name in missing)
    assert [name for name in missing if not name.startswith(("Py", "_Py"))] == []

"""The wheel as a user gets it: content, exports, and a run without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into ELF files")

MAX_BYTES = 5_000_000


def run(*command: str | Path, **kwargs) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def core(wheel: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    (name,) = [n for n in names if Path(n).name.startswith("_core.") and n.endswith(".so")]
    return Path(zipfile.ZipFile(wheel).extract(name, tmp_path_factory.mktemp("core")))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; returns its bin folder."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    run(folder / "bin" / "pip", "install", "--quiet", wheel)
    return folder / "bin"


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES


def test_content(names: list[str]) -> None:
    wanted = {"moesaic/__init__.py", "moesaic/_core.pyi", "moesaic/py.typed", "moesaic/cli/demo.py"}
    assert wanted <= set(names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    roots = {n.split("/", 1)[0] for n in names}
    assert {r for r in roots if not r.startswith("moesaic")} == set()
    unwanted = (".a", ".hpp", ".cpp", ".cmake", ".txt.in", ".gguf", ".npz")
    assert [n for n in names if n.endswith(unwanted) or "/tests/" in n] == []


def test_exports_only_the_module_entry(core: Path) -> None:
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", core).splitlines()]
    assert exported == ["PyInit__core"]


def test_is_hardened(core: Path) -> None:
    headers = run("readelf", "-lW", core)
    assert "GNU_RELRO" in headers
    (stack,) = [line for line in headers.splitlines() if "GNU_STACK" in line]
    assert "E" not in stack.split()[-2], "the stack is executable"
    assert "NOW" in run("readelf", "-dW", core), "symbols are bound while it runs"
    imported = run("nm", "-D", "--undefined-only", core)
    assert "__stack_chk_fail" in imported
    assert "_chk@" in imported, "no function of the C library that checks sizes"


def test_is_stripped(core: Path) -> None:
    assert run("nm", core).strip() == ""


def test_needs_only_the_system(core: Path) -> None:
    needed = [
        line.split()[-1].strip("[]")
        for line in run("readelf", "-d", core).splitlines()
        if "(NEEDED)" in line
    ]
    allowed = (
        "libstdc++.so",
        "libgcc_s.so",
        "libc.so",
        "libm.so",
        "libpthread.so",
        "libdl.so",
        "ld-linux",
    )
    assert [n for n in needed if not n.startswith(allowed)] == []


def test_demo_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    environment = {"PATH": str(installed), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    output = run(installed / "moesaic", "demo", env=environment, cwd=tmp_path)
    assert "within their bound" in output


def test_import_is_quiet_and_light(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, moesaic; "
        "print([m for m in ('torch', 'gguf', 'jax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [str(installed / "python"), "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_no_executable_stack(core: Path) -> None:
    (line,) = [s for s in run("readelf", "-lW", core).splitlines() if "GNU_STACK" in s]
    assert "RWE" not in line

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wheel", type=Path, help="the wheel to check")
    parser.addoption("--python", default=sys.executable, help="the Python to install it into")


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest) -> Path:
    path = request.config.getoption("--wheel")
    if path is None:
        pytest.skip("needs --wheel PATH (nox -s wheel)")
    return path.resolve()


@pytest.fixture(scope="session")
def names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="session")
def core(wheel: Path, names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module, out of the wheel."""
    (name,) = [n for n in names if Path(n).name.startswith("_core.") and n.endswith(".so")]
    return Path(zipfile.ZipFile(wheel).extract(name, tmp_path_factory.mktemp("core")))


@pytest.fixture(scope="session")
def installed(
    wheel: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bin folder of an environment that has the wheel, what that needs, and nothing more."""
    folder = tmp_path_factory.mktemp("clean")
    make = [request.config.getoption("--python"), "-m", "venv", str(folder)]
    subprocess.run(make, check=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


@pytest.fixture
def run_installed(installed: Path, tmp_path: Path) -> Run:
    """Call a program of that environment in an empty folder, with no other program on the PATH."""
    environment = {"PATH": str(installed), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(installed / name), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return run

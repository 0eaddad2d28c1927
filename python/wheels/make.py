"""Make the wheel of a source folder for a Python, for Linux machines older than this one.

    python make.py FOLDER --python PATH --out FOLDER --work FOLDER [option of pip wheel ...]

The compiler is that of this machine. The C++ library is linked in, and the module asks for no newer
glibc than the tag of the wheel says (`old_glibc.py`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import old_glibc

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / ".ci" / "locks"

# What pip calls the oldest systems that the wheel runs on.
GLIBC = "2.28"
PLATFORM = "manylinux_2_28_x86_64"


def run(*command: str | Path, **options: object) -> None:
    done = subprocess.run([str(part) for part in command], **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"make.py: {command[0]} failed with status {done.returncode}")


def tools(interpreter: str, work: Path) -> Path:
    """The bin folder of an environment of this Python with what builds wheels.

    It stays where it is, so that ccache finds the headers of pybind11 in the same place.
    """
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    version = subprocess.check_output([interpreter, "-c", code], text=True).strip()
    folder = work / f"python{version}"
    locks = [LOCKS / f"{name}.txt" for name in ("build", "cmake")]
    made, content = folder / "made", "".join(lock.read_text() for lock in locks)
    if not made.exists() or made.read_text() != content:
        run(interpreter, "-m", "venv", "--clear", folder)
        for lock in locks:
            pip = [folder / "bin" / "pip", "install", "--quiet", "--require-hashes"]
            run(*pip, "-r", lock)
        made.write_text(content)
    return folder / "bin"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="an unpacked sdist")
    parser.add_argument("--python", required=True, help="the interpreter to make it for")
    parser.add_argument("--out", type=Path, required=True, help="where the wheel goes")
    parser.add_argument("--work", type=Path, required=True, help="for what is needed meanwhile")
    arguments, options = parser.parse_known_args()
    work = arguments.work.resolve()
    binaries = tools(arguments.python, work)

    glibc = work / "glibc"
    old_glibc.make(os.environ.get("CXX", "c++"), glibc, GLIBC)
    flags = " ".join(["-static-libstdc++", *old_glibc.flags(glibc)])
    options.append(f"--config-settings=cmake.define.CMAKE_MODULE_LINKER_FLAGS={flags}")
    # For the build alone: in the environment of all it would change which packages fit this Python.
    options.append(f"--config-settings=env._PYTHON_HOST_PLATFORM={PLATFORM}")
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    wheel = [binaries / "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", arguments.out]
    run(*wheel, *options, arguments.source, env=environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())

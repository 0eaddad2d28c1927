"""What can be known about the Metal backend without a Mac.

    python check.py [STEP ...] --library libmoesaic.a --build FOLDER

signatures      kernels number their buffers in order, as the launchers and the host expect
address_spaces  every .metal file, with its address spaces, through clang's OpenCL C++ front end
emulation       host code over the fake runtime and kernels in the emulator, all test programs
python          the Python face on the fake device: tests/emulation/metal/python
race            the same under ThreadSanitizer
count           instructions of the loops over weights within count.tsv (count.py)
macos           the host code compiled and linked for macOS arm64 by ziglang

Needs clang++-19 (Debian: clang-19, libclang-rt-19-dev), cmake, ninja and GoogleTest; metal-cpp in
the folder MOESAIC_METAL_CPP; for macos ziglang. With --fetch metal-cpp (45 MB, the macOS
wheel of mlx-metal) and ziglang (80 MB) come from PyPI into the build folder where they are missing.
A step that lacks something says so and counts as skipped: exit code 77 when none failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KERNELS = sorted((ROOT / "metal" / "kernels").glob("*.metal"))
# The version whose headers the checks compile; pyproject.toml accepts a range around it.
MLX_METAL = "mlx-metal==0.32.4"
ZIGLANG = "ziglang==0.17.*"
SKIPPED = 77


class Skip(Exception):
    """Something that a step needs is not here."""


class Failure(Exception):
    """A step found a mistake."""


def run(*command: str | Path, **options: object) -> None:
    if subprocess.run([str(c) for c in command], **options).returncode != 0:  # type: ignore[call-overload]
        raise Failure(" ".join(map(str, command)))


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Skip(f"{name} is missing (Debian, Ubuntu: apt-get install {package})")
    return found


def fetch(arguments: argparse.Namespace, what: str, *command: str | Path) -> None:
    if not arguments.fetch:
        raise Skip(f"{what} is missing; --fetch gets it from PyPI")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, *map(str, command)]).returncode != 0:
        raise Skip(f"{what} is missing and PyPI could not be reached")


def metal_cpp(arguments: argparse.Namespace) -> Path:
    """The folder with Metal/Metal.hpp."""
    if given := os.environ.get("MOESAIC_METAL_CPP"):
        return Path(given)
    folder: Path = arguments.build / "metal_cpp"
    headers = folder / "mlx" / "include" / "metal_cpp"
    if not (headers / "Metal" / "Metal.hpp").exists():
        wanted = ["--platform", "macosx_14_0_arm64", "--only-binary", ":all:", "--no-deps"]
        fetch(arguments, "metal-cpp", "download", *wanted, "--dest", folder, MLX_METAL)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("mlx/include/metal_cpp/")]
            archive.extractall(folder, names)
        wheel.unlink()
    return headers


def zig(arguments: argparse.Namespace) -> dict[str, str]:
    """The environment in which `python -m ziglang` runs."""
    if importlib.util.find_spec("ziglang") is not None:
        return dict(os.environ)
    packages = arguments.build / "ziglang"
    if not (packages / "ziglang").exists():
        fetch(arguments, "ziglang", "install", "--target", packages, ZIGLANG)
    return {**os.environ, "PYTHONPATH": str(packages)}


def signatures(_: argparse.Namespace) -> None:
    """Buffers 0, 1, 2, ... in parameter order, arguments first, THREAD_POSITION last."""
    found = 0
    for file in KERNELS:
        # Kernels that a macro makes are spelled with line continuations.
        text = re.sub(r"//[^\n]*", "", file.read_text()).replace("\\\n", "\n")
        for name, parameters in re.findall(r"kernel void ([\w#]+)\(([^{]*)\)\s*\{", text):
            found += 1
            indices = [int(i) for i in re.findall(r"\[\[buffer\((\d+)\)\]\]", parameters)]
            where = f"{file.relative_to(ROOT)}: {name}"
            if indices != list(range(len(indices))) or len(indices) < 2:
                raise Failure(f"{where}: buffers {indices}, expected 0, 1, 2, ...")
            if not re.match(r"\s*constant \w+& \w+ \[\[buffer\(0\)\]\]", parameters):
                raise Failure(f"{where}: buffer 0 is not `constant Arguments&`")
            if parameters.count(",") != len(indices) or "THREAD_POSITION" not in parameters:
                raise Failure(f"{where}: parameters besides buffers and one THREAD_POSITION")
    if found < 12:
        raise Failure(f"only {found} kernels found in metal/kernels")
    print(f"{found} kernel signatures")


SCALARS = (
    "void|bool|float|half|long|ulong|u?char|u?short|u?int|u?int(?:8|16|32|64)_t|i32|u32|i64|u64"
)
POINTER = re.compile(
    rf"(?:\b(device|threadgroup|thread|constant)\s+)?(?:const\s+)?"
    rf"\b(?:{SCALARS}|[A-Z]\w*)\d?(?:\s+const)?\s*(?:\(&|[*&])\s*(?=[\w)])"
)


def unqualified(file: Path) -> list[str]:
    """Pointers and references without an address space: OpenCL takes them, Metal does not."""
    text = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), file.read_text())
    return [
        f"{file.name}:{text.count(chr(10), 0, found.start()) + 1}: `{found[0].strip()}` without "
        "an address space"
        for found in POINTER.finditer(text)
        if found[1] is None
    ]


def address_spaces(_: argparse.Namespace) -> None:
    clang = tool("clang-19", "clang-19")
    command = [clang, "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-fsyntax-only"]
    command += ["-Wno-unknown-attributes"]
    includes = [f"-I{HERE / 'strict'}", f"-I{ROOT}"]
    for file in KERNELS:
        run(*command, *includes, file)
    headers = sorted((ROOT / "metal" / "kernels").rglob("*.h"))
    if wrong := [line for file in [*KERNELS, *headers] for line in unqualified(file)]:
        raise Failure("\n".join(wrong))
    planted = sorted((HERE / "strict" / "planted").glob("*.metal"))
    for file in planted:
        refused = subprocess.run([*command, *includes, str(file)], capture_output=True, text=True)
        found = refused.returncode != 0 and "address space" in refused.stderr
        if not found and not unqualified(file):
            raise Failure(f"{file.name}: the planted mistake was not found\n{refused.stderr}")
    if not planted:
        raise Failure("no planted mistakes: the check could be blind")
    print(f"{len(KERNELS)} files, {len(planted)} planted mistakes refused")


def built(arguments: argparse.Namespace, name: str, *options: str, target: str = "all") -> Path:
    """Builds the programs, or one target, and gives their folder."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Skip("the fake runtime passes messages on x86-64 Linux only")
    compiler = tool("clang++-19", "clang-19 libclang-rt-19-dev")
    cmake, ninja = tool("cmake", "cmake"), tool("ninja", "ninja-build")
    if arguments.library is None:
        raise Skip("no --library libmoesaic.a to link with")
    folder: Path = arguments.build / name
    settings = {
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_MAKE_PROGRAM": ninja,
        "MOESAIC_LIBRARY": arguments.library.resolve(),
        "MOESAIC_METAL_CPP": metal_cpp(arguments),
    }
    defines = [f"-D{key}={value}" for key, value in settings.items()]
    log = ["--log-level=WARNING"]
    run(cmake, "-S", HERE, "-B", folder, "-G", "Ninja", *log, *defines, *options)
    run(cmake, "--build", folder, "--target", target)
    return folder


def emulation(arguments: argparse.Namespace) -> None:
    folder = built(arguments, "emulation")
    run(tool("ctest", "cmake"), "--test-dir", folder, "--output-on-failure", "--no-tests=error")


def python(arguments: argparse.Namespace) -> None:
    """The module of a build, linked once more with the fake, beside the rest of the package."""
    for package in ("pytest", "numpy", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is missing (pip install {package})")
    bindings = arguments.library.resolve().parents[1] / "python" / "bindings"
    modules = sorted(bindings.glob("_core*.so"))
    objects = sorted((bindings / "CMakeFiles" / "_core.dir").rglob("*.o"))
    if not modules or not objects:
        raise Skip(f"no moesaic._core in {bindings} (build with -DMOESAIC_PYTHON=ON)")
    names = ";".join(map(str, objects))
    options = [f"-DMOESAIC_CORE_OBJECTS={names}", f"-DMOESAIC_CORE_NAME={modules[0].name}"]
    folder = built(arguments, "emulation", *options, target="fake_core") / "python"
    for entry in (ROOT / "python" / "moesaic").iterdir():
        link = folder / "moesaic" / entry.name
        if entry.name.startswith("_core.") and entry.suffix != ".pyi":
            continue
        if not link.is_symlink():
            link.symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder]
    run(*pytest, HERE / "python", env=environment)


def race(arguments: argparse.Namespace) -> None:
    folder = built(arguments, "race", "-DMOESAIC_METAL_RACE=ON")
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ctest = [tool("ctest", "cmake"), "--test-dir", str(folder), "--output-on-failure"]
    run(*ctest, "--no-tests=error", env=environment)


def count(_: argparse.Namespace) -> None:
    tool("clang-19", "clang-19")
    run(sys.executable, HERE / "count.py", "--bounds", HERE / "count.tsv")


def macos(arguments: argparse.Namespace) -> None:
    """Types and ABI of every call into Metal; the frameworks themselves are resolved on a Mac."""
    headers = metal_cpp(arguments)
    folder = arguments.build / "macos"
    folder.mkdir(parents=True, exist_ok=True)
    environment = zig(arguments)
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos.14.0"]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}"]
    flags += [f"-I{ROOT / 'cpp' / 'include'}", f"-I{ROOT / 'cpp' / 'src'}"]
    flags += ["-isystem", str(headers), "-isystem", str(HERE / "headers" / "frameworks")]
    source = folder / "kernel_source.cpp"
    run(tool("cmake", "cmake"), f"-DOUT={source}", "-P", ROOT / "metal" / "embed.cmake")
    objects = []
    files = sorted((ROOT / "metal" / "host").glob("*.cpp"))
    for file in [*files, ROOT / "metal" / "dispatch_shape.cpp", source]:
        objects.append(folder / f"{file.stem}.o")
        run(*compiler, *flags, "-c", file, "-o", objects[-1], env=environment)
    bench = ROOT / "tests" / "bench" / "metal_bench.cpp"
    tests = f"-I{ROOT / 'tests' / 'cpp'}"
    run(*compiler, *flags, tests, "-c", bench, "-o", folder / "metal_bench.o", env=environment)
    library = folder / "libmoesaic_metal.dylib"
    # All that a Mac brings is left to it, the C++ library too: making that here takes minutes.
    link = ["-shared", "-nostdlib", "-Wl,-undefined,dynamic_lookup", "-o", library]
    run(*compiler, *objects, *link, env=environment)
    magic = library.read_bytes()[:8]
    if magic != bytes.fromhex("cffaedfe0c000001"):  # 64-bit Mach-O, arm64
        raise Failure(f"{library} is no arm64 library: {magic.hex()}")
    print(f"{len(objects)} files compiled and linked for macOS arm64")


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "signatures": signatures,
    "address_spaces": address_spaces,
    "emulation": emulation,
    "python": python,
    "race": race,
    "count": count,
    "macos": macos,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--library", type=Path, help="libmoesaic.a, for emulation and race")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "metal")
    parser.add_argument("--fetch", action="store_true", help="get what is missing from PyPI")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    arguments.build = arguments.build.resolve()
    skipped, failed = False, False
    for name in arguments.steps or STEPS:
        try:
            STEPS[name](arguments)
            print(f"metal {name}: passed", flush=True)
        except Skip as reason:
            skipped = True
            print(f"metal {name}: SKIPPED, {reason}", flush=True)
        except Failure as mistake:
            failed = True
            print(f"metal {name}: FAILED, {mistake}", flush=True)
    return 1 if failed else SKIPPED if skipped else 0


if __name__ == "__main__":
    sys.exit(main())

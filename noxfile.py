"""Everything CI does, runnable at home: `nox` runs all sessions, `nox -s lint` one of them.

tests     ctest (dev preset) and pytest on the installed package
lint      ruff, clang-format, mypy, stubtest
wheel     sdist -> wheel, its content and symbols, a clean environment without a compiler
sanitize  ctest under AddressSanitizer + UBSan, the thread tests under ThreadSanitizer; with the
          kernels of two instruction sets, `nox -s sanitize -- all` with those of all
gpu       nvcc on every CUDA kernel, bounds on its instructions, and all checks of Metal (skips what
          lacks nvcc or clang 19)
fuzz_python  fuzzers of checkpoints, forwards and misuse from Python, half a minute each; those of
          the C++ library replay their corpus in ctest, under sanitizers too
race      emulated CUDA kernels under ThreadSanitizer (Linux; skipped without clang 19)
parity    layers and whole models beside transformers, and over several processes (torch, 200 MB)
numa      a layer in QEMU machines of one to four NUMA nodes: where its pages and threads are
          (Linux on x86-64; skipped without QEMU or a kernel to boot)
arm       the kernels' tests for 64-bit Arm: cross compiler and qemu (Linux; skipped without them)
docs      the documentation site in build/docs; a broken link or reference fails
pythons   every CPython from 3.11 to 3.14 found here: build, install, import, demo

On request:
fuzz      all fuzzers, on a library that is made for them; `nox -s fuzz -- --hours 2`
sanitize_python  pytest on the Python module under AddressSanitizer + UBSan, and its tests of
                 threads under ThreadSanitizer (Linux)
wheels    what a release holds, in dist/: the sdist, and a wheel of each CPython
lock      the newest versions within the ranges of pyproject.toml and of this file, with their
          hashes, to .ci/locks
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
SESSIONS = [
    "tests", "lint", "wheel", "sanitize", "fuzz_python", "gpu", "race", "parity", "numa", "arm",
    "docs", "pythons",
]  # fmt: skip
nox.options.sessions = SESSIONS

ROOT = Path(__file__).parent
WORK = ROOT / "build" / "nox"
DIST = ROOT / "dist"
# What sessions install beside what pyproject.toml asks for; install() takes the locked versions.
TOOLS = {
    "nox": ["nox>=2024.4.15"],
    "cmake": ["cmake>=3.24,<5", "ninja>=1.11"],
    "lint": ["ruff>=0.17,<0.18", "clang-format==19.1.*", "mypy>=1.15,<3"],
    "wheel": ["pytest>=8,<10", "auditwheel>=6"],
    "parity": [
        "torch==2.13.0",
        "transformers>=5.2,<6",
        "accelerate>=1.5,<2",
        "peft>=0.17,<1",
        "mpi4py>=4,<5",
        "mpich>=4,<6",
        "mlx[cpu]>=0.30,<1; sys_platform == 'linux'",
    ],
    "sdist": ["build>=1"],
    "sass": ["nvidia-cuda-cuobjdump>=13,<14", "nvidia-cuda-nvdisasm>=13,<14"],
    "lock": ["uv>=0.9"],
}
# A file of versions and hashes for each of groups(), and one of versions alone. The sdist has none.
LOCKS = ROOT / ".ci" / "locks"
# PyPI's torch for Linux brings CUDA along, which no session needs: the index decides which comes.
UNLOCKED = {"parity"}
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
RELEASED_PYTHONS = ["3.10", *PYTHONS]
# The programs whose tests make calls from several threads, and those tests.
TSAN_PROGRAMS = [
    *("thread_pool_test", "forward_invariance_test", "profile_test", "gguf_sharing_test"),
    *("workspace_test", "offload_store_test", "offload_disk_test"),
]
TSAN_TESTS = "Thread|Pool|Concurrent|Races|AtATime|WhileExpertsMove|DiskSource"
# What runs on the Python module with each sanitizer: everything, and the tests of threads.
SANITIZED = {
    "asan": ["tests/python"],
    "tsan": [
        f"tests/python/test_{name}.py"
        for name in ("threads", "changing_arguments", "profile", "offload")
    ],
}

# With paths relative to the tree, what ccache keeps serves every clone and build folder of it.
os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
os.environ.setdefault("CCACHE_NOHASHDIR", "1")

# Labels of tests that run compilers for minutes.
GPU_CHECKS = "metal|gpu-compile"


@nox.session
def tests(session: nox.Session) -> None:
    need_gtest(session)
    install(session, "cmake")
    session.run("cmake", "--preset", "dev", "--fresh")
    session.run("cmake", "--build", "--preset", "dev")
    session.run("ctest", "--preset", "dev", f"-j{os.cpu_count()}", "-LE", GPU_CHECKS)
    install_package(session)
    env = {}
    if platform.system() == "Linux":  # the backend's Python face over emulated kernels
        session.run("cmake", "--build", "--preset", "dev", "--target", "moesaic_cuda_emulated")
        plugin = ROOT / "build" / "dev" / "tests" / "emulation" / "plugin"
        env["EMULATED_GPU_FOLDER"] = str(plugin)
    session.run("pytest", *session.posargs, env=env)


@nox.session
def lint(session: nox.Session) -> None:
    install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    kinds = [f"*.{kind}" for kind in ("cpp", "hpp", "h", "cu", "cuh", "metal")]
    sources = subprocess.check_output(["git", "ls-files", *kinds], text=True, cwd=ROOT)
    session.run("clang-format", "--dry-run", "-Werror", *sources.split(), silent=True)
    install_package(session)
    session.run("mypy")
    allowed = ["--allowlist", "tests/python/stubtest_allowlist.txt", "--ignore-unused-allowlist"]
    session.run("stubtest", "moesaic._core", *allowed)


@nox.session
def wheel(session: nox.Session) -> None:
    check_wheel(session, built_wheel(session))


@nox.session
def wheels(session: nox.Session) -> None:
    """Each is tested, in an environment of its Python; fails where one of these is missing."""
    if not makes_releases():
        session.error("published wheels are made on Debian 12 for x86-64 (python/wheels/README.md)")
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    missing = []
    for version in RELEASED_PYTHONS:
        interpreter = find_python(version)
        if interpreter is None:
            missing.append(version)
            continue
        package = released_wheel(session, interpreter)
        check_wheel(session, package, "--python", interpreter)
        shutil.copy(package, DIST)
    source = unpacked_sdist(session)
    shutil.copy(source.with_name(f"{source.name}.tar.gz"), DIST)
    for path in sorted(DIST.iterdir()):
        session.log(f"{path.stat().st_size / 1e6:.1f} MB  {path.name}")
    if missing:
        session.error(f"no wheels for Python {', '.join(missing)}, not found here")


@nox.session
def sanitize(session: nox.Session) -> None:
    need_gtest(session)
    install(session, "cmake")
    # Instrumented, the kernels of AVX-512 alone take minutes to compile.
    isas = [] if "all" in session.posargs else ["-DMOESAIC_CPU_ISAS=avx2;neon"]
    targets = ["--target", *TSAN_PROGRAMS]
    for preset, build, select in (("asan", [], []), ("tsan", targets, ["-R", TSAN_TESTS])):
        session.run("cmake", "--preset", preset, "--fresh", *isas)
        session.run("cmake", "--build", "--preset", preset, *build)
        session.run("ctest", "--preset", preset, f"-j{os.cpu_count()}", *select)


@nox.session
def sanitize_python(session: nox.Session) -> None:
    """One sanitizer by name, or both: `nox -s sanitize_python -- tsan`.

    The tests take 17 minutes of one core with the first and 6 with the second, the modules 10 to
    compile, beside the library. Tests marked cost are left out.
    """
    if platform.system() != "Linux":
        session.skip("preloads the runtimes of GCC's sanitizers")
    module = install_for_module(session)
    for preset in session.posargs or SANITIZED:
        build = ROOT / "build" / preset
        options = ["--fresh", "-DMOESAIC_CPU_ISAS=avx2;neon", *module]
        session.run("cmake", "--preset", preset, *options)
        session.run("cmake", "--build", "--preset", preset, "--target", "_core")
        package = build / "package" / "moesaic"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(ROOT / "python" / "moesaic", package, ignore=shutil.ignore_patterns("*.so"))
        (built,) = (build / "python" / "bindings").glob("_core*.so")
        shutil.copy(built, package)
        # Python is not instrumented, so the runtime comes first, and with it the C++ library,
        # whose exceptions it watches. So it is in every process that tests start.
        libraries = [f"lib{preset}.so", "libstdc++.so"]
        find = [os.environ.get("CXX", "c++")]
        paths = [
            subprocess.check_output([*find, f"-print-file-name={name}"], text=True).strip()
            for name in libraries
        ]
        env = {
            "LD_PRELOAD": " ".join(paths),
            "PYTHONPATH": str(package.parent),
            "PYTHONMALLOC": "malloc",
            # Leaks are those of Python and numpy, which never free what they keep.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # With a short history a report may lack the stack of numpy, which is left out by name.
            "TSAN_OPTIONS": f"history_size=7:suppressions={ROOT / 'tests/python/tsan.supp'}",
        }
        options = ["-p", "no:cacheprovider", "-m", "not cost"]
        options += ["--capture=sys"]  # a report goes to the descriptor, and ends the process
        session.run("pytest", *options, *SANITIZED[preset], env=env)


@nox.session
def fuzz_python(session: nox.Session) -> None:
    """Those that need no build of their own."""
    install_package(session)
    names = ["checkpoints", "forward", "misuse"]
    session.run("python", "tests/fuzz/run.py", *names, *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Arguments go to tests/fuzz/run.py: names of fuzzers, --seed, --runs, --seconds, --hours.

    It builds the library with clang, sanitizers and counters: five minutes on two cores.
    """
    need_gtest(session)
    need_clang(session)
    install(session, "cmake")
    session.run("cmake", "--preset", "fuzz", "--fresh")
    session.run("cmake", "--build", "--preset", "fuzz")
    install_package(session)
    session.run("python", "tests/fuzz/run.py", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Downloads metal-cpp and a cross compiler for macOS (125 MB)."""
    need_gtest(session)
    need_clang(session)
    if shutil.which("nvcc") and not shutil.which("cuobjdump"):
        install(session, "sass")
    session.run("cmake", "--preset", "dev", *install_for_module(session))
    session.run("cmake", "--build", "--preset", "dev", "--target", "moesaic", "_core")
    session.run("ctest", "--preset", "dev", "-L", "gpu-compile")
    build = ROOT / "build" / "dev"
    where = ["--library", build / "cpp" / "libmoesaic.a", "--build", build / "metal_checks"]
    check = ROOT / "tests" / "emulation" / "metal" / "check.py"
    session.run("python", check, "--fetch", *map(str, where), success_codes=[0, 77])


@nox.session
def race(session: nox.Session) -> None:
    """Every emulated kernel from one in-order run: the checker needs no lucky schedule."""
    need_gtest(session)
    need_clang(session)
    install(session, "cmake")
    session.run("cmake", "--preset", "race", "--fresh")
    session.run("cmake", "--build", "--preset", "race")
    session.run("ctest", "--preset", "race", f"-j{os.cpu_count()}")


@nox.session
def parity(session: nox.Session) -> None:
    install(session, "parity")
    install_package(session)
    session.run("pytest", "tests/parity", *session.posargs)


@nox.session
def numa(session: nox.Session) -> None:
    """Needs no machine with several nodes; the kernel is Debian's for virtual machines (15 MB)."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        session.skip("the guests are Linux on x86-64")
    need_gtest(session)  # the tests' folder is configured as a whole
    if not shutil.which("qemu-system-x86_64") and not installed(session, ["qemu-system-x86"]):
        session.skip("qemu-system-x86_64 is missing and cannot be installed here")
    kernel = guest_kernel(session)
    if kernel is None:
        session.skip("no kernel for virtual machines can be had here")
    install(session, "cmake")
    session.run("cmake", "--preset", "dev")
    session.run("cmake", "--build", "--preset", "dev", "--target", "numa_guest")
    program = ROOT / "build" / "dev" / "tests" / "numa_guest"
    run = ["python", "tests/numa/run.py", "--program", str(program), "--kernel", str(kernel)]
    session.run(*run)


@nox.session
def arm(session: nox.Session) -> None:
    """NEON kernels against the scalar twin and f64, under emulation."""
    need_gtest(session)
    tools = ["aarch64-linux-gnu-g++", "qemu-aarch64-static"]
    if not all(map(shutil.which, tools)):
        packages = ["g++-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user-static"]
        if not installed(session, packages):
            session.skip(f"{' and '.join(tools)} are missing and cannot be installed here")
    install(session, "cmake")
    programs = ["cpu_kernels_test", "cpu_layer_test", "encode_test", "isa_test", "quant_test"]
    session.run("cmake", "--preset", "aarch64", "--fresh")
    session.run("cmake", "--build", "--preset", "aarch64", "--target", *programs)
    emulator = ["qemu-aarch64-static", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
    for program in programs:
        path = ROOT / "build" / "aarch64" / "tests" / program
        session.run(*emulator, str(path), "--gtest_brief=1", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Reads sources and stubs only: nothing is compiled."""
    install(session, "docs")
    # The theme tells every reader of a log that its successor reads the same mkdocs.yml.
    env = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", "-f", "python/docs/mkdocs.yml", env=env)
    session.log("to read and search it: python -m http.server --bind 127.0.0.1 -d build/docs")


@nox.session
def pythons(session: nox.Session) -> None:
    own = platform.python_version().rsplit(".", 1)[0]
    for version in PYTHONS:
        interpreter = find_python(version)
        if interpreter is None:
            session.log(f"SKIPPED: Python {version} was not found")
            continue
        venv = Path(session.create_tmp()) / f"venv-{version}"
        shutil.rmtree(venv, ignore_errors=True)
        session.run(interpreter, "-m", "venv", str(venv), external=True)
        pip = [str(venv / "bin" / "pip"), "install", "--quiet"]
        if version == own:
            source = built_wheel(session)
            session.run(*pip, str(source), external=True)
        else:
            source = unpacked_sdist(session)
            options, env = as_in_dev(source, version)
            session.run(*pip, *options, str(source), env=env, external=True)
        session.run(str(venv / "bin" / "moesaic"), "demo", silent=True, external=True)
        session.log(f"Python {version}: installed from {source.name}, demo passed")


@nox.session
def lock(session: nox.Session) -> None:
    install(session, "lock")
    compile_lock = ["uv", "pip", "compile", "--universal", "--python-version", "3.10"]
    compile_lock += ["--no-annotate", "--no-header", "--upgrade", "--quiet"]
    wanted = Path(session.create_tmp()) / "requirements.in"
    locked = {name: needs for name, needs in groups().items() if name not in UNLOCKED}
    wanted.write_text("\n".join(one for needs in locked.values() for one in needs) + "\n")
    LOCKS.mkdir(exist_ok=True)
    # Groups meet in one environment, so a package has one version in all of them.
    versions = str(LOCKS / "versions.txt")
    session.run(*compile_lock, "-o", versions, str(wanted))
    for name, needs in locked.items():
        wanted.write_text("\n".join(needs) + "\n")
        out = str(LOCKS / f"{name}.txt")
        session.run(*compile_lock, "--generate-hashes", "-c", versions, "-o", out, str(wanted))


def groups() -> dict[str, list[str]]:
    """All that sessions install from PyPI, by what it is for."""
    project = nox.project.load_toml("pyproject.toml")
    needs = project["project"]["dependencies"]
    extras = project["project"]["optional-dependencies"]
    return {
        **TOOLS,
        "build": project["build-system"]["requires"],
        "package": [*needs, *extras["test"]],
        "docs": extras["docs"],
    }


def install(session: nox.Session, name: str) -> None:
    """Install a group in the versions of its lock; without one, any within the ranges."""
    lock = LOCKS / f"{name}.txt"
    if lock.exists():
        session.install("--require-hashes", "-r", str(lock))
    else:
        session.install(*groups()[name])


def install_for_module(session: nox.Session) -> list[str]:
    """Install what building the Python module and its tests needs; returns options for CMake."""
    for group in ("cmake", "build", "package"):
        install(session, group)
    python = subprocess.check_output(
        [f"{session.bin}/python", "-c", "import sys; print(sys.executable)"], text=True
    ).strip()
    return ["-DMOESAIC_PYTHON=ON", f"-DPython_EXECUTABLE={python}"]


def install_package(session: nox.Session) -> None:
    """Install the wheel, and what it and its tests need."""
    install(session, "package")
    session.install("--no-deps", str(built_wheel(session)))


_made: dict[str, Path] = {}


def unpacked_sdist(session: nox.Session) -> Path:
    """The folder that an sdist of this tree unpacks to, made once per run of nox."""
    if "sdist" not in _made:
        install(session, "sdist")
        shutil.rmtree(WORK, ignore_errors=True)
        session.run("python", "-m", "build", "--sdist", "--outdir", str(WORK), env=dated())
        (archive,) = WORK.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(WORK, filter="data")
        _made["sdist"] = WORK / archive.name.removesuffix(".tar.gz")
    return _made["sdist"]


def as_in_dev(folder: Path, name: str) -> tuple[list[str], dict[str, str]]:
    """What makes pip compile the library in a folder just as the dev preset does.

    Then ccache has its objects already: the lines for debuggers, which the preset asks for, are
    stripped from wheels, and paths are the same seen from the build folder.
    """
    settings = {
        "build-dir": str(folder / "build" / name),
        "cmake.define.CMAKE_CXX_FLAGS": "-g1",
        "cmake.define.MOESAIC_WERROR": "ON",
    }
    options = [f"--config-settings={key}={value}" for key, value in settings.items()]
    # CMake would take c++, scikit-build-core g++: the same compiler, but not to ccache.
    env = {"CCACHE_BASEDIR": str(folder), "CXX": os.environ.get("CXX", "c++")}
    # What builds the wheel is installed by pip alone, which takes versions for that but no hashes.
    if (LOCKS / "versions.txt").exists():
        env["PIP_CONSTRAINT"] = env["PIP_BUILD_CONSTRAINT"] = str(LOCKS / "versions.txt")
    return options, env


def dated() -> dict[str, str]:
    """The time that archives carry: that of the commit, so that a source gives the same bytes."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    first = "315532800"  # 1980, before which a zip file knows no time
    return {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or commit or first}


def makes_releases() -> bool:
    """Whether wheels are made here as they are published: by Debian 12's compiler, for x86-64."""
    here = (platform.machine(), *platform.libc_ver())
    return here == ("x86_64", "glibc", "2.36") and "CXX" not in os.environ


def built_wheel(session: nox.Session) -> Path:
    """The wheel for the Python of nox, made from the sdist once per run of nox."""
    if makes_releases():
        return released_wheel(session, f"{session.bin}/python")
    if "wheel" not in _made:
        folder, target = unpacked_sdist(session), WORK / "wheel"
        options, env = as_in_dev(folder, "own")
        wheel = ["python", "-m", "pip", "wheel", "--no-deps", "-w", str(target), *options]
        session.run(*wheel, str(folder), env=env)
        (_made["wheel"],) = target.glob("*.whl")
    return _made["wheel"]


def released_wheel(session: nox.Session, interpreter: str) -> Path:
    """The wheel for a Python as it is published, made once per run of nox."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    version = subprocess.check_output([interpreter, "-c", code], text=True).strip()
    if version not in _made:
        folder, out = unpacked_sdist(session), WORK / f"wheel-{version}"
        options, env = as_in_dev(folder, f"wheel-{version}")
        make = ["python", "python/wheels/make.py", "--python", interpreter, "--out", str(out)]
        make += ["--work", str(ROOT / "build" / "wheels")]
        session.run(*make, str(folder), *options, env={**env, **dated()})
        (_made[version],) = out.glob("*.whl")
    return _made[version]


def check_wheel(session: nox.Session, package: Path, *options: str) -> None:
    """Read it, and install and run it; options are those of tests/build."""
    install(session, "wheel")
    if platform.system() == "Linux":
        session.run("auditwheel", "show", str(package))
    session.run("pytest", "tests/build", "--wheel", str(package), *options)


def find_python(version: str) -> str | None:
    """A CPython of this version that runs: on the PATH, or one that pyenv keeps."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    kept = sorted(pyenv.glob(f"{version}.*/bin/python{version}"))
    for candidate in [on_path, *map(str, kept)]:
        # pyenv has shims for versions that are off; a Python without venv is no use.
        if (
            candidate
            and subprocess.run(
                [candidate, "-c", "import venv, ensurepip"], capture_output=True
            ).returncode
            == 0
        ):
            return candidate
    return None


def need_gtest(session: nox.Session) -> None:
    """Install Debian's GoogleTest when it is missing and this user may; else say the command."""
    places = ["/usr/include", "/usr/local/include", "/opt/homebrew/include"]
    if any((Path(p) / "gtest" / "gtest.h").exists() for p in places) or "GTest_ROOT" in os.environ:
        return
    if not installed(session, ["libgtest-dev"]):
        session.error(
            "GoogleTest is missing. Debian, Ubuntu: sudo apt-get install libgtest-dev; "
            "Homebrew: brew install googletest; elsewhere set GTest_ROOT"
        )


def need_clang(session: nox.Session) -> None:
    """Install Debian's clang 19 when it is missing and this user may; else skip, saying so."""
    if shutil.which("clang++-19"):
        return
    if not installed(session, ["clang-19", "libclang-rt-19-dev"]):
        session.skip("clang++-19 is missing and cannot be installed here")


def installed(session: nox.Session, packages: list[str]) -> bool:
    """Install Debian packages; false where this user or this machine cannot."""
    apt = apt_get()
    if apt is None:
        return False
    install = [*apt, "install", "-yq", "--no-install-recommends", *packages]
    try:
        session.run(*apt, "update", "-q", external=True)
        session.run(*install, external=True)
    except CommandFailed:
        return False
    return True


def guest_kernel(session: nox.Session) -> Path | None:
    """A Linux kernel that QEMU can boot, from the Debian package; None where apt has none."""
    folder = ROOT / "build" / "guest_kernel"
    find = ["apt-cache", "depends", "linux-image-cloud-amd64"]
    try:
        if not any(folder.glob("boot/vmlinuz-*")):
            listed = subprocess.run(find, capture_output=True, text=True, check=True).stdout
            (package,) = re.findall(r"Depends: (linux-image-[0-9]\S*)", listed)[:1]
            folder.mkdir(parents=True, exist_ok=True)
            with session.chdir(folder):
                session.run("apt-get", "download", package, external=True)
                for archive in folder.glob("*.deb"):
                    session.run("dpkg-deb", "-x", archive.name, ".", external=True)
                    archive.unlink()
    except (OSError, ValueError, subprocess.CalledProcessError, CommandFailed):
        return None
    return next(folder.glob("boot/vmlinuz-*"), None)


def apt_get() -> list[str] | None:
    """The command to install Debian packages with, if this user may."""
    if not shutil.which("apt-get"):
        return None
    if os.geteuid() == 0:
        return ["apt-get"]
    sudo = shutil.which("sudo")
    may = sudo and subprocess.run([sudo, "-n", "true"], capture_output=True).returncode == 0
    return [str(sudo), "-n", "apt-get"] if may else None

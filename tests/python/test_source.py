"""What the source says of itself is so: named paths exist, variables and options are read.

These tests read the checkout and nothing that was built; elsewhere they skip.
"""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import tokenize
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@cache
def tracked() -> tuple[str, ...]:
    """Every file of the checkout; also those not yet added, without what git ignores."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(name for name in listed if (ROOT / name).is_file())


pytestmark = pytest.mark.skipif(not tracked(), reason="not in a checkout")


def files(*patterns: str) -> list[str]:
    return [name for name in tracked() if any(Path(name).match(p) for p in patterns)]


# --- comments, docstrings and pages


def python_prose(text: str) -> str:
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    nodes = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return "\n".join(comments + [ast.get_docstring(node) or "" for node in nodes])


def prose_of(name: str) -> str:
    """What a file says to its reader: the whole of a page, the comments and docstrings of code."""
    text = (ROOT / name).read_text()
    suffix = Path(name).suffix
    if suffix == ".md":
        return text
    if suffix in (".py", ".pyi"):
        return python_prose(text)
    if suffix in (".cmake", ".txt", ".toml", ".yaml") or name == ".ci/run":
        return "\n".join(re.findall(r"(?:^|\s)#(.*)", text))
    return "\n".join(re.findall(r"(?<!:)//(.*)", text) + re.findall(r"/\*(.*?)\*/", text, re.S))


# --- paths

PROSE = (
    "*.md", "*.hpp", "*.cpp", "*.h", "*.cu", "*.cuh", "*.metal", "*.inc", "*.py", "*.pyi",
    "*.cmake", "CMakeLists.txt", "*.toml", "*.yaml", ".ci/run",
)  # fmt: skip
SUFFIXES = "md|hpp|cpp|h|cu|cuh|metal|inc|py|pyi|cmake|txt|json|toml|yaml|sh|bin"
# A path may hold patterns: *, <isa>, {a,b}. What follows a dot is no suffix when more letters come.
NAMED_FILE = re.compile(
    rf"(?<![\w./*<>{{}}$-])((?:\.\./)*[\w*<{{][\w./*<>{{}},-]*\.(?:{SUFFIXES}))(?![\w(]|\.\w)"
)
TOP = ("cpp", "cuda", "metal", "python", "tests", "cmake", "third_party")
NAMED_FOLDER = re.compile(rf"(?<![\w./-])((?:{'|'.join(TOP)})/[\w./*<>{{}},-]*[\w/])(?![\w(*<{{])")
# Where a path may start beside the folders above the file that names it.
BASES = (
    "", "cpp", "cpp/include", "cpp/include/moesaic", "cpp/src", "cpp/src/cpu", "cuda", "metal",
    "python", "python/moesaic", "tests", "tests/emulation",
)  # fmt: skip
# Names of files that are not here, with whose they are.
ELSEWHERE = {
    "llama.cpp": "a project",
    "ik_llama.cpp": "a project",
    "config.json": "of a checkpoint",
    "model.safetensors.index.json": "of a checkpoint",
    "consolidated.safetensors.index.json": "of a checkpoint",
    "docs/gguf.md": "of ggml",
    "ggml-common.h": "of ggml",
    "pyconfig.h": "of Python",
    "docs_table.cpp": "made by python/bindings/generate_docs.py at build time",
    "Metal/Metal.hpp": "of metal-cpp",
    "Foundation/Foundation.hpp": "of metal-cpp",
    "my_test.cpp": "the reader's",
    "cuda/x.cu": "the reader's",
}


@cache
def bare_names() -> set[str]:
    return {Path(name).name for name in tracked()}


def exists(path: str, named_in: str) -> bool:
    path = re.sub(r"<[^>]*>", "*", path).rstrip("/.")
    if "{" in path:
        choices = re.search(r"\{([^}]*)\}", path)
        assert choices, path
        return all(
            exists(path.replace(choices[0], choice, 1), named_in)
            for choice in choices[1].split(",")
        )
    above = [str(p) for p in Path(named_in).parents]
    for base in (*above, *BASES):
        folder = (ROOT / base).resolve()
        try:
            if any(
                folder.glob(path) if "*" in path else [p for p in [folder / path] if p.exists()]
            ):
                return True
        except (ValueError, NotImplementedError):
            continue
    # A bare name is enough to find a file by.
    return "/" not in path and any(fnmatch(bare, path) for bare in bare_names())


def lost_paths(text: str, named_in: str) -> list[str]:
    text = re.sub(r"\w+://\S+", "", text)
    named = {
        path if ">" in path else path.removeprefix("<")
        for path in NAMED_FILE.findall(text) + NAMED_FOLDER.findall(text)
    }
    return sorted(p for p in named if p not in ELSEWHERE and not exists(p, named_in))


def test_named_paths_exist() -> None:
    lost = {name: lost_paths(prose_of(name), name) for name in files(*PROSE)}
    assert {name: paths for name, paths in lost.items() if paths} == {}


def test_a_lost_path_is_noticed() -> None:
    text = "in `cpp/src/base/env.cpp`, base/env.cpp, gone/env.cpp, {env,gone}.hpp, cpp/src/gone/"
    assert lost_paths(text, "README.md") == ["cpp/src/gone/", "gone/env.cpp", "{env,gone}.hpp"]


# --- the public headers


def test_moesaic_hpp_is_in_reading_order() -> None:
    folder = ROOT / "cpp/include/moesaic"
    includes = {
        path.name: re.findall(r'#include "moesaic/(\w+\.hpp)"', path.read_text())
        for path in folder.glob("*.hpp")
    }
    order = includes.pop("moesaic.hpp")
    assert sorted(order) == sorted(includes), "moesaic.hpp is the whole library"
    for place, header in enumerate(order):
        later = set(includes[header]) & set(order[place:])
        assert not later, f"{header} needs {later}, which stand below it"


# --- errors


@cache
def error_classes() -> set[str]:
    classes = {"Error"}
    for node in ast.parse((ROOT / "python/moesaic/_core.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef) and classes & {ast.unparse(base) for base in node.bases}:
            classes.add(node.name)
    return classes


def errors_of_text(text: str) -> list[str]:
    """Calls of the core's error classes, whose errors would have no field but their message."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value).split(".")[-1] == "_core"
        and node.func.attr in error_classes()
    ]


def test_errors_of_the_package_have_fields() -> None:
    places = [name for name in files("*.py") if name.startswith("python/moesaic/")]
    assert len(places) > 50 and len(error_classes()) > 10
    found = {name: errors_of_text((ROOT / name).read_text()) for name in places}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_an_error_of_text_is_noticed() -> None:
    text = (
        "raise _core.ShapeError('x: expected 1')\nraise _core.make_error(_core.Error, 'load', 'x')"
    )
    assert errors_of_text(text) == ["_core.ShapeError('x: expected 1')"]


# --- variables, options and commands


def code_of(name: str) -> str:
    """The file without what it says in prose."""
    text = (ROOT / name).read_text()
    if Path(name).suffix in (".cmake", ".txt"):
        return re.sub(r"(?:^|(?<=\s))#.*", "", text)
    return re.sub(r"(?<!:)//.*|/\*.*?\*/", "", text, flags=re.S if "/*" in text else 0)


def found(pattern: str, *patterns: str) -> set[str]:
    names = files(*patterns)
    return {match for name in names for match in re.findall(pattern, code_of(name), flags=re.M)}


CMAKE = ("CMakeLists.txt", "*.cmake")
SOURCES = ("*.cpp", "*.hpp", "*.h", "*.cu", "*.cuh", "*.metal", "*.inc")


def knob_variables() -> set[str]:
    return set(re.findall(r'"(MOESAIC_\w+)"', (ROOT / "cpp/src/base/env.cpp").read_text()))


def cmake_options() -> set[str]:
    return found(r"^\s*option\((MOESAIC_\w+)", *CMAKE) | found(
        r"^\s*set\((MOESAIC_\w+) [^)]* CACHE ", *CMAKE
    )


def test_every_variable_that_is_spoken_of_is_read() -> None:
    macros = found(r"#\s*define (MOESAIC_\w+)", *SOURCES) | found(
        r"_compile_definitions\([\w${}]+ \w+ (?:.* )?(MOESAIC_\w+)", *CMAKE
    )
    of_tests = found(r'getenv\("(MOESAIC_\w+)"\)', *SOURCES)
    placeholder = {"MOESAIC_X"}
    known = placeholder | knob_variables() | cmake_options() | macros | of_tests
    spoken = {
        (word, name)
        for name in files(*PROSE)
        for word in re.findall(r"\bMOESAIC_[A-Z0-9_]*[A-Z0-9]\b", prose_of(name))
    }
    assert spoken
    assert sorted(f"{word} in {name}" for word, name in spoken if word not in known) == []


def test_every_cmake_option_is_read() -> None:
    code = "\n".join(
        re.sub(r"option\(MOESAIC_\w+|set\(MOESAIC_\w+ [^)]* CACHE ", "", code_of(name))
        for name in files(*CMAKE)
    )
    assert cmake_options()
    assert [name for name in sorted(cmake_options()) if not re.search(rf"\b{name}\b", code)] == []


def test_every_cmake_option_that_is_set_exists() -> None:
    places = files("*.md", "*.py", "*.toml", "*.yml", ".ci/run")
    text = "\n".join((ROOT / name).read_text() for name in places)
    given = set(re.findall(r"(?:-D|define\.)(MOESAIC_\w+)(?::\w+)?=", text))
    for preset in presets()["configurePresets"]:
        given |= {name for name in preset.get("cacheVariables", {}) if name.startswith("MOESAIC_")}
    assert given
    assert given <= cmake_options()


def test_every_variable_of_a_preset_is_read() -> None:
    given = {name for preset in presets()["testPresets"] for name in preset.get("environment", {})}
    assert {name for name in given if name.startswith("MOESAIC_")} <= knob_variables()


def bare_errors(text: str) -> list[int]:
    """Lines that call a class of the family, which makes a message without fields."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and re.fullmatch(r"\w+Error|OperationCancelled", node.func.attr)
        and ast.unparse(node.func.value) in ("mo", "moesaic", "_core")
    ]


@pytest.mark.parametrize("name", files("python/moesaic/**/*.py", "python/moesaic/*.py"))
def test_errors_have_fields(name: str) -> None:
    """make_error gives operation, what, expected, got and hint."""
    assert bare_errors((ROOT / name).read_text()) == []


def test_an_error_without_fields_is_found() -> None:
    assert bare_errors("import moesaic as mo\n\nraise mo.ShapeError('x')\n") == [3]
    assert bare_errors("error_of(mo.ShapeError, 'a', 'b', 'c', 'd')\n") == []


def presets() -> dict[str, Any]:
    return json.loads((ROOT / "CMakePresets.json").read_text())


def nox_sessions() -> list[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(
            ast.unparse(decorator).startswith("nox.session") for decorator in node.decorator_list
        )
    ]


def test_the_noxfile_lists_its_sessions() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    listed = constant_of_the_noxfile("SESSIONS")
    described = re.findall(r"^(\w+) {2,}\S", ast.get_docstring(tree) or "", flags=re.M)
    assert sorted(described) == sorted(nox_sessions())
    assert set(listed) <= set(nox_sessions())


def constant_of_the_noxfile(name: str) -> Any:
    (value,) = [
        node.value
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    return ast.literal_eval(value)


def test_locks_hold_what_sessions_install() -> None:
    tomllib = pytest.importorskip("tomllib")
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    groups = {
        **constant_of_the_noxfile("TOOLS"),
        "build": project["build-system"]["requires"],
        "package": [*project["project"]["dependencies"], *extras["test"]],
        "docs": extras["docs"],
    }
    for name in constant_of_the_noxfile("UNLOCKED"):
        del groups[name]
    folder = ROOT / ".ci" / "locks"
    assert {path.stem for path in folder.glob("*.txt")} == {*groups, "versions"}
    for name, needs in groups.items():
        text = (folder / f"{name}.txt").read_text()
        pins: dict[str, list[str]] = {}
        for entry in re.split(r"\n(?! )", text.strip()):
            package, version = re.match(r"([\w.-]+)==([\w.+!-]+)", entry).groups()
            assert "--hash=sha256:" in entry, f"{name}: {package} has no hash"
            pins.setdefault(package, []).append(version)
        for need in map(packaging.Requirement, needs):
            versions = pins.get(need.name.lower().replace("_", "-"), [])
            assert versions, f"{name}.txt lacks {need}; run nox -s lock"
            assert all(need.specifier.contains(v) for v in versions), f"{name}.txt: {need}"


def test_named_commands_exist() -> None:
    named = {p["name"] for kind in presets().values() if isinstance(kind, list) for p in kind}
    labels = " ".join(found(r"LABELS\s+\"?([\w;-]+)", *CMAKE)).replace(";", " ").split()
    lost = []
    for name in files("*.md", "*.py", "*.yml", "*.txt", "*.cmake", ".ci/run"):
        text = (ROOT / name).read_text()
        lost += [
            f"{name}: preset {p}" for p in re.findall(r"--preset[ =](\w+)", text) if p not in named
        ]
        lost += [
            f"{name}: {s}" for s in re.findall(r"nox -s (\w+)", text) if s not in nox_sessions()
        ]
        for label in re.findall(r"ctest [^`\n]*-LE? \"?([\w|-]+)", text):
            lost += [f"{name}: label {one}" for one in label.split("|") if one not in labels]
    assert lost == []


def test_pre_commit_formats_what_lint_checks() -> None:
    (kinds,) = re.findall(r"for kind in \(([^)]*)\)", (ROOT / "noxfile.py").read_text())
    suffixes = re.findall(r'"(\w+)"', kinds)
    (pattern,) = re.findall(r"files: (\\\..*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert suffixes
    assert [s for s in suffixes if not re.search(pattern, f"a.{s}")] == []


# --- cuda/device.cuh

# Wrappers that no kernel calls yet: asynchronous pipelines, 16-bit activations, shorter launches.
AHEAD = re.compile(
    r"mbarrier_\w+|ldmatrix_\w+|mma_m16n8k16_f16|griddepcontrol_\w+|launch_dependent"
)


def test_every_device_wrapper_is_called_or_known_to_wait() -> None:
    places = files("cuda/device/*.cuh")
    own = "\n".join(code_of(name) for name in places)
    wrappers = set(re.findall(r"MOESAIC_DEV [\w ]+?(\w+)\(", own))
    wrappers |= set(re.findall(r"^int (launch\w*)\(", own, flags=re.M)) - {"launch_with"}
    kernels = "\n".join(code_of(n) for n in files("cuda/**/*.cuh", "*.cu") if n not in places)
    idle = {
        name
        for name in wrappers
        if not re.search(rf"\b{name}\b", kernels)
        and len(re.findall(rf"\b{name}\b", own)) == 1
        and not AHEAD.fullmatch(name)
    }
    assert len(wrappers) > 20
    assert idle == set()


# --- mutexes and fork

# Held for long, so that no fork waits for them: the class makes each anew in a child.
RENEWED = {
    "cpp/src/offload/slot_table.hpp": {
        "map_mutex_": "forwards hold it",
        "turnstile_": "held while forwards end",
        "load_mutex_": "loads of experts hold it",
    },
    "cpp/src/offload/store.cpp": {"mutex": "held while slots are made"},
}
WITHIN = {
    "cpp/include/moesaic/leaf_mutex.hpp": {"mutex_": "what every other one is"},
}


def test_forked_children_find_every_mutex_free() -> None:
    kinds = r"std::(?:\w+_)?mutex|pthread_mutex_t|std::condition_variable|std::\w*semaphore\b"
    sources = [n for n in files(*SOURCES) if n.startswith(("cpp/", "cuda/", "metal/", "python/"))]
    plain = {}
    for name in sources:
        members = re.findall(rf"\b(?:{kinds})\s+(\w+)\s*[;{{]", code_of(name))
        if members:
            plain[name] = set(members)
    reasons = RENEWED | WITHIN
    assert plain == {name: set(reasons[name]) for name in reasons}
    for name, members in RENEWED.items():
        text = code_of(name) + code_of(name.replace(".hpp", ".cpp"))
        for member in members:
            assert f"renew({member})" in text, f"{name}: {member}"


def test_one_handler_of_fork() -> None:
    assert [n for n in files("*.cpp", "*.hpp") if "pthread_atfork" in code_of(n)] == [
        "cpp/src/base/fork.cpp"
    ]

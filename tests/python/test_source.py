"""What the source says of itself is so: named paths exist, variables and options are read.

These tests read the checkout and nothing that was built; elsewhere they skip.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

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
    "Metal/Metal.hpp": "of metal-cpp",
    "Foundation/Foundation.hpp": "of metal-cpp",
    "my_test.cpp": "the reader's",
    "cuda/x.cu": "the reader's",
}


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
            if any(folder.glob(path) if "*" in path else [p for p in [folder / path] if p.exists()]):
                return True
        except (ValueError, NotImplementedError):
            continue
    # A bare name is enough to find a file by.
    return "/" not in path and any(Path(name).match(path) for name in tracked())


def lost_paths(text: str, named_in: str) -> list[str]:
    text = re.sub(r"\w+://\S+", "", text)
    named = {
        path if ">" in path else path.removeprefix("<")
        for path in NAMED_FILE.findall(text) + NAMED_FOLDER.findall(text)
    }
    return sorted(p for p in named if p not in ELSEWHERE and not exists(p, named_in))


@pytest.mark.parametrize("name", files(*PROSE))
def test_named_paths_exist(name: str) -> None:
    assert lost_paths(prose_of(name), name) == []


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

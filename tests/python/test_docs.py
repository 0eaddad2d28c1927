"""The pages tell the truth: their code runs, every public name and every option is on one."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

import moesaic as mo
from moesaic.cli import COMMANDS, build_parser

DOCS = Path(__file__).parents[2] / "python" / "docs" / "pages"
#: Pages whose code needs more than the package does; tests/parity runs it.
NEEDS = {"transformers.md"}
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), flags=re.M | re.S)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page) and page not in NEEDS]
)
def test_the_code_of_a_page_runs(page: str, tmp_path, monkeypatch, capsys) -> None:
    """The blocks of a page are one program; it may write files where it stands."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    capsys.readouterr()


def test_some_pages_have_code() -> None:
    assert sum(bool(python_blocks(page)) for page in PAGES) >= 8


def test_the_reference_has_every_public_name() -> None:
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    listed = re.findall(r"^::: moesaic\.(\w+)$", text, flags=re.M)
    public = set(mo.__all__) - {"__version__"}
    assert sorted(listed) == sorted(public)


def test_a_stub_has_every_public_name_of_the_core() -> None:
    """The reference is made from stubs, so a name that only the compiled module has is missing."""
    stub = ast.parse((Path(mo.__file__).parent / "_core.pyi").read_text())
    stubbed = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    of_core = {n for n in mo.__all__ if getattr(mo._core, n, None) is getattr(mo, n)}
    assert of_core - stubbed == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_page_has_every_option(command: str) -> None:
    text = (DOCS / "cli.md").read_text()
    section = re.search(rf"^## moesaic {command}\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    assert section, f"cli.md has no section for {command}"
    subparsers = next(
        action
        for action in build_parser(command)._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    options = {
        option
        for action in subparsers.choices[command]._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    named = set(re.findall(r"`(--[\w-]+)", section[1]))
    assert named == options

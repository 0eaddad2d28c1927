"""What pages, docstrings and examples show with torch and transformers is so."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from test_docs import DOCS, NEEDS, python_blocks

import moesaic.torch
import moesaic.transformers

transformers.logging.disable_progress_bar()
EXAMPLES = Path(__file__).parents[2] / "python" / "examples"


@pytest.mark.parametrize("page", sorted(NEEDS))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks(page), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert names


def public() -> list[tuple[str, Any]]:
    found = []
    for module in (moesaic.torch, moesaic.transformers):
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    return found


@pytest.mark.parametrize(("name", "value"), public(), ids=lambda value: str(value)[:40])
def test_docstrings(name, value, tmp_path, monkeypatch):
    """Each has an example, and it runs."""
    monkeypatch.chdir(tmp_path)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    test = parser.get_doctest(value.__doc__, {}, name, None, 0)
    assert test.examples
    output: list[str] = []
    runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


def test_the_reference_has_every_name():
    listed = (DOCS / "api" / "torch.md").read_text()
    assert [name for name, _ in public() if f"::: {name}\n" not in listed] == []


@pytest.mark.parametrize(
    "example",
    [
        path
        for path in sorted(EXAMPLES.glob("*.py"))
        if {"torch", "transformers"}
        & {
            name.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for name in node.names
        }
    ],
    ids=lambda path: path.stem,
)
def test_examples_with_torch(example, tmp_path):
    check_example(example, tmp_path)


def test_the_example_with_mlx(tmp_path):
    pytest.importorskip("mlx.core")
    check_example(EXAMPLES / "18_mlx_arrays.py", tmp_path)


def check_example(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "not installed" not in done.stdout and done.stdout.strip()
    assert done.stderr == ""

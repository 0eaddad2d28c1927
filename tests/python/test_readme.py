"""READMEs tell the truth: generated tables are current, the example runs, named paths exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tests/readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(tables) -> None:
    assert tables.check(write=False) == []


def test_a_stale_table_is_noticed(tables) -> None:
    text = "<!-- begin formats -->\nold\n<!-- end formats -->"
    assert tables.renewed(text) != text


def test_the_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == names["x"].shape


@pytest.mark.parametrize(
    "readme", ["README.md", "cpp/README.md", "cpp/src/model/README.md", "tests/README.md"]
)
def test_links_lead_somewhere(readme: str) -> None:
    path = ROOT / readme
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_way_of_one_token_names_files_that_exist() -> None:
    text = (ROOT / "cpp/README.md").read_text()
    named = re.findall(r"`((?!include)[a-z]+/[\w/]+\.[ch]pp)`", text)
    assert named
    assert [name for name in named if not (ROOT / "cpp/src" / name).exists()] == []

"""The READMEs tell the truth: tables are current, the example runs, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import moesaic as mo

ROOT = Path(__file__).parents[2]
LINKED = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
    *("python/README.md", "cpp/README.md", "cpp/src/model/README.md"),
    *("tests/README.md", "tests/bench/README.md"),
)


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tests/readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(tables) -> None:
    """Also, every table stands on some page."""
    assert tables.check(write=False) == []


def test_a_stale_table_is_noticed(tables) -> None:
    text = "<!-- begin formats -->\nold\n<!-- end formats -->"
    assert tables.renewed(text) != text


def test_a_record_of_the_offload(tables) -> None:
    """What was predicted stands above the table; a way that ended has a row that says so."""
    way = {
        "ms_median": 100.4, "ms_quartiles": [90, 1100], "tokens_per_s": 9.43, "hit_rate": 0.631,
        "disk_bytes_per_token": 145e6, "cpu_s_per_token": 0.088, "of_floor": 0.87,
        "disk_bandwidth": 1.5e9, "predicted_tokens_per_s": 10.37, "predicted_over_measured": 1.1,
        "predicted_hit_rate": 0.63,
    }  # fmt: skip
    record = {
        "file_bytes": 6e9, "limit_bytes": 1.5e9, "steps": 60, "threads": 2, "cpus": 2,
        "machine": "x86_64", "load": [3.2], "date": "2026-12-01",
        "ways": {"open_store": way, "ggml": {"failed": -9}},
    }  # fmt: skip
    about, _, *rows = tables.offload_table(record).splitlines()
    assert "predicts 10.4 tokens/s" in about and "110 %" in about and "1.50 GB/s" in about
    assert rows[2].endswith("| 100 | 90 to 1,100 | 9.4 | 145 MB | 0.09 | 87 % |")
    assert "ggml" in rows[3] and "status -9" in rows[3]
    assert len({row.count("|") for row in rows}) == 1
    way["of_floor"] = 1.22  # no disk is slower than what reads from it
    about, _, *rows = tables.offload_table(record).splitlines()
    assert "GB/s" not in about and rows[2].endswith("| - |")


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_the_example_runs(tmp_path, monkeypatch, capsys) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["y"].shape == names["x"].shape
    assert float(capsys.readouterr().out) < 2e-2


@pytest.mark.parametrize("readme", LINKED)
def test_links_lead_somewhere(readme: str) -> None:
    path = ROOT / readme
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_citation_has_the_version() -> None:
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert version and version[1] == mo.__version__


def test_extras_of_the_pages_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", extras, flags=re.M))
    pages = [*ROOT.glob("*.md"), *(ROOT / "python/docs/pages").glob("*.md")]
    named = {n for page in pages for n in re.findall(r"install '\.\[(\w+)\]'", page.read_text())}
    assert named and named <= known

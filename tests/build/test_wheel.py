"""What every wheel holds, whatever it is for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

MAX_BYTES = 5_000_000


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES


def test_content(names: list[str]) -> None:
    wanted = {"moesaic/__init__.py", "moesaic/_core.pyi", "moesaic/py.typed", "moesaic/cli/demo.py"}
    assert wanted <= set(names)
    roots = {n.split("/", 1)[0] for n in names}
    assert {r for r in roots if not r.startswith("moesaic")} == set()
    unwanted = (".a", ".hpp", ".cpp", ".cmake", ".txt.in", ".gguf", ".npz")
    assert [n for n in names if n.endswith(unwanted) or "/tests/" in n] == []


def test_licences(wheel: Path, names: list[str]) -> None:
    """Also of what is part of the module: ggml's tables, pybind11, the C++ library."""
    (own,) = [n for n in names if n.endswith("licenses/LICENSE")]
    (others,) = [n for n in names if n.endswith("licenses/third_party/README.md")]
    with zipfile.ZipFile(wheel) as archive:
        assert b"Apache License" in archive.read(own)
        text = archive.read(others).decode()
    assert "Copyright (c) 2023-2026 The ggml authors" in text
    assert "GCC Runtime Library Exception" in text
    assert "Copyright (c) 2016 Wenzel Jakob" in text


def test_says_what_it_is_made_of(wheel: Path, names: list[str]) -> None:
    (name,) = [n for n in names if n.endswith(".dist-info/sboms/moesaic.cdx.json")]
    bill = json.loads(zipfile.ZipFile(wheel).read(name))
    assert bill["metadata"]["component"]["version"] == wheel.name.split("-")[1]
    parts = {part["name"]: part["licenses"] for part in bill["components"]}
    linked = {"libstdc++"} if "manylinux" in wheel.name else set()
    assert set(parts) == {"pybind11", "ggml"} | linked
    assert all(parts.values())

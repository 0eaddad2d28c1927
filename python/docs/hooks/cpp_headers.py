"""Makes the index of the C++ headers: what each says of itself, and what it declares.

It reads comments and the first line of each declaration; it is no C++ parser and needs none, since
public headers declare one thing after another at the left margin.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HEADERS = Path(__file__).resolve().parents[3] / "cpp" / "include" / "moesaic"
ALL = "moesaic.hpp"
PAGE = "cpp/headers.md"
DECLARATION = re.compile(
    r"^(?:\[\[nodiscard\]\] )?"
    r"(?:(?P<kind>struct|class|enum class|concept|using) (?P<type>\w+)\b(?! *;)"
    r"|(?!static_assert|template|namespace|return|friend|extern)"
    r"\w[\w:<>,&*\[\] ]*?\b(?P<function>\w+)\()"
)


@dataclass
class Declared:
    """A type or a function, and its comment."""

    kind: str
    name: str
    comment: str


@dataclass
class Header:
    """One file."""

    name: str
    comment: str
    declared: list[Declared] = field(default_factory=list)


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    included = reading_order()
    others = sorted({path.name for path in HEADERS.glob("*.hpp")} - {ALL, *included})
    headers = [read(HEADERS / name) for name in included + others]
    return "\n\n".join([INTRODUCTION, *map(section, headers)]) + "\n"


INTRODUCTION = """# C++ headers

`#include <moesaic/moesaic.hpp>` is the library, in the order in which its headers are read best.
They are installed by `cmake --install`, and `find_package(moesaic)` gives the target
`moesaic::moesaic`; a complete consumer is in `tests/consumer`. What is listed here is what a header
declares, with the first sentence of its comment; the headers themselves say the rest. How a call
goes through the library is told in [the way of one token](inside.md)."""


def reading_order() -> list[str]:
    """Names of the headers that the one for all includes, as it orders them."""
    return re.findall(r'#include "moesaic/(\w+\.hpp)"', (HEADERS / ALL).read_text(encoding="utf-8"))


def read(path: Path) -> Header:
    """Read the file's comment, and the comment before each declaration at the left margin."""
    lines = path.read_text(encoding="utf-8").splitlines()
    body = next(i for i, line in enumerate(lines) if line.startswith("#include"))
    header = Header(path.name, comment_text(lines[:body]))
    comment: list[str] = []
    for line in lines[body:]:
        if line.startswith("///"):
            comment.append(line)
            continue
        match = DECLARATION.match(line)
        if match and not line.endswith("\\"):
            kind = match["kind"] or "function"
            declared = Declared(kind, match["type"] or match["function"], comment_text(comment))
            same = [
                d for d in header.declared if (d.kind, d.name) == (declared.kind, declared.name)
            ]
            if not same:
                header.declared.append(declared)
            elif not same[0].comment:  # an overload that has a comment speaks for all
                same[0].comment = declared.comment
        if not line.startswith("template"):
            comment = []
    return header


def comment_text(lines: list[str]) -> str:
    return " ".join(l.removeprefix("///").strip() for l in lines if l.startswith("///"))


def section(header: Header) -> str:
    parts = [f"## {header.name}", text(header.comment)]
    rows = [
        f"| `{d.name}` | {d.kind} | {text(first_sentence(d.comment))} |"
        for d in header.declared
        if d.comment
    ]
    if rows:
        parts.append("\n".join(["| name | kind | what it is |", "| --- | --- | --- |", *rows]))
    # What has a plain name has no comment, or has them on its members.
    plain = [f"`{d.name}`" for d in header.declared if not d.comment]
    if plain:
        parts.append(f"{'Also' if rows else 'It declares'} {', '.join(plain)}.")
    return "\n\n".join(parts)


def first_sentence(comment: str) -> str:
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", comment, maxsplit=1)[0]


def text(comment: str) -> str:
    """Return a comment as Markdown: nothing in it is markup but code in backticks."""
    parts = comment.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*_\[\]|\\])", r"\\\1", html.escape(parts[i], quote=False))
    return "`".join(parts)

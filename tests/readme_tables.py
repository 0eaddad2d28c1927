"""The README's generated tables. `python tests/readme_tables.py --write` renews them.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import moesaic as mo
from moesaic.bench import report

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "bench" / "results.json"
FAMILIES = (
    ("4-bit float", "FP4$"),
    ("4-bit groups (GPTQ, AWQ)", "^INT4$"),
    ("K-quants", "_K$"),
    ("IQ", "^IQ"),
    ("ternary", "^TQ"),
    ("block of 32 or more", r"^Q\d_\d$"),
    ("unquantised", r"^B?F\d+$"),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def status(backend: mo.BackendInfo, quant: str) -> str:
    """Return the same answer on every machine: whether this version has a kernel."""
    if not backend.available:
        return "not built yet"
    return "yes" if any(kernel.type == quant for kernel in backend.kernels) else "decoder only"


def formats() -> str:
    """Format x backend x status, from the kernels that the backends list."""
    backends = mo.backends()
    rows: dict[tuple[str, ...], list[str]] = {}
    types = {name: facts["decodes"] for name, facts in mo.testing.quant_types().items()}
    for kernel in (kernel for backend in backends for kernel in backend.kernels):
        types.setdefault(kernel.type, True)  # not a type of ggml's
    for name, decodes in types.items():
        if decodes:
            family = next(title for title, pattern in FAMILIES if re.search(pattern, name))
            key = (family, *(status(backend, name) for backend in backends))
            rows.setdefault(key, []).append(f"`{name}`")
    table = [[family, " ".join(names), *cells] for (family, *cells), names in sorted(rows.items())]
    return markdown(("family", "weights", *(backend.name for backend in backends)), table)


def environment() -> str:
    """The MOESAIC_* variables, from the table that the parser reads."""
    rows = [[f"`{e.variable}`", e.help.replace("|", "\\|")] for e in mo.show_config() if e.variable]
    return markdown(("variable", "meaning"), rows)


def speed() -> str:
    """The bench results that are kept, one table per shape."""
    results = json.loads(RESULTS.read_text())["results"]
    return "\n\n".join(report.markdown(result) for result in results)


TABLES: dict[str, Callable[[], str]] = {
    "formats": formats,
    "environment": environment,
    "speed": speed,
}


def renewed(text: str) -> str:
    """Return README text with every table made anew; KeyError for a marker without a table."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- begin {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end {match[1]} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", replace, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="change the README")
    options = parser.parse_args()
    old = README.read_text()
    new = renewed(old)
    if options.write:
        README.write_text(new)
    elif new != old:
        print("README.md: generated tables differ; run python tests/readme_tables.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

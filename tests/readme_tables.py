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

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
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
# Of backends that most builds lack: file, what names a type there, types that stand elsewhere.
KERNEL_LISTS = {
    "cuda": ("cuda/formats/formats.inc", r"^MOESAIC_FORMAT\((\w+),", {"INT4"}),
    "metal": ("metal/kernels.inc", r"^MOESAIC_METAL_FORMAT\((\w+),", set()),
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kernel_types(backend: mo.BackendInfo) -> set[str]:
    """Return the types it multiplies, also where this build lacks the backend."""
    if backend.name not in KERNEL_LISTS:
        return {kernel.type for kernel in backend.kernels}
    path, line, more = KERNEL_LISTS[backend.name]
    return {*re.findall(line, (ROOT / path).read_text(), flags=re.M), *more}


def formats() -> str:
    """Format x backend x status, the same on every machine."""
    backends = mo.backends()
    multiplied = {backend.name: kernel_types(backend) for backend in backends}
    words = {
        backend.name: "emulated" if backend.name in KERNEL_LISTS else "yes" for backend in backends
    }
    rows: dict[tuple[str, ...], list[str]] = {}
    types = {name: facts["decodes"] for name, facts in mo.testing.quant_types().items()}
    types.update(dict.fromkeys(set.union(*multiplied.values()) - types.keys(), True))
    for name, decodes in types.items():
        if decodes:
            family = next(title for title, pattern in FAMILIES if re.search(pattern, name))
            cells = (words[b] if name in known else "no" for b, known in multiplied.items())
            rows.setdefault((family, *cells), []).append(f"`{name}`")
    table = [[family, " ".join(names), *cells] for (family, *cells), names in sorted(rows.items())]
    return markdown(("family", "weights", *multiplied), table)


def environment() -> str:
    """The MOESAIC_* variables, from the table that the parser reads."""
    rows = [[f"`{e.variable}`", e.help.replace("|", "\\|")] for e in mo.show_config() if e.variable]
    return markdown(("variable", "meaning"), rows)


def speed() -> str:
    """The bench results that are kept, one table per shape."""
    results = json.loads(RESULTS.read_text())["results"]
    return "\n\n".join(report.markdown(result) for result in results)


def architectures() -> str:
    """The presets of GGUF architectures; those that agree in everything share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for facts in mo.architecture_table():
        notes = "; ".join(
            filter(None, [facts["missing"] and f"missing: {facts['missing']}", facts["notes"]])
        )
        columns = ("score", "selection", "renormalize", "scale", "activation", "shared")
        key = (*(facts[column] for column in columns), notes)
        rows.setdefault(key, []).append(f"`{facts['architecture']}`")
    header = (
        "architecture",
        "score",
        "top-k of",
        "renormalised",
        "scale",
        "activation",
        "shared",
        "notes",
    )
    return markdown(header, [[" ".join(names), *key] for key, names in rows.items()])


TABLES: dict[str, Callable[[], str]] = {
    "formats": formats,
    "architectures": architectures,
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

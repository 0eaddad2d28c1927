"""The generated tables of READMEs and pages; `python tests/readme_tables.py --write` renews them.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, in any Markdown file of the
repository. Each table stands in one file at least, so that none is made for nobody.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import moesaic as mo
from moesaic.bench import report, whole_report
from moesaic.hf_config.families import family_table

ROOT = Path(__file__).parents[1]
# One file per date. The tables show the last date of every shape, of formats, encoders, matrices,
# whole models and offload.
RESULTS = Path(__file__).parent / "bench" / "results"
FORMATS = Path(__file__).parent / "bench" / "formats"
ENCODERS = Path(__file__).parent / "bench" / "encoders"
MATRICES = Path(__file__).parent / "bench" / "matrices"
WHOLE_MODELS = Path(__file__).parent / "bench" / "whole_models"
OFFLOAD = Path(__file__).parent / "bench" / "offload"
# The ways that tests/bench/offload.py runs a model of several times the memory.
OFFLOAD_WAYS = {
    "open_store": "`open_store(file, memory)`",
    "page cache": "`open_store(..., direct_io=False)`",
    "mapped": '`MoeLayer.from_gguf(layout="file")`',
    "ggml": "ggml, the file mapped",
}
# What the first table of speed shows: a row per number of tokens, all threads.
SUMMARY_ENGINES = ("moesaic", "moesaic exact", "ggml (repack)", "torch bf16")
FAMILIES = (
    ("4-bit float", "FP4$"),
    ("8-bit float (FP8)", "^E4M3$"),
    ("4-bit groups (GPTQ, AWQ)", "^INT4$"),
    ("K-quants", "_K$"),
    ("IQ", "^IQ"),
    ("ternary", "^TQ"),
    ("block of 32 or more", r"^Q\d_\d$"),
    ("unquantised", r"^B?F\d+$"),
)
# Where the kernels of backends that most builds lack are listed: the file, the line that names a
# type, and the types that stand elsewhere.
KERNEL_LISTS = {
    "cuda": ("cuda/formats/formats.inc", r"^MOESAIC_FORMAT\((\w+),", {"INT4"}),
    "metal": ("metal/kernels.inc", r"^MOESAIC_METAL_FORMAT\((\w+),", set()),
}


def markdown(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int | None = None
) -> str:
    """Return a table whose columns from `numbers_from` on are aligned to the right."""
    words = len(header) if numbers_from is None else numbers_from
    rule = ["---"] * words + ["--:"] * (len(header) - words)
    lines = [header, rule, *rows]
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


def latest_results() -> list[dict[str, Any]]:
    """Return the results of the last date on which each shape was measured."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    results = [result for file in files for result in file["results"]]
    dates = {str(result["shape"]): result["date"] for result in results}
    return [result for result in results if result["date"] == dates[str(result["shape"])]]


def speed_summary() -> str:
    """Return a row per number of tokens: speed with the error beside it, all engines."""
    result = next(
        result
        for result in latest_results()
        if set(SUMMARY_ENGINES) <= {p["engine"] for p in result["points"]}
    )
    points = [p for p in result["points"] if not p["busy"]]
    threads = max(p["threads"] for p in points)
    rows = []
    for tokens in dict.fromkeys(p["tokens"] for p in points):
        at = {p["engine"]: p for p in points if (p["tokens"], p["threads"]) == (tokens, threads)}
        limit = at["moesaic"]["floor_us"]
        cells = [f"{at[e]['us']:,.0f} ({at[e]['rel_l2']:.0e})" for e in SUMMARY_ENGINES]
        rows.append([str(tokens), f"{limit:,.0f}", *cells])
    shape, machine = result["shape"], result["machine"]
    about = (
        f"Microseconds per layer (relative error), {shape['name']}, {shape['gate_up_type']} and "
        f"{shape['down_type']}, {threads} threads of an {machine['cpu']} ({machine['isa']}), "
        f"{result['date']}; limit: what memory and arithmetic allowed in the same minutes."
    )
    return about + "\n\n" + markdown(("tokens", "limit", *SUMMARY_ENGINES), rows, numbers_from=0)


def speed() -> str:
    """The bench results that are kept: the first, and the others folded."""
    first, *others = latest_results()
    folded = [
        f"<details><summary>{other['shape']['name']}, {' '.join(_tokens(other))} tokens</summary>"
        f"\n\n{report.markdown(other)}\n\n</details>"
        for other in others
    ]
    return "\n\n".join([report.markdown(first), *folded])


def _tokens(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(str(point["tokens"]) for point in result["points"]))


def format_speed() -> str:
    """Every format at two batch sizes, beside Q4_K and ggml."""
    kept = json.loads(max(FORMATS.glob("*.json")).read_text())
    rows: dict[str, list[str]] = {}
    for row in kept["rows"]:
        cells = rows.setdefault(row["type"], [f"`{row['type']}`"])
        unit = "GB/s" if row["tokens"] == 1 else "GOP/s"
        cells += [
            f"{row['us']:,.0f} ±{100 * row['spread']:.0f} % ({row['rel_l2']:.0e})",
            f"{row['speed']:,.0f} {unit}",
            f"{row['of_base']:.2f}",
            f"{row['ggml_us']:,.0f} ({row['ggml_rel_l2']:.0e})" if row["ggml_us"] else "-",
        ]
    header = ["gate, up and down"]
    for tokens in dict.fromkeys(row["tokens"] for row in kept["rows"]):
        plural = "" if tokens == 1 else "s"
        header += [
            f"{tokens} token{plural}: us (error)",
            "speed",
            f"speed over {kept['base']}'s",
            "ggml: us (error)",
        ]
    about = (
        f"{kept['shape']}, {kept['rows'][0]['threads']} threads, {kept['machine']['cpu']}, "
        f"{kept['machine']['isa']}; {kept['date']}; `python tests/bench/formats.py`."
    )
    return about + "\n\n" + markdown(header, list(rows.values()), numbers_from=1)


def encoders() -> str:
    """The error of every encoder beside that of ggml's, and the speed of both."""
    kept = json.loads(max(ENCODERS.glob("*.json")).read_text())
    rows = []
    for row in kept["rows"]:
        cells = [f"`{row['type']}`"]
        for name in ("normal", "normal_weighted", "student_3", "student_3_weighted"):
            ours, theirs = row["errors"].get(name, (0.0, 0.0))
            cells.append(f"{ours:.4f} / {theirs:.4f} = {ours / theirs:.2f}" if theirs else "-")
        speed = row["mvalues_per_s"]
        rows.append([*cells, f"{speed['ours']:.1f} / {speed['ggml']:.1f}"])
    header = [
        "type",
        "normal",
        "normal, weighted",
        "Student t, 3 d.o.f.",
        "Student t, weighted",
        "Mvalues/s per core",
    ]
    about = (
        f"Relative RMSE, moesaic / ggml = ratio. {kept['machine']}; {kept['date']}; "
        "`python tests/bench/encoders.py`."
    )
    return about + "\n\n" + markdown(header, rows, numbers_from=1)


def matrix_speed() -> str:
    """One matrix of several types at every number of rows, beside ggml."""
    kept = json.loads(max(MATRICES.glob("*.json")).read_text())
    rows = []
    for point in kept["points"]:
        cells = [f"`{point['type']}`", str(point["rows"]), f"{point['floor_us']:,.0f}"]
        ours = point["engines"]["moesaic"]
        peers = [one for name, one in point["engines"].items() if name.startswith("ggml")]
        for one in (ours, *peers):
            cells.append(f"{one['us']:,.0f} ±{100 * one['spread']:.0f} % ({one['rel_l2']:.0e})")
        cells += ["-"] * (not peers)
        rows.append([*cells, f"{ours['us'] / point['floor_us']:.2f}"])
    shape, machine, threads = kept["shape"], kept["machine"], kept["points"][0]["threads"]
    about = (
        f"Microseconds (relative error), W {shape}, {threads} thread{'s' * (threads > 1)}, "
        f"{machine['cpu']}, {machine['isa']}; {kept['date']}; `{kept['command']}`."
    )
    header = ("type", "rows of x", "limit", "moesaic", "ggml", "time / limit")
    return about + "\n\n" + markdown(header, rows, numbers_from=1)


def whole_model() -> str:
    """A model of transformers with its experts, and its matrices, here or in torch."""
    kept: dict[str, Any] = json.loads(max(WHOLE_MODELS.glob("*.json")).read_text())
    return whole_report.markdown(kept)


def offload() -> str:
    """A file of several times the memory, in every way that it was run."""
    return offload_table(json.loads(max(OFFLOAD.glob("*.json")).read_text()))


def offload_table(kept: dict[str, Any]) -> str:
    """The table of one record of tests/bench/offload.py."""
    rows = []
    for name, way in kept["ways"].items():
        title = OFFLOAD_WAYS[name]
        if "failed" in way:
            rows.append([title, f"ended with status {way['failed']}", *["-"] * 5])
            continue
        low, high = way["ms_quartiles"]
        # Where a store was faster than a disk alone, what measured the disk was at fault.
        of_floor = f"{100 * way['of_floor']:.0f} %" if way.get("of_floor", 2) <= 1 else "-"
        rows.append([
            title, f"{way['ms_median']:,.0f}", f"{low:,.0f} to {high:,.0f}",
            f"{way['tokens_per_s']:.{1 if way['tokens_per_s'] >= 1 else 2}f}",
            f"{way['disk_bytes_per_token'] / 1e6:,.0f} MB", f"{way['cpu_s_per_token']:.2f}",
            of_floor,
        ])  # fmt: skip
    header = ("way", "ms a token", "quartiles", "tokens/s", "read a token", "CPU s a token",
              "of disk alone")  # fmt: skip
    about = (
        f"A file of {kept['file_bytes'] / 1e9:.1f} GB with {kept['limit_bytes'] / 1e9:.2f} GB as"
        f" the limit; {kept['steps']} tokens; {kept['threads']} threads of {kept['cpus']} CPUs"
        f" ({kept['machine']}) at a load of {kept['load'][0]:.1f}; {kept['date']}."
    )
    stored = kept["ways"].get("open_store", {})
    if stored.get("of_floor", 2) <= 1:
        about += f" The disk read {stored['disk_bandwidth'] / 1e9:.2f} GB/s beside the store."
    if "predicted_tokens_per_s" in stored:
        about += (
            f" `simulate-offload` predicts {stored['predicted_tokens_per_s']:.1f} tokens/s of it,"
            f" {100 * stored['predicted_over_measured']:.0f} % of what it did, and a hit rate of"
            f" {stored['predicted_hit_rate']:.1%}, where it was {stored['hit_rate']:.1%}."
        )
    return about + "\n\n" + markdown(header, rows, numbers_from=1)


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
        "selection reads",
        "renormalised",
        "scale",
        "activation",
        "shared experts",
        "notes",
    )
    return markdown(header, [[" ".join(names), *key] for key, names in rows.items()])


def model_types() -> str:
    """The model types of Hugging Face configurations."""
    columns = ("score", "selection", "renormalize", "scale", "activation", "shared", "missing")
    rows = [
        [", ".join(f"`{name}`" for name in row["model types"].split(", "))]
        + [row[column] for column in columns]
        for row in family_table()
    ]
    header = (
        "model type",
        "score",
        "selection reads",
        "renormalised",
        "scale",
        "activation",
        "shared experts",
        "missing",
    )
    return markdown(header, rows)


def parity() -> str:
    """The configurations that run beside transformers, and what their layers come from."""
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    from models import ARCHITECTURES, MODELS

    rows = [
        [
            model.name,
            f"`{model.config}`",
            "yes" if model.arrays else "",
            "original, v5, state_dict" if model.saved else "",
            f"`{ARCHITECTURES[model.name]}`" if model.name in ARCHITECTURES else "",
        ]
        for model in MODELS
    ]
    header = ("model", "configuration", "arrays", "checkpoints", "GGUF")
    return f"{len(rows)} configurations.\n\n" + markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "formats": formats,
    "architectures": architectures,
    "model_types": model_types,
    "parity": parity,
    "environment": environment,
    "speed_summary": speed_summary,
    "speed": speed,
    "format_speed": format_speed,
    "encoders": encoders,
    "matrix_speed": matrix_speed,
    "whole_model": whole_model,
    "offload": offload,
}


MARKED = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", flags=re.S)


def renewed(text: str) -> str:
    """Return the text with every table made anew; KeyError for a marker without a table."""
    return MARKED.sub(
        lambda match: f"<!-- begin {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end {match[1]} -->",
        text,
    )


def pages() -> list[Path]:
    """The Markdown files that are part of the repository, or about to be."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md")
    done = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def check(write: bool) -> list[str]:
    """Return what is wrong, after writing where `write` says so."""
    problems, seen = [], set()
    for page in pages():
        old = page.read_text()
        seen.update(match[1] for match in MARKED.finditer(old))
        new = renewed(old)
        if new == old:
            continue
        if write:
            page.write_text(new)
        else:
            name = page.relative_to(ROOT)
            problems.append(
                f"{name}: generated tables differ; run python tests/readme_tables.py --write"
            )
    return problems + [f"no page has the table '{name}'" for name in TABLES if name not in seen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="change the files")
    problems = check(parser.parse_args().write)
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

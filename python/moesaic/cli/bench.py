"""``moesaic bench``: our layer, the machine's limits and other engines, alternated in one run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .options import integer, integers, number, output, picture, words
from .table import table

LEFT = ("device", "engine", "date")  # columns of words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..bench import SHAPES
    from ..bench.peers import PEERS

    parser.add_argument(
        "--shape",
        action="append",
        choices=[*SHAPES, "all"],
        help="layer shape (default: qwen3-30b-a3b)",
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, metal, cuda or cuda:N (CUDA graphs; needs torch)"
    )
    parser.add_argument(
        "--tokens",
        type=integers(1),
        help="comma separated (default: 1,2,4,8,16,32,64,128,512,2048)",
    )
    parser.add_argument(
        "--threads", type=integers(1), help="comma separated (default: 1 and one for each core)"
    )
    parser.add_argument(
        "--peers",
        default="installed",
        help=f"comma separated of {', '.join(PEERS)} (a GPU: torch-grouped, humming-int4; a model: "
        "torch-eager, torch-grouped-mm, llama.cpp); 'installed' or 'none'",
    )
    parser.add_argument(
        "--precision",
        type=words(["auto", "exact", "fast"]),
        default=["auto"],
        help="comma separated of auto, exact, fast",
    )
    parser.add_argument(
        "--gate-up-type", type=quant, help="quant type of gate and up instead of the shape's own"
    )
    parser.add_argument(
        "--down-type", type=quant, help="quant type of down instead of the shape's own"
    )
    parser.add_argument("--rounds", type=integer(1), default=7, help="alternations per point")
    parser.add_argument(
        "--seconds", type=number(0, above=True), default=1.0, help="time per engine and point"
    )
    parser.add_argument(
        "--busy", action="store_true", help="add rows beside one process that never sleeps"
    )
    parser.add_argument(
        "--time-limit",
        type=number(0, above=True),
        metavar="SECONDS",
        help="begin no point later than this; the result names those left out",
    )
    parser.add_argument(
        "--json",
        type=result_path,
        metavar="PATH",
        help="write the result after every point to a file, or to <date>.json of a folder; - is "
        "stdout, at the end",
    )
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="FILE",
        help="write a roofline picture (PNG; needs matplotlib)",
    )
    parser.add_argument(
        "--compare", metavar="FILE", help="fail where slower than this earlier result"
    )
    parser.add_argument(
        "--history",
        metavar="FOLDER",
        help="measure nothing; show the results of a folder over time (--plot: as a picture)",
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table at the end")
    parser.add_argument(
        "--model",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure a whole model: of a GGUF file, or one made for this (needs transformers)",
    )
    parser.add_argument(
        "--layers",
        type=integer(1),
        help="with --model, of the one that is made (default: 4)",
    )


def quant(text: str) -> str:
    """A quant type with an encoder."""
    import moesaic as mo

    types = mo.testing.quant_types()
    if not types.get(text, {}).get("encodes"):
        known = [name for name, facts in types.items() if facts["encodes"]]
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {text!r}")
    return text


def result_path(text: str) -> str:
    """Where a result goes: "-", a folder, or a file."""
    return text if text == "-" or Path(text).is_dir() else output(text)


def peers_of(asked: str, known: dict[str, Any]) -> tuple[str, ...]:
    if asked == "installed":
        return tuple(known)
    if asked == "none":
        return ()
    peers = tuple(asked.split(","))
    unknown = [p for p in peers if p not in known]
    if unknown:
        import moesaic as mo
        from moesaic._errors import error_of

        expected = f"installed, none or some of {', '.join(known)}"
        raise error_of(mo.ConfigError, "bench", "--peers", expected, repr(unknown[0]))
    return peers


def _deadline(options: argparse.Namespace) -> float | None:
    return None if options.time_limit is None else time.monotonic() + options.time_limit


def _after_point(
    options: argparse.Namespace, results: list[dict[str, Any]], lines: Callable[..., str]
) -> Callable[[list[Any], Any], None]:
    """Prints the rows of a point, and saves what there is: a run may be ended from outside."""

    def after(points: list[Any], result: Any) -> None:
        print(lines(points, head=False), flush=True)
        if options.json not in (None, "-"):
            _save([*results, result.to_json()], options.json)

    return after


def _run_gpu(options: argparse.Namespace) -> int:
    from ..bench import SHAPES, gpu

    device = "cuda:0" if options.device == "cuda" else options.device
    gpu_options = gpu.GpuOptions(
        device=device,
        tokens=tuple(options.tokens) if options.tokens else gpu.TOKENS,
        peers=peers_of(options.peers, gpu.PEERS),
        rounds=options.rounds,
        deadline=_deadline(options),
    )
    results: list[dict[str, Any]] = []
    for shape in _shapes(options, SHAPES):
        print(f"{shape.name}  {shape.gate_up_type} gate/up, {shape.down_type} down, {device}")
        print(gpu.lines([]), flush=True)
        result = gpu.run(shape, gpu_options, _after_point(options, results, gpu.lines))
        for peer, reason in result.absent.items():
            print(f"absent: {peer}: {reason}")
        print(flush=True)
        results.append(result.to_json())
    print(gpu.LEGEND)
    if options.json:
        _save(results, options.json)
    if options.markdown:
        print("\n\n".join(gpu.markdown(result) for result in results))
    return 0


def _show_history(options: argparse.Namespace) -> int:
    from ..bench import records

    entries = records.history(records.load_folder(options.history))
    print(table(records.HISTORY_HEADER, records.history_rows(entries), left=LEFT))
    print("time/limit: the time over the least that the machine allowed at that date")
    if options.plot:
        records.plot_history(entries, options.plot)
    return 0


def _shapes(options: argparse.Namespace, known: dict[str, Any]) -> list[Any]:
    names = options.shape or ["qwen3-30b-a3b"]
    changes = {"gate_up_type": options.gate_up_type, "down_type": options.down_type}
    changes = {k: v for k, v in changes.items() if v}
    return [
        dataclasses.replace(known[name], **changes)
        for name in (list(known) if "all" in names else names)
    ]


def run(options: argparse.Namespace) -> int:
    if options.json != "-":
        return _run(options)
    # The tables go where messages go, so that stdout is JSON alone.
    with redirect_stdout(sys.stderr):
        return _run(options)


def _save(results: list[dict[str, Any]], path: str) -> None:
    from ..bench import records

    if path == "-":
        print(records.to_text(results), file=sys.__stdout__, end="")
    else:
        records.save(results, path)


def _run(options: argparse.Namespace) -> int:
    import moesaic as mo

    from ..bench import SHAPES, TOKENS, BenchOptions, records, report
    from ..bench import run as run_bench
    from ..bench.peers import PEERS

    if options.history:
        return _show_history(options)
    if options.model is not None:
        from .bench_model import run as run_model

        return run_model(options)
    if options.layers is not None:
        from moesaic._errors import error_of

        raise error_of(
            mo.ConfigError, "bench", "--layers", "--model beside it", str(options.layers)
        )
    if options.device not in ("cpu", "metal"):
        return _run_gpu(options)
    metal = options.device == "metal"
    if metal:  # says why it is absent before weights are made
        mo.Workspace(64, device="metal")
    cores = int(mo.build_info()["threads"])
    bench_options = BenchOptions(
        tokens=tuple(options.tokens) if options.tokens else TOKENS,
        threads=tuple(options.threads or sorted({cores} if metal else {1, cores})),
        peers=peers_of(options.peers, PEERS),
        precisions=tuple(options.precision),
        rounds=options.rounds,
        seconds=options.seconds,
        busy=options.busy,
        deadline=_deadline(options),
        device=options.device,
    )

    results: list[dict[str, Any]] = []
    slower: list[str] = []
    baseline = records.load(options.compare) if options.compare else []
    for shape in _shapes(options, SHAPES):
        print(f"{shape.name}  {shape.gate_up_type} gate/up, {shape.down_type} down")
        print(report.lines([]), flush=True)
        result = run_bench(shape, bench_options, _after_point(options, results, report.lines))
        for peer, reason in result.absent.items():
            print(f"absent: {peer}: {reason}")
        print(flush=True)
        results.append(result.to_json())
        for before in baseline:
            if before["shape"] == result.shape:
                slower += report.compare(result, before)

    print(report.LEGEND)
    if options.json:
        _save(results, options.json)
    if options.plot:
        from ..bench import roofline

        roofline.plot(results[0], options.plot)
    if options.markdown:
        print("\n\n".join(report.markdown(result) for result in results))
    for line in slower:
        print(f"slower: {line}")
    return 1 if slower else 0

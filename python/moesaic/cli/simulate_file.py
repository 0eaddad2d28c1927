"""``moesaic simulate-offload FILE``: how fast a model would run with less memory than it needs.

Sizes come from the file or folder, hit rates from the pools that ``open_store`` would make, and
time from the disk and from kernels that are measured on the first layer here. With ``--measure``
the layers also run, beside the prediction.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

import moesaic as mo
from moesaic._errors import error_of

from .models import Model, open_model
from .table import filled, size, table

if TYPE_CHECKING:
    from moesaic._offload_store import Source

    from ..simulate import DiskCosts

OPERATION = "simulate-offload"
HEADER = ("memory", "in memory", "hit rate", "read a step", "tokens/s", "disk alone")
LEGEND = """\
in memory: experts of a layer that have room beside buffers, routers, shared experts and the
workspace of a call. hit rate: pairs (token and expert) whose expert was there. read a step: bytes
missed, all layers. tokens/s: by the layers alone, without attention and the rest of a model; disk
alone: if nothing but the disk took time."""


def run(options: argparse.Namespace) -> int:
    from ..simulate import disk, probe, stored

    with open_model(options.file) as model:
        experts, top_k = one_shape(model)
        source = model.source()
        traces = make_traces(options, experts, top_k, len(model.layers))
        warm = round(traces[0].steps * options.warm)
        rows, store = [], None
        for memory in options.memory:
            del store  # before another takes its memory
            store = mo.open_store(
                source, memory, max_tokens=options.max_tokens, on_miss=options.on_miss
            )
            row: dict[str, Any] = {"memory": memory, "budget": store.pools[-1].budget}
            row["budgets"] = [pool.budget for pool in store.pools]
            if options.measure:
                measured = stored.measure_store(store, traces[0], warm)
                row["measured_tokens_per_second"] = measured.tokens_per_second
                row["measured_hit_rate"] = measured.hit_rate
            rows.append(row)
        assert store is not None  # there is at least one memory
        missed = probe.missed_experts(store) if options.measure else None
        del store  # what is measured now needs the memory
        costs = costs_of(options, source, missed)
    for row in rows:
        budgets = row.pop("budgets")
        outcomes = [
            disk.simulate_disk(trace, budgets, costs, on_miss=options.on_miss, warm=warm)
            for trace in traces
        ]
        for field in dataclasses.fields(disk.DiskOutcome):
            row[field.name] = statistics.median(getattr(one, field.name) for one in outcomes)
    if options.json:
        used = dataclasses.asdict(costs)
        print(json.dumps({"path": options.file, "costs": used, "memory": rows}, indent=2))
        return 0
    print(f"{options.file}: {traces[0].layers} layers with {experts} experts, top {top_k}")
    found = costs.disk
    reads = (
        f"disk {found.bandwidth / 1e9:.2f} GB/s, {found.latency * 1e6:.0f} us a call beside that"
    )
    print(f"{reads}; kernels {costs.fast / 1e9:.1f} GB/s, as read {costs.slow / 1e9:.1f} GB/s")
    print()
    header = HEADER + (("(measured)", "(hit rate)") if options.measure else ())
    print(table(header, [cells(row, experts) for row in rows]))
    print()
    print(filled(LEGEND))
    return 0


def costs_of(
    options: argparse.Namespace, source: Source, missed: Iterator[tuple[int, int]] | None
) -> DiskCosts:
    """Return what is measured here, on the disk that was asked for, else on this one.

    This one reads what layers that ran have ``missed``, or random experts.
    """
    from ..simulate import disk, places, probe, stored

    if missed is None:
        missed = probe.random_experts(places.places_of(source))
    found = disk.Disk(options.disk) if options.disk else probe.measure_disk(source, missed)
    costs = stored.measure_costs(source, found)
    if options.latency_us is not None:
        found = dataclasses.replace(found, latency=options.latency_us * 1e-6)
        costs = dataclasses.replace(costs, disk=found)
    elif not options.disk:
        costs = stored.measure_latency(source, costs, missed)
    return dataclasses.replace(costs, predicted=options.predicted)


def cells(row: dict[str, Any], experts: int) -> list[str]:
    """Return one row of the table."""
    line = [
        size(row["memory"]),
        f"{row['budget']} of {experts}",
        f"{row['hit_rate']:.1%}",
        size(int(row["missed_bytes"])),
        f"{row['tokens_per_second']:.1f}",
        f"{row['floor']:.1f}" if np.isfinite(row["floor"]) else "-",
    ]
    if "measured_hit_rate" in row:
        line += [f"{row['measured_tokens_per_second']:.1f}", f"{row['measured_hit_rate']:.1%}"]
    return line


def one_shape(model: Model) -> tuple[int, int]:
    """Return the experts and top k that all layers have. Raises UnsupportedError."""
    configs = [model.config(block) for block in model.layers]
    shapes = {(config.num_experts, config.top_k) for config in configs}
    if len(shapes) != 1:
        shown = ", ".join(f"top {k} of {e}" for e, k in sorted(shapes)) or "none"
        raise error_of(
            mo.UnsupportedError, OPERATION, model.path,
            "layers with one number of experts and of those per token", shown,
        )  # fmt: skip
    return next(iter(shapes))


def make_traces(options: argparse.Namespace, experts: int, top_k: int, layers: int) -> list[Any]:
    """Return traces of the sizes of a file. Raises ShapeError for one of another model."""
    from ..simulate import Trace, drifting, zipf

    kinds: dict[str, Callable[..., Trace]] = {"zipf": zipf, "drift": drifting}
    if options.trace in kinds:
        sizes = {"num_experts": experts, "top_k": top_k, "layers": layers}
        sizes |= {"steps": options.steps, "tokens": options.tokens}
        return [kinds[options.trace](**sizes, seed=seed) for seed in range(options.seeds)]
    trace = Trace.load(options.trace)
    if (trace.num_experts, trace.layers) != (experts, layers):
        raise error_of(
            mo.ShapeError, OPERATION, "--trace", f"{layers} layers of {experts} experts",
            f"{trace.layers} of {trace.num_experts}",
        )  # fmt: skip
    return [trace]

"""``torchrun -m moesaic check-ep FILE``: bits of a spread layer against one process, and the links.

Every rank opens the whole layer too, so each needs memory for all of its experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import moesaic as mo
from moesaic._errors import error_of

from .inputs import other_inputs
from .models import GgufModel, choose_layer, open_model
from .options import add_json, add_layer, add_model, integer, number
from .table import table

HEADER = ("combine", "protocol", "tokens", "same bits", "difference", "ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_layer(parser)
    parser.add_argument(
        "--tokens", type=integer(0), default=64, help="of a rank at most (default: 64)"
    )
    parser.add_argument("--repeats", type=integer(1), default=5, help="of a timing (default: 5)")
    parser.add_argument(
        "--timeout", type=number(0, above=True), default=30.0, help="seconds (default: 30)"
    )
    parser.add_argument("--mpi", action="store_true", help="over mpi4py, under mpiexec")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..distributed import MpiComm

    if options.mpi:
        return _check(options, MpiComm(timeout=options.timeout))
    return _under_torchrun(options)


def _under_torchrun(options: argparse.Namespace) -> int:
    from ..distributed import TorchGroup

    try:
        import torch.distributed as dist
    except ImportError as error:
        expected, got = "torch, or --mpi", "neither"
        raise error_of(mo.UnsupportedError, "check-ep", "ranks", expected, got) from error
    if not dist.is_torchelastic_launched():
        hint = "torchrun -m moesaic check-ep FILE"
        raise error_of(mo.ConfigError, "check-ep", "ranks", "some", "none", hint)
    dist.init_process_group("gloo")
    try:
        return _check(options, TorchGroup(timeout=options.timeout))
    finally:
        dist.destroy_process_group()


def _check(options: argparse.Namespace, group: Any) -> int:
    from ..distributed import MoeLayer, plan_experts

    with open_model(options.file) as model:
        block = choose_layer(model, options.layer)
        experts = model.config(block).num_experts
        plan = plan_experts(np.ones(experts), group.size)
        is_gguf = isinstance(model, GgufModel)
        source: Any = model.file if isinstance(model, GgufModel) else options.file
        opener = MoeLayer.from_gguf if is_gguf else MoeLayer.from_safetensors
        rows, good = [], True
        with model.open(block) as whole, mo.tuning(batch_invariant=True):
            for combine in ("exact", "partial"):
                for protocol in ("alltoall", "allgather"):
                    with opener(
                        source, block, plan, group, combine=combine, protocol=protocol
                    ) as layer:
                        for tokens in sorted({0, 1, options.tokens}):
                            row = _compare(layer, whole, tokens, group, options.repeats)
                            good = good and (row["same_bits"] or combine == "partial")
                            good = good and row["difference"] <= 1e-5
                            rows.append({"combine": combine, "protocol": protocol, **row})
    links = _links(group, options.repeats)
    if group.rank == 0:
        _report(rows, links, options)
    return 0 if good else 1


def _compare(layer: Any, whole: mo.MoeLayer, most: int, group: Any, repeats: int) -> dict[str, Any]:
    """One size: ranks have fewer tokens from one to the next. The worst of all ranks counts."""
    tokens = most * (group.size - group.rank) // group.size
    rng = np.random.default_rng(group.rank)
    x = rng.standard_normal((tokens, layer.config.hidden_size), np.float32)
    others = other_inputs(whole, tokens, group.rank)
    y, want = layer(x, **others), whole(x, **others)
    norm = float(np.linalg.norm(want)) or 1.0
    seconds = _time(lambda: layer(x, **others), repeats)
    mine = np.array([np.array_equal(y, want), np.linalg.norm(y - want) / norm, seconds])
    every = group.allgather(mine.view(np.uint8)).view(np.float64)
    return {
        "tokens": most,
        "same_bits": bool(every[:, 0].all()),
        "difference": float(every[:, 1].max()),
        "seconds": float(every[:, 2].max()),
    }


def _links(group: Any, repeats: int) -> dict[str, float]:
    """Latency of an empty exchange, and bytes per second of one of 1 MiB to each rank."""
    empty = [np.zeros(0, np.uint8)] * group.size
    full = [np.zeros(1 << 20, np.uint8)] * group.size
    latency = _time(lambda: group.exchange(empty, [0] * group.size), repeats)
    busy = _time(lambda: group.exchange(full, [1 << 20] * group.size), repeats)
    sent = (group.size - 1) << 20
    return {"latency_s": latency, "bytes_per_s": sent / busy if sent else 0.0}


def _time(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _report(
    rows: list[dict[str, Any]], links: dict[str, float], options: argparse.Namespace
) -> None:
    if options.json:
        print(json.dumps({"path": options.file, "calls": rows, "links": links}, indent=2))
        return
    cells = [
        [
            row["combine"], row["protocol"], str(row["tokens"]),
            "yes" if row["same_bits"] else "no", f"{row['difference']:.0e}",
            f"{row['seconds'] * 1e3:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    print(table(HEADER, cells, left=("combine", "protocol", "same bits")))
    print()
    rate = links["bytes_per_s"] / 1e9
    print(f"an exchange takes {links['latency_s'] * 1e6:.0f} us, a rank sends {rate:.2f} GB/s")

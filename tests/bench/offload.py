"""A model of four times the memory: open_store beside a mapped file, and the disk's own limit.

``python tests/bench/offload.py MODEL.gguf`` runs every layer of the file in turn, a token a step,
on routings with a fixed popularity of experts (``simulate.zipf``). Each way runs in a process of
its own, in a memory cgroup of a quarter of the file (version 1 or 2, where this user may make one;
else the peak of its memory is only reported). Without a file, one of 6 GB is made in the folder of
``--folder``: 16 layers as large as those of Qwen3-30B-A3B, random Q4_K and Q6_K.

``ggml`` maps the file as llama.cpp does by default, its experts as stored, and runs the graph that
llama.cpp builds for them (``pip install ggml-python==0.0.45``; left out where it is not there).

``--cosines 0.8,0.95`` asks whether the router of the next layer predicts well what to read, told
by ``OffloadStore.prefetch``: layers route by themselves, and what one reads resembles what the one
before it read by that cosine, which is a property of a model. Each cosine runs without predictions
and with them.

The limit of the disk is measured between the steps of the same process, with O_DIRECT, 16 requests
of up to 1 MiB in flight. It reads experts as the store misses them, which the host of a virtual
machine may keep in a cache of its own; where there is no store, at random. ``floor`` is the time
that the bytes missed would take at that bandwidth.

Beside what ``open_store`` measured is what ``moesaic simulate-offload`` predicts of the same
routings and budgets, from that disk and from kernels measured in the same process at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import itertools
import json
import mmap
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import moesaic as mo
from moesaic.bench.peers.ggml_peer import GgmlPeer
from moesaic.simulate import Disk, Trace, simulate_disk, zipf
from moesaic.simulate.probe import measure_disk, missed_experts
from moesaic.simulate.stored import measure_costs, measure_latency

WAYS = ("open_store", "page cache", "mapped", "ggml")
#: With inputs that layers route by themselves: without predictions, and with those of the next
#: layer's router.
PREDICTIONS = ("none", "router")
MIB = 1 << 20
#: What interpreter and libraries take beside the model.
BASE = 96 * MIB


def make_model(path: Path, layers: int = 16) -> None:
    """Write a GGUF file with experts as large as those of Qwen3-30B-A3B, each of its own bytes."""
    import gguf

    hidden, intermediate, experts = 2048, 768, 128
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in {
        "block_count": layers, "embedding_length": hidden, "feed_forward_length": intermediate,
        "expert_count": experts, "expert_used_count": 8,
        "expert_feed_forward_length": intermediate,
    }.items():  # fmt: skip
        writer.add_uint32(f"qwen3moe.{key}", value)
    q4, q6 = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
    roles = {"gate": (q4, intermediate, hidden), "up": (q4, intermediate, hidden),
             "down": (q6, hidden, intermediate)}  # fmt: skip
    for layer in range(layers):
        writer.add_tensor_info(
            f"blk.{layer}.ffn_gate_inp.weight", (experts, hidden), np.dtype(np.float32),
            experts * hidden * 4,
        )  # fmt: skip
        for role, (kind, rows, cols) in roles.items():
            row = cols // 256 * gguf.GGML_QUANT_SIZES[kind][1]
            writer.add_tensor_info(
                f"blk.{layer}.ffn_{role}_exps.weight", (experts, rows, row), np.dtype(np.uint8),
                experts * rows * row, raw_dtype=kind,
            )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]  # type: ignore[index]

    def write(data: bytes) -> None:
        file.write(b"\0" * (-file.tell() % 32) + data)

    for _ in range(layers):
        write(rng.standard_normal((experts, hidden), np.float32).tobytes())
        for kind, rows, cols in roles.values():
            size = gguf.GGML_QUANT_SIZES[kind][1]
            write(b"")
            for _ in range(experts):
                blocks = np.frombuffer(rng.bytes(rows * cols // 256 * size), np.uint8)
                blocks = blocks.reshape(-1, size).copy()
                scale = np.array([2e-4, 2e-4] if kind == q4 else [2e-5], np.float16)
                at = slice(0, 4) if kind == q4 else slice(-2, None)
                blocks[:, at] = scale.view(np.uint8)
                file.write(blocks.tobytes())
    file.write(b"\0" * (-file.tell() % 32))
    writer.close()


class MappedGgml(GgmlPeer):
    """ggml on the bytes of a mapped file, without a copy: its tensors point into the mapping."""

    def __init__(self, file: mo.GgufFile, top_k: int) -> None:
        super().__init__()
        g = self._g
        with Path(file.shard_paths[0]).open("rb") as opened:
            self._mapping = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        first = np.frombuffer(self._mapping, np.uint8).ctypes.data
        self._file_context = self._context()
        self._weights = []
        for block in file.moe_layers:
            tensors = {}
            for role in ("gate", "up", "down"):
                found = file.tensors[f"blk.{block}.ffn_{role}_exps.weight"]
                kind = getattr(g, f"GGML_TYPE_{found.quant}")
                experts, rows, cols = found.shape
                tensor = g.ggml_new_tensor_3d(self._file_context, kind, cols, rows, experts)
                tensor.contents.data = first + found.offset
                tensors[role] = tensor
            self._weights.append(tensors)
        hidden = found.shape[1]
        self._layers = [SimpleNamespace(shape=SimpleNamespace(hidden=hidden, top_k=top_k))]


def layers_of(
    way: str, file: mo.GgufFile, store: mo.OffloadStore | None, threads: int
) -> Callable[[int, np.ndarray, np.ndarray, np.ndarray], object]:
    """Return what runs a layer by its number, on x, ids and weights."""
    if way == "ggml":
        peer = MappedGgml(file, mo.MoeConfig.from_gguf(file, file.moe_layers[0]).top_k)
        peer.prepare(1, threads)
        return peer.run
    if store is None:
        layers = [mo.MoeLayer.from_gguf(file, block, layout="file") for block in file.moe_layers]
    else:
        layers = [store.layer(block) for block in store.blocks]
    out = np.empty((1, layers[0].config.hidden_size), np.float32)

    def run(number: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> object:
        return layers[number](x, routing=mo.Routing(ids, weights), out=out)

    return run


def hidden_states(steps: int, layers: int, hidden: int, cosine: float) -> np.ndarray:
    """Return what each layer reads in each step, [steps, layers, H].

    Half of each comes from a topic of the layer, so that some experts are popular; each resembles
    that of the layer before by ``cosine``, the topics included.
    """
    rng = np.random.default_rng(3)

    def fresh(topic: np.ndarray) -> np.ndarray:
        noise = rng.standard_normal((steps, hidden), np.float32)
        return np.float32(0.5**0.5) * (topic + noise)

    states = np.empty((steps, layers, hidden), np.float32)
    for layer in range(layers):
        states[:, layer] = fresh(rng.standard_normal(hidden, np.float32))
        if layer:
            states[:, layer] *= np.float32((1 - cosine**2) ** 0.5)
            states[:, layer] += np.float32(cosine) * states[:, layer - 1]
    return states


def predicting(
    store: mo.OffloadStore, options: argparse.Namespace
) -> tuple[Callable[[int], None], float]:
    """Return what runs a step, and the share of all experts that next routers predict right."""
    layers = [store.layer(block) for block in store.blocks]
    hidden = layers[0].config.hidden_size
    states = hidden_states(
        options.warm + options.steps, len(layers), hidden, float(options.cosines)
    )
    out = np.empty((1, hidden), np.float32)

    def step(number: int) -> None:
        for place, layer in enumerate(layers):
            x = states[number, place][None]
            if options.way == "router" and place + 1 < len(layers):
                ids = layers[place + 1].route(x).topk_ids
                store.prefetch(store.blocks[place + 1], ids)
            layer(x, out=out)

    right = []
    for place in range(1, len(layers)):
        told, asked = (layers[place].route(states[:, place - back]).topk_ids for back in (1, 0))
        right += [len(set(t) & set(a)) / len(a) for t, a in zip(told, asked, strict=True)]
    return step, float(np.mean(right))


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in this process."""
    file = mo.GgufFile(options.file)
    blocks = file.moe_layers
    config = mo.MoeConfig.from_gguf(file, blocks[0])
    trace = zipf(
        steps=options.warm + options.steps, num_experts=config.num_experts, top_k=config.top_k,
        layers=len(blocks), seed=0,
    )  # fmt: skip
    # Only this file leaves the page cache.
    with Path(options.file).open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    store = None
    right = None
    if options.way not in ("mapped", "ggml"):
        store = mo.open_store(
            file, options.limit - BASE, max_tokens=8,
            direct_io=False if options.way == "page cache" else None,
            read_ahead=0 if options.way in PREDICTIONS else 4,
        )  # fmt: skip
    if options.way not in PREDICTIONS:
        run_layer = layers_of(options.way, file, store, options.threads)
    x = np.random.default_rng(1).standard_normal((1, config.hidden_size), np.float32)
    weights = np.full((1, config.top_k), 1 / config.top_k, np.float32)

    def step(number: int) -> None:
        for place, ids in enumerate(trace.ids[number]):
            run_layer(place, x, ids, weights)

    if options.way in PREDICTIONS and store is not None:
        step, right = predicting(store, options)

    seeds = itertools.count(2)

    def measured_disk() -> Disk:
        seed = next(seeds)
        missed = None if store is None else missed_experts(store, seed)
        return measure_disk(file, missed, seed=seed)

    with mo.tuning(threads=options.threads):
        for number in range(options.warm):
            step(number)
        for pool in store.pools if store else ():
            pool.reset_stats()
        before = store.io_stats() if store else {}
        read = _read_bytes()
        times, cpu, disks, probed = [], 0.0, [measured_disk()], 0
        read = _read_bytes()
        for number in range(options.warm, options.warm + options.steps):
            if (number - options.warm) % 15 == 14:
                start = _read_bytes()
                disks.append(measured_disk())
                probed += _read_bytes() - start
            wall, used = time.perf_counter(), time.process_time()
            step(number)
            times.append(time.perf_counter() - wall)
            cpu += time.process_time() - used
    disk = Disk(*(float(np.median(each)) for each in zip(*map(astuple, disks), strict=True)))
    result: dict[str, Any] = {
        "tokens_per_s": options.steps / sum(times),
        "ms_median": float(np.median(times) * 1e3),
        "ms_quartiles": [float(q * 1e3) for q in np.percentile(times, [25, 75])],
        "cpu_s_per_token": cpu / options.steps,
        "disk_bytes_per_token": (_read_bytes() - read - probed) / options.steps,
        "disk_bandwidth": disk.bandwidth,
        "disk_bandwidths": [one.bandwidth for one in disks],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if store is not None:
        after = store.io_stats()
        size = store.experts.layers[0].expert_bytes
        missed = sum(p.stats.miss_experts for p in store.pools) * size / options.steps
        result |= {
            "budget": store.pools[-1].budget,
            "hit_rate": store.hit_rate(),
            "missed_bytes_per_token": missed,
            "read_bytes_per_token": (after["bytes"] - before["bytes"]) / options.steps,
            "floor_ms": missed / disk.bandwidth * 1e3,
            "of_floor": missed / disk.bandwidth / (sum(times) / options.steps),
            "reading": store.reading,
        }
        if right is not None:
            result |= {
                "predicted_right": right,
                "read_ahead": after["ahead"] - before["ahead"],
                "read_ahead_used": after["ahead_used"] - before["ahead_used"],
            }
    if options.way == "open_store" and store is not None:
        budgets = [pool.budget for pool in store.pools]
        missed = list(itertools.islice(missed_experts(store, next(seeds)) or (), 1000))
        del store, run_layer  # what is measured now needs the memory
        result |= prediction(file, trace, budgets, disk, missed, options)
        result["predicted_over_measured"] = (
            result["predicted_tokens_per_s"] / result["tokens_per_s"]
        )
    return result


def prediction(
    file: mo.GgufFile, trace: Trace, budgets: Sequence[int], disk: Disk,
    missed: Sequence[tuple[int, int]], options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Return what simulate-offload would say of a run on this disk, of which experts are missed."""
    with mo.tuning(threads=options.threads):
        costs = measure_latency(file, measure_costs(file, disk), missed)
    outcome = simulate_disk(trace, budgets, costs, warm=options.warm)
    return {
        "predicted_tokens_per_s": outcome.tokens_per_second,
        "predicted_hit_rate": outcome.hit_rate,
        "costs": asdict(costs),
    }


def _read_bytes() -> int:
    """What this process had fetched from disks."""
    found = re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())
    return int(found[1]) if found else 0


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """Make a memory cgroup with this limit; None where this user may not."""
    root = Path("/sys/fs/cgroup")
    first = root / "memory" if (root / "memory").is_dir() else root
    name = "memory.limit_in_bytes" if first != root else "memory.max"
    folder = first / f"moesaic_bench_{os.getpid()}"
    try:
        folder.mkdir()
        (folder / name).write_text(str(limit))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            (folder / "memory.force_empty").write_text("0")
        folder.rmdir()


def run_way(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one way in a process with a limit."""
    command = [
        sys.executable, __file__, options.file, "--way", way, "--limit", str(options.limit),
        "--steps", str(options.steps), "--warm", str(options.warm),
        "--threads", str(options.threads), "--cosines", options.cosines,
    ]  # fmt: skip
    with cgroup(options.limit) as folder:

        def join() -> None:
            if folder is not None:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=join)
    if done.returncode:
        return {"failed": done.returncode, "cgroup": folder is not None}
    return {**json.loads(done.stdout), "cgroup": folder is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", help="a GGUF file with experts (default: made)")
    parser.add_argument("--folder", type=Path, help="where to make one (default: a temporary one)")
    parser.add_argument("--layers", type=int, default=16, help="of the one made (default: 16)")
    parser.add_argument("--share", type=float, default=0.25, help="of the file (default: 0.25)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=20, help="steps before (default: 20)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    there = [way for way in WAYS if way != "ggml" or importlib.util.find_spec("ggml")]
    parser.add_argument("--ways", default=",".join(there))
    parser.add_argument("--cosines", default="", help="of what layers read, to try predictions on")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write <date>.json there")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(work(options)))
        return
    with contextlib.ExitStack() as stack:
        if options.file is None:
            folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options.file = str(folder / "offload_bench.gguf")
            make_model(Path(options.file), options.layers)
        size = Path(options.file).stat().st_size
        options.limit = int(size * options.share)
        results = {way: run_way(way, options) for way in options.ways.split(",") if way}
        cosines, predictions = options.cosines.split(","), []
        for options.cosines in filter(None, cosines):
            for way in PREDICTIONS:
                found = run_way(way, options)
                predictions.append({"cosine": float(options.cosines), "way": way, **found})
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "threads": options.threads,
        "file_bytes": size,
        "limit_bytes": options.limit,
        "steps": options.steps,
        "ways": results,
        "predictions": predictions,
    }
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1) + "\n"
        (options.json / f"{record['date']}.json").write_text(text)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

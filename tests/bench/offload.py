"""A model of four times the memory: open_store beside a mapped file, and the disk's own limit.

``python tests/bench/offload.py MODEL.gguf`` runs every layer of the file in turn, a token a step,
on routings with a fixed popularity of experts (``simulate.zipf``). Each way runs in a process of
its own, in a memory cgroup of a quarter of the file (version 1 or 2, where this user may make one;
else the peak of its memory is only reported). Without a file, one of 6 GB is made in the folder of
``--folder``: 16 layers as large as those of Qwen3-30B-A3B, random Q4_K and Q6_K.

The limit of the disk is measured between the steps of the same process: experts are read at
random, with O_DIRECT, 16 requests of up to 1 MiB in flight. ``floor`` is the time that the bytes
missed would take at that bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import mmap
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import moesaic as mo
from moesaic.simulate import zipf

WAYS = {
    "open_store": "`open_store(file, memory)`",
    "page cache": "`open_store(..., direct_io=False)`",
    "mapped": '`MoeLayer.from_gguf(layout="file")`',
}
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


class Disk:
    """Reads experts at random past the page cache: what the disk can do."""

    def __init__(self, file: mo.GgufFile, seed: int) -> None:
        self.path = file.shard_paths[0]
        self.ranges = []
        for block in file.moe_layers:
            for role in ("gate", "up", "down"):
                tensor = file.tensors[f"blk.{block}.ffn_{role}_exps.weight"]
                size = tensor.nbytes // tensor.shape[0]
                self.ranges += [(tensor.offset + e * size, size) for e in range(tensor.shape[0])]
        self.rng = np.random.default_rng(seed)

    def bandwidth(self, megabytes: int = 300, threads: int = 16) -> float:
        """Return bytes per second."""
        pieces = []
        left = megabytes * 10**6
        while left > 0:
            offset, size = self.ranges[self.rng.integers(len(self.ranges))]
            first, end = offset // 4096 * 4096, -(-(offset + size) // 4096) * 4096
            pieces += [(at, min(MIB, end - at)) for at in range(first, end, MIB)]
            left -= end - first
        queue, lock = iter(pieces), threading.Lock()
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECT)

        def work() -> None:
            buffer = mmap.mmap(-1, MIB)
            while True:
                with lock:
                    piece = next(queue, None)
                if piece is None:
                    return
                os.preadv(descriptor, [memoryview(buffer)[: piece[1]]], piece[0])

        workers = [threading.Thread(target=work) for _ in range(threads)]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = time.perf_counter() - begin
        os.close(descriptor)
        return sum(size for _, size in pieces) / took


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
    if options.way == "mapped":
        layers = [mo.MoeLayer.from_gguf(file, block, layout="file") for block in blocks]
    else:
        store = mo.open_store(
            file, options.limit - BASE, max_tokens=8,
            direct_io=False if options.way == "page cache" else None,
        )  # fmt: skip
        layers = [store.layer(block) for block in blocks]
    x = np.random.default_rng(1).standard_normal((1, config.hidden_size), np.float32)
    weights = np.full((1, config.top_k), 1 / config.top_k, np.float32)
    out = np.empty_like(x)

    def step(number: int) -> None:
        for layer, ids in zip(layers, trace.ids[number], strict=True):
            layer(x, routing=mo.Routing(ids, weights), out=out)

    disk = Disk(file, 2)
    with mo.tuning(threads=options.threads):
        for number in range(options.warm):
            step(number)
        for pool in store.pools if store else ():
            pool.reset_stats()
        before = store.io_stats() if store else {}
        read = _read_bytes()
        times, cpu, bandwidths, probed = [], 0.0, [disk.bandwidth()], 0
        read = _read_bytes()
        for number in range(options.warm, options.warm + options.steps):
            if (number - options.warm) % 15 == 14:
                start = _read_bytes()
                bandwidths.append(disk.bandwidth())
                probed += _read_bytes() - start
            wall, used = time.perf_counter(), time.process_time()
            step(number)
            times.append(time.perf_counter() - wall)
            cpu += time.process_time() - used
    bandwidth = float(np.median(bandwidths))
    result: dict[str, Any] = {
        "tokens_per_s": options.steps / sum(times),
        "ms_median": float(np.median(times) * 1e3),
        "ms_quartiles": [float(q * 1e3) for q in np.percentile(times, [25, 75])],
        "cpu_s_per_token": cpu / options.steps,
        "disk_bytes_per_token": (_read_bytes() - read - probed) / options.steps,
        "disk_bandwidth": bandwidth,
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
            "floor_ms": missed / bandwidth * 1e3,
            "of_floor": missed / bandwidth / (sum(times) / options.steps),
            "reading": store.reading,
        }
    return result


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
        "--threads", str(options.threads),
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
    parser.add_argument("--share", type=float, default=0.25, help="of the file (default: 0.25)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=20, help="steps before (default: 20)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ways", default=",".join(WAYS))
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
            make_model(Path(options.file))
        size = Path(options.file).stat().st_size
        options.limit = int(size * options.share)
        results = {way: run_way(way, options) for way in options.ways.split(",")}
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
    }
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1) + "\n"
        (options.json / f"{record['date']}.json").write_text(text)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

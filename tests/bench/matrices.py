"""One matrix at several types and numbers of rows, beside ggml's mul_mat and the machine's limits.

`python tests/bench/matrices.py` writes matrices/<date>.json; readme_tables.py shows the last one.
What is timed is the product alone, on x that lies where the engine reads it; matrices rotate
through more than 256 MiB, so that weights come from memory.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import moesaic as mo
from moesaic import _core
from moesaic.bench.peers.base import PeerUnavailable
from moesaic.bench.peers.ggml_peer import GgmlPeer
from moesaic.bench.run import CACHE_BYTES, machine, median_and_spread

RESULTS = Path(__file__).parent / "matrices"
N = K = 4096
TYPES = ("Q4_K", "Q6_K", "Q8_0", "BF16")
ROWS = (1, 2, 4, 16, 64, 512, 2048)
ROUNDS = 5
SECONDS = 0.1  # of an engine in a round


class Moesaic:
    """The matrices as QuantMatrix."""

    name = "moesaic"

    def __init__(self, quant: str, copies: list[np.ndarray]) -> None:
        self.matrices = [mo.QuantMatrix.from_encoded(data, quant, (N, K)) for data in copies]

    def prepare(self, x: np.ndarray, threads: int) -> None:
        self.x, self.threads = x, threads
        self.y = np.full((len(x), N), np.nan, np.float32)
        self.workspace = mo.Workspace.for_matrix(self.matrices[0], len(x))

    def run(self, index: int) -> None:
        with mo.tuning(threads=self.threads):
            self.matrices[index % len(self.matrices)](self.x, out=self.y, workspace=self.workspace)

    def result(self) -> np.ndarray:
        return self.y


class Ggml(GgmlPeer):
    """The matrices as tensors of ggml, each with a graph of one mul_mat."""

    def __init__(self, quant: str, copies: list[np.ndarray]) -> None:
        super().__init__()
        g = self._g
        context = self._context()
        ggml_id = mo.testing.quant_types()[quant]["id"]
        self.tensors = [g.ggml_new_tensor_2d(context, ggml_id, K, N) for _ in copies]
        repacked = self._repack and quant in ("Q4_0", "Q4_K", "IQ4_NL")
        self.name = "ggml (repack)" if repacked else "ggml"
        store = (
            g.ggml_backend_alloc_ctx_tensors_from_buft(context, self._repack)
            if repacked
            else g.ggml_backend_alloc_ctx_tensors(context, self._backend)
        )
        self._weight_stores.append((context, store))
        for tensor, data in zip(self.tensors, copies, strict=True):
            at = data.ctypes.data_as(ctypes.c_void_p)
            g.ggml_backend_tensor_set(tensor, at, 0, data.nbytes)

    def prepare(self, x: np.ndarray, threads: int) -> None:  # type: ignore[override]
        g = self._g
        self._release_graphs()
        g.ggml_backend_cpu_set_n_threads(self._backend, threads)
        context = self._graph_context = self._context()
        rows = g.ggml_new_tensor_2d(context, g.GGML_TYPE_F32, K, len(x))
        for tensor in self.tensors:
            out = g.ggml_mul_mat(context, tensor, rows)
            graph = g.ggml_new_graph(context)
            g.ggml_build_forward_expand(graph, out)
            self._graphs.append({"graph": graph, "out": out})
        self._graph_buffer = g.ggml_backend_alloc_ctx_tensors(context, self._backend)
        ctypes.memmove(rows.contents.data, x.ctypes.data, x.nbytes)
        self.shape = (len(x), N)

    def run(self, index: int) -> None:  # type: ignore[override]
        graph = self._graphs[index % len(self._graphs)]["graph"]
        self._g.ggml_backend_graph_compute(self._backend, graph)

    def result(self) -> np.ndarray:
        y = np.empty(self.shape, np.float32)
        ctypes.memmove(y.ctypes.data, self._graphs[0]["out"].contents.data, y.nbytes)
        return y


def timed(call: Callable[[int], object], first: int) -> float:
    """Median microseconds of calls that go on where those of the last round ended."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        call(first + len(times))
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def measure(
    engines: list[Any], values: np.ndarray, nbytes: int, rows: int, threads: int
) -> dict[str, Any]:
    x = np.random.default_rng(rows).standard_normal((rows, K), np.float32)
    want = x[:16].astype(np.float64) @ values.T.astype(np.float64)
    errors = {}
    for engine in engines:
        engine.prepare(x, threads)
        engine.run(0)
        got = engine.result()[:16]
        errors[engine.name] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    found: dict[str, list[float]] = {engine.name: [] for engine in engines}
    floors = []
    for r in range(ROUNDS):
        bandwidth, peak = _core.measure_bandwidth(threads), _core.measure_dot_peak(threads)
        floors.append(max(nbytes / bandwidth * 1e-3, 2e-3 * rows * N * K / peak))
        for i in range(len(engines)):
            engine = engines[(i + r) % len(engines)]
            found[engine.name].append(timed(engine.run, 7 * r))
    point: dict[str, Any] = {"rows": rows, "threads": threads, "engines": {}}
    point["floor_us"], point["floor_spread"] = median_and_spread(floors)
    for engine in engines:
        us, spread = median_and_spread(found[engine.name])
        point["engines"][engine.name] = {"us": us, "spread": spread, "rel_l2": errors[engine.name]}
    return point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    threads = parser.parse_args().threads
    results = []
    for quant in TYPES:
        dense = np.random.default_rng(1).standard_normal((N, K), np.float32) / np.float32(K**0.5)
        data = mo.quantize(dense, quant).view(np.uint8).reshape(-1)
        copies = [data.copy() for _ in range(max(2, -(-CACHE_BYTES // data.nbytes)))]
        engines: list[Any] = [Moesaic(quant, copies)]
        try:
            engines.append(Ggml(quant, copies))
        except PeerUnavailable as error:
            print(error)
        values = mo.dequantize(data, quant, (N, K))
        for rows in ROWS:
            point = measure(engines, values, data.nbytes, rows, threads)
            results.append({"type": quant, **point})
            print(results[-1], flush=True)
        for engine in engines[1:]:
            engine.close()
    date = datetime.date.today().isoformat()
    command = " ".join(("python tests/bench/matrices.py", *sys.argv[1:]))
    facts = {"shape": [N, K], "machine": machine(), "date": date, "command": command}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**facts, "points": results}, indent=1) + "\n"
    (RESULTS / f"{date}.json").write_text(text)


if __name__ == "__main__":
    main()

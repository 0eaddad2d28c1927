"""What a start costs with repacked weights that were kept, and without; memory; one token.

``python tests/bench/weight_cache.py [--folder DIR] [--threads N]`` writes a file of one layer of
Qwen3-30B-A3B's shape and prints the table of the page of formats. Each number is the median of
processes of their own, which take turns; the model file and its cache are in the page cache of the
system.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import moesaic as mo

SHAPE = {"num_experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}
WAYS = {
    "auto": 'layout="auto"',
    "first": "`weight_cache=True`, the first start",
    "cached": "`weight_cache=True`, the next ones",
    "file": 'layout="file"',
}

MEASURE = """
import json, statistics, sys, time
import numpy as np
import moesaic as mo
path, way, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = {"auto": {}, "file": {"layout": "file"}}.get(way, {"weight_cache": True})
def memory():
    found = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(found[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]
with mo.tuning(threads=threads):
    file = mo.GgufFile(path)
    before = memory()
    start = time.perf_counter()
    layers = [mo.MoeLayer.from_gguf(file, i, **options) for i in file.moe_layers]
    load = (time.perf_counter() - start) / len(layers)
    rng = np.random.default_rng(0)
    h = layers[0].config.hidden_size
    start = time.perf_counter()
    for layer in layers:
        layer(rng.standard_normal((512, h), np.float32))  # goes to every expert
    first = (time.perf_counter() - start) / len(layers)
    own, files = (now - then for now, then in zip(memory(), before))
    tokens = rng.standard_normal((300, 1, h), np.float32)
    times = []
    for i, x in enumerate(tokens):
        start = time.perf_counter()
        layers[i % len(layers)](x)
        times.append(time.perf_counter() - start)
print(json.dumps({"load": load, "first": first, "token": statistics.median(times), "own": own,
                  "files": files}))
"""


def measure(path: Path, way: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURE, str(path), way, str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="for the file (default: a temporary one)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = (options.folder or Path(temporary)) / "qwen3-30b-a3b-layer.gguf"
        if not path.exists():
            mo.testing.write_moe_gguf(path, **SHAPE)
        cache = path.with_name(path.name + ".panels")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for way in WAYS:
                found[way].append(measure(path, way, options.threads))
        shutil.rmtree(cache, ignore_errors=True)
    print("| weights | load, s a layer | first call, s | one token, us | own MiB | shared MiB |")
    print("| --- | --: | --: | --: | --: | --: |")
    for way, name in WAYS.items():
        load, first, token, own, files = (
            statistics.median(one[key] for one in found[way])
            for key in ("load", "first", "token", "own", "files")
        )
        numbers = f"{load:.3f} | {first:.2f} | {token * 1e6:,.0f} | {own:,.0f} | {files:,.0f}"
        print(f"| {name} | {numbers} |")


if __name__ == "__main__":
    main()

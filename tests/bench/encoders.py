"""Every encoder beside ggml's own: error on two distributions, without and with importances.

`python tests/bench/encoders.py` writes encoders/<date>.json; readme_tables.py shows the last one.
ggml's encoders are those of a package that brings its library (llama-cpp-python, llama-cpp-py-sync,
ggml-python), or of the library that --ggml names.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import moesaic as mo

RESULTS = Path(__file__).parent / "encoders"
PACKAGES = ("llama_cpp", "llama_cpp_py_sync", "ggml")
COLS = 4096
ROWS = 64
# Types whose encoders in ggml do nothing without an importance matrix; a matrix of ones is none.
NEEDS_IMPORTANCE = {"IQ2_XXS", "IQ2_XS", "IQ1_S"}
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator], npt.NDArray[np.float64]]] = {
    "normal": lambda rng: rng.standard_normal((ROWS, COLS)),
    "student_3": lambda rng: rng.standard_t(3, (ROWS, COLS)),
}

_Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]


def find_ggml() -> Path:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for name in ("libggml-base.so*", "libggml-base.dylib", "libggml.so*", "libggml.dylib"):
                for path in sorted(Path(folder).rglob(name)):
                    return path
    raise SystemExit(f"none of {', '.join(PACKAGES)} is installed; name a library with --ggml")


class Ggml:
    """Its encoders, one thread each."""

    def __init__(self, path: Path) -> None:
        self._encode = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self._encode.restype = ctypes.c_size_t
        row = ctypes.c_int64
        self._encode.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
            *(row, row, row, ctypes.c_void_p),
        ]

    def quantize(self, w: _Floats, facts: dict[str, Any], importance: _Floats | None) -> _Bytes:
        row_bytes = w.shape[1] // facts["block_elems"] * facts["block_bytes"]
        out = np.zeros((len(w), row_bytes), np.uint8)
        weights = None if importance is None else importance.ctypes.data
        self._encode(facts["id"], w.ctypes.data, out.ctypes.data, 0, *w.shape, weights)
        return out


def error(w: _Floats, data: _Bytes, quant: str, importance: _Floats | None) -> float:
    counts = np.ones(w.shape[1]) if importance is None else importance.astype(np.float64)
    rest = mo.dequantize(data, quant).astype(np.float64) - w
    return float(np.sqrt((counts * rest**2).sum() / (counts * w.astype(np.float64) ** 2).sum()))


def timed(encode: Callable[[], _Bytes], rounds: int = 3) -> tuple[_Bytes, float]:
    """The bytes, and CPU seconds of the quickest round: the encoders only compute."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        data = encode()
        best = min(best, time.process_time() - start)
    return data, best


def measure(ggml: Ggml, quant: str, facts: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"type": quant, "errors": {}}
    seconds = {"ours": 0.0, "ggml": 0.0}
    for name, draw in DISTRIBUTIONS.items():
        rng = np.random.default_rng(5)
        # NVFP4 has no scale of the whole, and its own reach down to 2^-9 only.
        w = (draw(rng) * (3.0 if quant == "NVFP4" else 0.02)).astype(np.float32)
        squares = np.exp(2 * rng.standard_normal(COLS)).astype(np.float32)
        ones = np.ones(COLS, np.float32)
        for importance in (None, squares) if facts["takes_weights"] else (None,):
            given = ones if importance is None and quant in NEEDS_IMPORTANCE else importance
            ours, own_s = timed(partial(mo.quantize, w, quant, weights=importance))
            theirs, ggml_s = timed(partial(ggml.quantize, w, facts, given))
            seconds["ours"] += own_s
            seconds["ggml"] += ggml_s
            row["errors"][name + ("" if importance is None else "_weighted")] = [
                error(w, ours, quant, importance),
                error(w, theirs, quant, importance),
            ]
    values = ROWS * COLS * len(row["errors"])
    row["mvalues_per_s"] = {who: values / s / 1e6 for who, s in seconds.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ggml", type=Path, help="a shared library with ggml_quantize_chunk")
    parser.add_argument("--types", help="comma-separated; the default is every type")
    parser.add_argument("--output", type=Path, help="a JSON file; the default is one per date")
    options = parser.parse_args()
    ggml = Ggml(options.ggml or find_ggml())
    wanted = options.types.split(",") if options.types else None
    rows = []
    with mo.tuning(threads=1):
        for quant, facts in mo.testing.quant_types().items():
            if not facts["encodes"] or not facts["gguf"] or quant in ("F32", "F16", "BF16"):
                continue
            if wanted is None or quant in wanted:
                rows.append(measure(ggml, quant, facts))
                print(rows[-1], flush=True)
    date = datetime.date.today().isoformat()
    machine = next(iter(cpu_names()), os.uname().machine)
    text = json.dumps({"machine": machine, "date": date, "rows": rows}, indent=1) + "\n"
    if wanted is None or options.output:
        (options.output or RESULTS / f"{date}.json").write_text(text)


def cpu_names() -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]


if __name__ == "__main__":
    main()

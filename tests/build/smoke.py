"""A layer of each format beside the reference, on what is installed. Needs nothing but the package.

python smoke.py [--isa NAME]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

import moesaic as mo

# Relative L2 errors as in tests/README.md, by the number of tokens.
BOUNDS = {1: 2e-3, 16: 2e-2}


def errors(path: Path, quant: str) -> dict[int, float]:
    """The error of a layer of this format for each number of tokens."""
    mo.testing.write_moe_gguf(path, num_experts=4, gate_type=quant, down_type=quant)
    found = {}
    with mo.GgufFile(path) as file, mo.MoeLayer.from_gguf(file, 0) as layer:
        for tokens in BOUNDS:
            x = np.random.default_rng(0).standard_normal((tokens, 256), dtype=np.float32)
            y, routing = layer(x, out=np.full_like(x, np.nan), return_routing=True)
            reference = mo.moe_forward_cpu(x, routing, layer)
            found[tokens] = float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", help="the instruction set that must have been chosen")
    expected = parser.parse_args().isa
    chosen = mo.backends()[0].detail
    wrong = [] if expected in (None, chosen) else [f"chosen is {chosen}, expected {expected}"]
    # A type that the installed gguf cannot name cannot be written.
    names = [
        name
        for name, facts in mo.testing.quant_types().items()
        if facts["encodes"] and hasattr(gguf.GGMLQuantizationType, name)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for tokens, error in errors(Path(folder) / f"{name}.gguf", name).items():
                if not error <= BOUNDS[tokens]:  # NaN is wrong too
                    wrong.append(f"{name}, {tokens} tokens: error {error:.1e}")
    try:
        mo.GgufFile(__file__)
        wrong.append("a file of no format was opened")
    except mo.FormatError:  # thrown in C++: its unwinder works in what was linked
        pass
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"moesaic {mo.__version__} on {chosen}: {len(names)} formats, {len(wrong)} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

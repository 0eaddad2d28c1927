"""A low-rank delta: fine-tuned experts beside quantised weights, and baked into them.

Run with a file of yours, or without one to make a small file first.
"""

import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

import moesaic as mo

Matrix = npt.NDArray[np.float32]
Deltas = dict[Literal["gate", "up", "down"], tuple[Matrix, Matrix, float]]


def adapter(stack: mo.ExpertStack, rank: int) -> Deltas:
    """A and B for each role, as a training of LoRA adapters leaves them; here they are random."""
    rng = np.random.default_rng(0)
    deltas: Deltas = {}
    for role in stack.quants:
        # Gate and up are [I, H], down is [H, I].
        rows, cols = stack.intermediate_size, stack.hidden_size
        if role == "down":
            rows, cols = cols, rows
        a = rng.standard_normal((stack.num_experts, rank, cols), np.float32) / cols**0.5
        b = rng.standard_normal((stack.num_experts, rows, rank), np.float32) / np.float32(5)
        deltas[role] = (a, b, 0.5)  # y += 0.5 * B (A x)
    return deltas


def main(path: Path) -> None:
    layer = mo.MoeLayer.from_gguf(path, mo.GgufFile(path).moe_layers[0])
    x = np.random.default_rng(1).standard_normal((64, layer.config.hidden_size), np.float32)

    tuned = layer.replace(stack=layer.stack.with_deltas(adapter(layer.stack, rank=8)))
    added = tuned.stack.nbytes - layer.stack.nbytes
    print(f"the delta takes {added / layer.stack.nbytes:.0%} of the bytes of the experts")
    change = np.linalg.norm(tuned(x) - layer(x)) / np.linalg.norm(layer(x))
    print(f"it changes the output by {change:.0%}")

    # Without a cost in a call, but rounded anew in the type of each role, or of one asked for.
    wanted = mo.moe_forward_cpu(x, tuned(x, return_routing=True)[1], tuned)
    for quant in (None, "Q8_0"):
        try:
            baked = tuned.replace(stack=tuned.stack.bake(quant))
        except mo.ShapeError as no_fit:  # rows that are no whole blocks of this type
            print(f"not baked to {quant}: {no_fit}")
            continue
        error = np.linalg.norm(baked(x) - wanted) / np.linalg.norm(wanted)
        print(f"baked to {'/'.join(baked.stack.quants.values())}: error {error:.2%}")


with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        small = Path(folder) / "small.gguf"
        mo.testing.write_moe_gguf(
            small, num_experts=8, top_k=2, hidden=256, intermediate=256, seed=0
        )
        main(small)

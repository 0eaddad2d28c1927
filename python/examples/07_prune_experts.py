"""Prune: measure which experts a layer uses, keep the busiest, and see what it costs.

Run with a file of yours, or without one to make a small file first.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import moesaic as mo


def prune(layer: mo.MoeLayer, keep: int, x: np.ndarray) -> mo.MoeLayer:
    """The layer with the ``keep`` experts that the tokens ``x`` chose most often."""
    _, routing = layer(x, return_routing=True)
    usage = np.bincount(np.ravel(routing.topk_ids), minlength=layer.config.num_experts)
    busiest = np.sort(np.argsort(-usage)[:keep])  # in their old order
    share = usage[busiest].sum() / usage.sum()
    print(f"kept {keep} of {len(usage)} experts, which had {share:.0%} of the pairs")
    return layer.select_experts(busiest)


def main(path: Path) -> None:
    layer = mo.MoeLayer.from_gguf(path, mo.GgufFile(path).moe_layers[0])
    rng = np.random.default_rng(0)
    # Tokens of one kind: around a direction, as those of a narrow task are.
    topic = rng.standard_normal(layer.config.hidden_size)
    tokens = topic + 0.7 * rng.standard_normal((512, len(topic)))
    measured, unseen = np.split(tokens.astype(np.float32), 2)

    experts = layer.config.num_experts
    whole = layer(unseen)
    for keep in (3 * experts // 4, experts // 2):
        pruned = prune(layer, keep, measured)
        error = np.linalg.norm(pruned(unseen) - whole) / np.linalg.norm(whole)
        print(f"  {pruned.stack.nbytes / layer.stack.nbytes:.0%} of the bytes, error {error:.1%}")


with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        small = Path(folder) / "small.gguf"
        mo.testing.write_moe_gguf(small, num_experts=32, top_k=4, hidden=256, intermediate=256)
        main(small)

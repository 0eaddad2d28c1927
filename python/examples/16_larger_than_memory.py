"""A model larger than its memory: a few experts stay, the others are read when they are needed.

Run with a GGUF file or a checkpoint folder of yours and a size such as 12GiB, or without to make a
small file first.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import moesaic as mo


def main(path: Path, memory: str) -> None:
    store = mo.open_store(path, memory, max_tokens=64)
    print(store)
    layers = [store.layer(block) for block in store.blocks]

    # Tokens of one text ask for the same experts again and again: here, noise around one vector.
    rng = np.random.default_rng(0)
    topic = rng.standard_normal((1, layers[0].config.hidden_size), np.float32)
    for step in range(1, 41):
        x = topic + 0.3 * rng.standard_normal(topic.shape, np.float32)
        for layer in layers:
            x = x + layer(x)
        if step % 20 == 0:
            print(f"{step} tokens: {store.hit_rate():.0%} of the experts were in memory")

    # The bits are those of a layer that has everything in memory.
    open_layer = mo.MoeLayer.from_safetensors if path.is_dir() else mo.MoeLayer.from_gguf
    whole = open_layer(path, store.blocks[0])
    print("same bits:", np.array_equal(layers[0](topic), whole(topic)))

    # Whoever predicts what a layer will need says so, and the reads begin.
    store.prefetch(store.blocks[-1], [0, 1])
    print("memory:", store.memory())
    print("reads:", store.io_stats())

    # What was used most is read first the next time.
    again = mo.open_store(path, memory, max_tokens=64, profile=store.profile())
    print("kept:", sorted(again.pools[0].residents.tolist())[:8])


with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) > 2:
        main(Path(sys.argv[1]), sys.argv[2])
    else:
        small = Path(folder) / "small.gguf"
        mo.testing.write_moe_gguf(
            small, num_experts=32, top_k=4, hidden=256, intermediate=256, layers=2
        )
        main(small, "4MiB")

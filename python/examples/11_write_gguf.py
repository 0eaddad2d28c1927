"""Take layers of a model, write them to a file of their own, and open that again.

Run with a file of yours, or without one to make a small file first.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import moesaic as mo

with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) > 1:
        source = Path(sys.argv[1])
    else:
        source = Path(folder) / "small.gguf"
        mo.testing.write_moe_gguf(
            source, num_experts=16, top_k=4, hidden=512, intermediate=256, layers=3,
            gate_type="Q4_K", up_type="Q4_K", down_type="Q6_K", seed=0,
        )  # fmt: skip

    with mo.GgufFile(source) as file:
        blocks = file.moe_layers[:2]
        layers = {block: mo.MoeLayer.from_gguf(file, block) for block in blocks}

    target = Path(folder) / "layers.gguf"
    mo.write_gguf(target, layers, metadata={"general.name": f"blocks {blocks} of {source.name}"})
    print(f"{target.name}: {target.stat().st_size} bytes")

    with mo.GgufFile(target) as file:
        print(f"{file.metadata['general.name']}, MoE layers {file.moe_layers}")
        for block, layer in layers.items():
            again = mo.MoeLayer.from_gguf(file, block)
            x = np.random.default_rng(block).standard_normal((8, layer.config.hidden_size))
            x = x.astype(np.float32)
            same = np.array_equal(again(x), layer(x))
            print(f"block {block}: {again.stack.quants}, equal outputs: {same}")
            again.close()

    # An architecture has keys for what its models do. What it has none for is refused by name.
    layer = layers[blocks[0]]
    router = layer.config.router.replace(scale=2.5)
    scaled = layer.replace(config=layer.config.replace(router=router))
    try:
        scaled.save(Path(folder) / "scaled.gguf")
    except mo.UnsupportedError as error:
        print(f"refused: {error}")

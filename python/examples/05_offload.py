"""Experts in slow memory, a few of them in fast memory: pools, misses, a profile, a memory limit.

Run with a file of yours, or without one to make a small file first.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import moesaic as mo


def decode(store: mo.MoeExpertStore, pools: list[mo.ExpertPool], steps: int) -> None:
    """Missing experts are computed where they lie; every few steps the pools take stock."""
    blocks = [view.layer_index for view in store.layers]
    layers = [mo.MoeLayer.from_store(store, i, p) for i, p in zip(blocks, pools, strict=True)]
    rng = np.random.default_rng(0)
    for step in range(steps):
        x = rng.standard_normal((1, layers[0].config.hidden_size), np.float32)
        asked = []
        for layer in layers:
            y, routing = layer(x, return_routing=True)
            asked.append(routing.topk_ids)
            x = x + y
        store.refresh_pools(pools, asked, step)
        moved = store.apply(pools)
        if moved:
            print(f"step {step}: moved {moved // store.layers[0].expert_bytes} experts")
    print(f"hit rate of layer 0: {pools[0].stats.hit_rate:.0%}")


def main(path: Path) -> None:
    file = mo.GgufFile(path)
    store = mo.MoeExpertStore.from_gguf(file)  # copies nothing
    first = store.layers[0]
    experts = first.up.num_experts
    budget = min(store.fitting_budgets(memory=9 * first.expert_bytes))
    print(f"{budget} of {experts} experts a layer in fast memory")
    every_4 = mo.RefreshPolicy.every_decode_steps(4)
    pools = [mo.ExpertPool(experts, budget, every_4) for _ in store.layers]
    decode(store, pools, steps=12)

    # Whoever is resident, the result is that of a layer with everything in fast memory.
    whole = mo.MoeLayer.from_gguf(file, first.layer_index)
    x = np.ones((1, whole.config.hidden_size), np.float32)
    with mo.MoeLayer.from_store(store, 0, pools[0]) as layer:
        print("same bits:", np.array_equal(layer(x), whole(x)))

    # What was learnt warms the pools of the next run, here under a memory limit: the file is read
    # piece by piece, and missing experts are brought to fast memory first.
    profile = store.profile()
    limit = (16 + 2 * budget) * store.num_layers * first.expert_bytes
    limited = mo.MoeExpertStore.from_gguf(file, memory_limit=limit)
    warm = [mo.ExpertPool(experts, budget, decay=0.97) for _ in limited.layers]
    profile.warm(warm)
    limited.apply(warm)
    with mo.MoeLayer.from_store(limited, 0, warm[0], on_miss="stage") as layer:
        print("same bits:", np.array_equal(layer(x), whole(x)))
    memory = limited.memory()
    print(f"slots {memory['slots']}, staging {memory['staging']} of {memory['limit']} bytes")


with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        small = Path(folder) / "small.gguf"
        mo.testing.write_moe_gguf(
            small, num_experts=16, top_k=4, hidden=256, intermediate=256, layers=2
        )
        main(small)

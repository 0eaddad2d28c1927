"""How often each expert is used: measured on a layer that runs, as numbers, a table and a plot.

Run with a file of yours, or without one to make a small file first. The plot needs matplotlib.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import moesaic as mo


def measure(store: mo.MoeExpertStore, steps: int, tokens: int) -> mo.ExpertProfile:
    """Pools that hold every expert only count: the results are those of the layers alone."""
    experts = [layer.up.num_experts for layer in store.layers]
    pools = [mo.ExpertPool(count, count, coactivation=True) for count in experts]
    blocks = [view.layer_index for view in store.layers]
    layers = [mo.MoeLayer.from_store(store, i, p) for i, p in zip(blocks, pools, strict=True)]
    rng = np.random.default_rng(0)
    hidden = layers[0].config.hidden_size
    for _ in range(steps):
        x = rng.standard_normal((tokens, hidden), np.float32)
        for layer in layers:
            x = x + layer(x)
    return store.profile()


def main(path: Path, folder: Path) -> None:
    profile = measure(mo.MoeExpertStore.from_gguf(path), steps=16, tokens=32)
    spread = profile.effective_experts()
    for i, counts in enumerate(profile.counts):
        order = np.argsort(-counts)
        print(
            f"layer {profile.layer_indices[i]}: {profile.tokens[i]} tokens,"
            f" most used {order[:3].tolist()}, least used {order[-3:].tolist()},"
            f" as many as {spread[i]:.1f} used evenly"
        )
        pairs = np.triu(profile.coactivation[i], 1)
        a, b = np.unravel_index(pairs.argmax(), pairs.shape)
        print(f"  experts {a} and {b} share {pairs[a, b]} tokens, more than any other two")
    half = profile.counts.shape[1] // 2
    share = profile.best_hit_rate(half).mean()
    print(f"the best {half} of each layer have {share:.0%} of all pairs")

    # The profile is a value: it is saved, sent to other processes, and compared.
    profile.save(folder / "usage.npz")
    print("saved and loaded:", mo.ExpertProfile.load(folder / "usage.npz") == profile)
    policy = mo.RefreshPolicy.every_decode_steps(4)
    print("settings as JSON:", json.dumps(policy.to_dict()))

    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so there is no plot")
        return
    # The plot goes into a figure of yours, whatever backend you use.
    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    profile.plot(ax=left)
    right.plot(np.sort(profile.counts, axis=1)[:, ::-1].T)
    right.set(xlabel="experts, most used first", ylabel="pairs")
    figure.savefig(folder / "usage.png")
    print("plotted", (folder / "usage.png").stat().st_size > 0)


with tempfile.TemporaryDirectory() as name:
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]), Path(name))
    else:
        small = Path(name) / "small.gguf"
        mo.testing.write_moe_gguf(
            small, num_experts=16, top_k=4, hidden=256, intermediate=256, layers=3
        )
        main(small, Path(name))

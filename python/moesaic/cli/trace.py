"""``moesaic trace FILE --tokens N``: which experts a file's routers ask for, as table and picture.

Without ``--input`` the tokens are random vectors: that shows what the routers prefer by themselves,
not what text asks for. What a router reads beside them (token ids, an input of its own) is random
in any case.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

import moesaic as mo

from .inputs import other_inputs, rows
from .table import size, table

HEADER = (
    "layer", "experts used", "effective experts", "most used", "best fixed set", "hit rate",
    "loaded",
)  # fmt: skip
LEGEND = """\
experts used: how many were asked for. effective experts: exp of the entropy of their use; all of
them when they are used equally. most used: share of the pairs (token and expert) that go to one.
best fixed set: hit rate of a pool of this size that holds the most used experts from start to end.
hit rate: pairs whose expert was in fast memory. loaded: bytes brought to fast memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a GGUF file, or any of its shards")
    parser.add_argument("--tokens", type=int, default=256, help="in all (default: 256)")
    parser.add_argument("--batch", type=int, default=1, help="tokens of a forward (default: 1)")
    parser.add_argument(
        "--input", metavar="NPY", help="activations f32 [tokens, H] instead of random ones"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random ones")
    parser.add_argument("--layers", help="store layers such as 0,1,5 (default: all)")
    parser.add_argument("--budget", type=int, help="experts in fast memory (default: a quarter)")
    parser.add_argument(
        "--ranking", choices=["hits", "recency", "fixed"], default="hits", help="default: hits"
    )
    parser.add_argument("--decay", type=float, default=0.97, help="of hits (default: 0.97)")
    parser.add_argument(
        "--on-miss", choices=["compute", "stage"], default="stage", help="default: stage"
    )
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="read the file piece by piece below this"
    )
    parser.add_argument("--plot", metavar="PNG", help="write the heat map (needs matplotlib)")
    parser.add_argument("--save", metavar="NPZ", help="write the profile, to warm pools with")
    parser.add_argument("--save-trace", metavar="NPZ", help="write the ids for simulate-offload")


def run(options: argparse.Namespace) -> int:
    if options.tokens < 1 or options.batch < 1:
        raise mo.ConfigError("trace: --tokens and --batch: expected at least 1")
    limit = None if options.memory_limit is None else int(options.memory_limit * (1 << 30))
    with mo.GgufFile(options.file) as file:
        trace_file(file, limit, options)
    return 0


def trace_file(file: mo.GgufFile, limit: int | None, options: argparse.Namespace) -> None:
    store = mo.MoeExpertStore.from_gguf(file, memory_limit=limit)
    chosen = chosen_layers(options.layers, store.num_layers)
    experts = [layer.up.num_experts for layer in store.layers]
    pools = [
        mo.ExpertPool(
            e,
            e // 4 if options.budget is None else options.budget,
            ranking=options.ranking,
            decay=options.decay if options.ranking == "hits" else 0.0,
            coactivation=e <= 512,
        )
        for e in experts
    ]
    x: npt.NDArray[np.float32] | None = None
    ids = []
    for i in chosen:
        with mo.MoeLayer.from_store(store, i, pools[i], options.on_miss) as layer:
            if x is None:
                x = activations(options, layer.config.hidden_size)
            other = other_inputs(layer, len(x), options.seed)
            steps = []
            for first in range(0, len(x) - len(x) % options.batch, options.batch):
                end = first + options.batch
                _, routing = layer(x[first:end], return_routing=True, **rows(other, first, end))
                steps.append(routing.topk_ids.copy())
            ids.append(np.stack(steps))
    profile = mo.ExpertProfile.of_store(store)
    print(f"{options.file}: {len(ids[0]) * options.batch} tokens, {options.batch} a forward")
    print()
    print(table(HEADER, layer_rows(profile, [pools[i] for i in chosen])))
    print()
    print(LEGEND)
    if options.plot:
        profile.plot(options.plot)
    if options.save:
        profile.save(options.save)
    if options.save_trace:
        from ..simulate import Trace

        if len(set(experts)) > 1 or len({a.shape for a in ids}) > 1:
            raise mo.UnsupportedError("trace: --save-trace: expected layers of one shape, got more")
        Trace(np.stack(ids, axis=1).astype(np.int32), experts[0]).save(options.save_trace)


def chosen_layers(text: str | None, count: int) -> list[int]:
    """Parse "0,1,5"; all layers for None."""
    if text is None:
        return list(range(count))
    try:
        chosen = sorted({int(part) for part in text.split(",")})
    except ValueError:
        chosen = []
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise mo.ConfigError(f"trace: --layers: expected some of 0 to {count - 1}, got {text!r}")
    return chosen


def activations(options: argparse.Namespace, hidden: int) -> npt.NDArray[np.float32]:
    """Return f32 [tokens, H]: random, or read from a file."""
    if options.input is None:
        rng = np.random.default_rng(options.seed)
        return rng.standard_normal((options.tokens, hidden), np.float32)
    try:
        x = np.load(Path(options.input), allow_pickle=False)
    except ValueError as error:
        raise mo.FormatError(f"{options.input}: expected an .npy file, got {error}") from error
    if x.ndim != 2 or x.shape[1] != hidden or not len(x):
        raise mo.ShapeError(f"{options.input}: expected [tokens, {hidden}], got {list(x.shape)}")
    return np.ascontiguousarray(x[: options.tokens], np.float32)


def layer_rows(profile: mo.ExpertProfile, pools: list[mo.ExpertPool]) -> list[list[str]]:
    """Return one table row per layer."""
    lines = []
    effective = profile.effective_experts()
    for i, (counts, pool) in enumerate(zip(profile.counts, pools, strict=True)):
        stats = pool.stats
        best = profile.best_hit_rate(pool.budget)[i]
        lines.append(
            [
                str(profile.layer_indices[i]),
                f"{int((counts > 0).sum())} of {pool.num_experts}",
                f"{effective[i]:.1f}",
                f"{counts.max() / max(counts.sum(), 1):.1%}",
                f"{best:.1%}",
                f"{stats.hit_rate:.1%}",
                size(stats.bytes),
            ]
        )
    return lines

"""``moesaic trace FILE --tokens N``: which experts a file's routers ask for, as table and picture.

Without ``--input`` the tokens are random vectors: that shows what the routers prefer by themselves,
not what text asks for. What a router reads beside them (token ids, an input of its own) is random
in any case.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import moesaic as mo
from moesaic._errors import error_of

from .inputs import other_inputs, rows
from .models import CheckpointModel, GgufModel, choose_layers, open_model
from .options import add_json, add_model, integer, integers, number, output, picture
from .table import filled, size, table

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
    add_model(parser)
    parser.add_argument("--tokens", type=integer(1), default=256, help="in all (default: 256)")
    parser.add_argument(
        "--batch", type=integer(1), default=1, help="tokens of a forward (default: 1)"
    )
    parser.add_argument(
        "--input", metavar="NPY", help="activations f32 [tokens, H] instead of random ones"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of the random ones")
    parser.add_argument(
        "--layers",
        type=integers(0),
        metavar="N,N",
        help="numbers of blocks in the model, such as 0,1,5 (default: all with experts)",
    )
    parser.add_argument(
        "--budget",
        type=integer(0),
        help="experts in fast memory (default: a quarter, or what fits below --memory-limit)",
    )
    parser.add_argument(
        "--ranking", choices=["hits", "recency", "fixed"], default="hits", help="default: hits"
    )
    parser.add_argument("--decay", type=number(0, 1), default=0.97, help="of hits (default: 0.97)")
    parser.add_argument(
        "--on-miss", choices=["compute", "stage"], default="stage", help="default: stage"
    )
    parser.add_argument(
        "--memory-limit",
        type=number(0, above=True),
        metavar="GIB",
        help="read experts one by one below this",
    )
    parser.add_argument(
        "--plot", type=picture, metavar="PNG", help="write the heat map (needs matplotlib)"
    )
    parser.add_argument(
        "--save", type=output, metavar="NPZ", help="write the profile, to warm pools with"
    )
    parser.add_argument(
        "--save-trace", type=output, metavar="NPZ", help="write the ids for simulate-offload"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    with open_model(options.file) as model:
        layers = choose_layers(model, options.layers)
        shapes = {(c.num_experts, c.top_k) for c in map(model.config, layers)}
        if options.save_trace and len(shapes) > 1:
            shown = ", ".join(f"top {k} of {e}" for e, k in sorted(shapes))
            raise error_of(
                mo.UnsupportedError, "trace", "--save-trace",
                "layers with one number of experts and of those per token", shown,
                "--layers chooses some",
            )  # fmt: skip
        if isinstance(model, CheckpointModel) and options.memory_limit is None:
            report(*trace_checkpoint(model, layers, options), options)
        else:
            report(*trace_store(store_of(model, options), layers, options), options)
    return 0


@dataclass
class LayerRun:
    """What one layer asked for, and what its pool did."""

    layer: int
    pool: mo.ExpertPool
    ids: npt.NDArray[np.int32]  # [steps, batch, top_k]
    hit_rate: float
    loaded: int  # bytes


def new_pool(experts: int, options: argparse.Namespace, room: int | None = None) -> mo.ExpertPool:
    """Return a pool of the budget that was asked for, else of a quarter or what has ``room``."""
    budget = experts // 4 if room is None else min(experts // 4, room)
    return mo.ExpertPool(
        experts,
        budget if options.budget is None else min(options.budget, experts),
        ranking=options.ranking,
        decay=options.decay if options.ranking == "hits" else 0.0,
        coactivation=experts <= 512,
    )


def forwards(
    layer: mo.MoeLayer, x: npt.NDArray[np.float32], options: argparse.Namespace
) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the ids of each forward."""
    other = other_inputs(layer, len(x), options.seed)
    for first in range(0, len(x) - len(x) % options.batch, options.batch):
        end = first + options.batch
        _, routing = layer(x[first:end], return_routing=True, **rows(other, first, end))
        yield routing.topk_ids.copy()


def store_of(model: GgufModel | CheckpointModel, options: argparse.Namespace) -> mo.MoeExpertStore:
    """Return the experts of a model: in files below a limit, else where a GGUF file is mapped."""
    limit = None if options.memory_limit is None else int(options.memory_limit * (1 << 30))
    if isinstance(model, GgufModel):
        return mo.MoeExpertStore.from_gguf(model.file, memory_limit=limit)
    assert limit is not None
    return mo.MoeExpertStore.from_safetensors(model.source(), memory_limit=limit)


def trace_store(
    store: mo.MoeExpertStore, layers: list[int], options: argparse.Namespace
) -> tuple[list[LayerRun], mo.ExpertProfile]:
    """Run layers whose experts move in and out of pools, as they would in use."""
    places = {view.layer_index: i for i, view in enumerate(store.layers)}
    room = store.fitting_budgets()
    runs = []
    for index in layers:
        i = places[index]
        pool = new_pool(store.layers[i].up.num_experts, options, room[i])
        with mo.MoeLayer.from_store(store, index, pool, options.on_miss) as layer:
            x = activations(options, layer.config.hidden_size)
            ids = np.stack(list(forwards(layer, x, options)))
        runs.append(LayerRun(index, pool, ids, pool.stats.hit_rate, pool.stats.bytes))
    return runs, mo.ExpertProfile.of_store(store)


def trace_checkpoint(
    model: CheckpointModel, layers: list[int], options: argparse.Namespace
) -> tuple[list[LayerRun], mo.ExpertProfile]:
    """Run whole layers one after another, and count what pools would have done with their ids.

    As in a store, the slots start empty. This takes checkpoints whose experts no store reads.
    """
    runs, counts = [], []
    for index in layers:
        with model.open(index) as layer:
            pool = new_pool(layer.config.num_experts, options)
            x = activations(options, layer.config.hidden_size)
            steps, hits, loads = [], 0, 0
            present = np.zeros(pool.num_experts, np.bool_)
            for ids in forwards(layer, x, options):
                used, times = np.unique(ids[ids >= 0], return_counts=True)
                hits += int(times[present[used]].sum())
                if options.on_miss == "stage":
                    loads += int((~present[used]).sum())
                    pool.stage(ids)
                    present[used] = True
                    present &= pool.resident_mask
                else:
                    pool.observe(ids)
                steps.append(ids)
            taken = np.stack(steps)
            counts.append(np.bincount(taken[taken >= 0], minlength=pool.num_experts))
            rate = hits / max(int(counts[-1].sum()), 1)
            loaded = loads * layer.stack.bytes_per_expert
            runs.append(LayerRun(index, pool, taken, rate, loaded))
    most = max(map(len, counts))
    padded = np.stack([np.pad(one, (0, most - len(one))) for one in counts])
    return runs, mo.ExpertProfile.from_counts(padded, layers)


def report(runs: list[LayerRun], profile: mo.ExpertProfile, options: argparse.Namespace) -> None:
    if options.plot:
        profile.plot(options.plot)
    if options.save:
        profile.save(options.save)
    if options.save_trace:
        from ..simulate import Trace

        ids = np.stack([one.ids for one in runs], axis=1)
        Trace(ids.astype(np.int32), runs[0].pool.num_experts).save(options.save_trace)
    facts = layer_facts(profile, runs)
    if options.json:
        print(json.dumps({"path": options.file, "batch": options.batch, "layers": facts}, indent=2))
        return
    tokens = len(runs[0].ids) * options.batch
    print(f"{options.file}: {tokens} tokens, {options.batch} a forward")
    print()
    print(table(HEADER, [layer_cells(one) for one in facts]))
    print()
    print(filled(LEGEND))


def activations(options: argparse.Namespace, hidden: int) -> npt.NDArray[np.float32]:
    """Return f32 [tokens, H]: random, or read from a file."""
    if options.input is None:
        rng = np.random.default_rng(options.seed)
        return rng.standard_normal((options.tokens, hidden), np.float32)
    try:
        x = np.load(Path(options.input), allow_pickle=False)
    except ValueError as error:
        # numpy says of any file that is no .npy one that it cannot be trusted.
        expected = "an .npy file"
        raise error_of(mo.FormatError, "trace", options.input, expected, "another") from error
    if not isinstance(x, np.ndarray):
        expected, got = "an .npy file", "an archive of arrays"
        raise error_of(mo.FormatError, "trace", options.input, expected, got)
    if x.dtype.kind not in "fiu":
        expected, got = f"f32 [tokens, {hidden}]", str(x.dtype)
        raise error_of(mo.DTypeError, "trace", options.input, expected, got)
    if x.ndim != 2 or x.shape[1] != hidden or not len(x):
        expected, got = f"[tokens, {hidden}]", str(list(x.shape))
        raise error_of(mo.ShapeError, "trace", options.input, expected, got)
    return np.ascontiguousarray(x[: options.tokens], np.float32)


def layer_facts(profile: mo.ExpertProfile, runs: list[LayerRun]) -> list[dict[str, Any]]:
    """Return the figures of each layer, by name."""
    effective = profile.effective_experts()
    return [
        {
            "layer": one.layer,
            "num_experts": one.pool.num_experts,
            "used": int((counts > 0).sum()),
            "effective": float(effective[i]),
            "most_used": float(counts.max() / max(counts.sum(), 1)),
            "best_hit_rate": float(profile.best_hit_rate(one.pool.budget)[i]),
            "hit_rate": one.hit_rate,
            "loaded_bytes": one.loaded,
        }
        for i, (counts, one) in enumerate(zip(profile.counts, runs, strict=True))
    ]


def layer_cells(one: dict[str, Any]) -> list[str]:
    """Return one row of the table."""
    return [
        str(one["layer"]),
        f"{one['used']} of {one['num_experts']}",
        f"{one['effective']:.1f}",
        f"{one['most_used']:.1%}",
        f"{one['best_hit_rate']:.1%}",
        f"{one['hit_rate']:.1%}",
        size(one["loaded_bytes"]),
    ]

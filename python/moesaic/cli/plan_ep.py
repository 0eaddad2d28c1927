"""``moesaic plan-ep FILE --ranks N``: which experts each rank keeps, and what that costs."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import numpy.typing as npt

import moesaic as mo
from moesaic._errors import error_of

from .models import Model, choose_layers, open_model
from .options import add_json, add_model, integer, integers, memory, network, output
from .table import size, table

HEADER = ("layer", "experts", "at most", "copies", "busiest rank", "bytes of a rank", "moved")
LEGEND = """\
at most: experts of a rank. copies: experts of all ranks together. busiest rank: its pairs over
those of the average one, by the profile. bytes of a rank: its experts as stored. moved: experts
that ranks must load to come from the previous plan."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--ranks", type=integer(1), required=True, help="processes")
    parser.add_argument(
        "--profile", metavar="NPZ", help="how often experts are used, by `trace --save`"
    )
    parser.add_argument(
        "--slots", type=integer(1), help="experts of a rank (default: as few as hold them all)"
    )
    parser.add_argument(
        "--memory-per-rank", type=memory, help="as many slots as this holds, over all layers"
    )
    parser.add_argument(
        "--nodes", type=integer(1), default=1, help="machines of the ranks (default: 1)"
    )
    parser.add_argument("--previous", metavar="NPZ", help="a plan by --save, to move little")
    parser.add_argument(
        "--layers", type=integers(0), metavar="N,N", help="these blocks (default: all)"
    )
    parser.add_argument(
        "--net",
        type=network,
        metavar="LATENCY,BYTES_PER_S",
        help="of a rank, such as 50e-6,1.1e9: adds the time of a layer with 32 tokens a rank",
    )
    parser.add_argument("--save", type=output, metavar="NPZ", help="write the plan")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..distributed import Placement, plan_experts

    with open_model(options.file) as model:
        layers = choose_layers(model, options.layers)
        configs = [model.config(layer) for layer in layers]
        first = configs[0]
        if any(c.num_experts != first.num_experts for c in configs):
            expected, got = "one number of experts", "several"
            raise error_of(mo.UnsupportedError, "plan-ep", "layers", expected, got)
        expert_bytes = bytes_of_experts(model, layers, first.num_experts)
    counts = counts_of(options.profile, layers, first.num_experts)
    slots = options.slots or slots_of(options.memory_per_rank, expert_bytes)
    previous = None if options.previous is None else Placement.load(options.previous)
    groups = first.router.num_groups if options.nodes > 1 else 1
    placement = plan_experts(
        counts, options.ranks, slots, nodes=options.nodes, groups=groups, previous=previous,
        layers=layers,
    )  # fmt: skip
    if options.save:
        placement.save(options.save)
    facts = [facts_of(placement, i, counts, expert_bytes[i], previous) for i in range(len(layers))]
    if options.net is not None:
        for one, config, nbytes in zip(facts, configs, expert_bytes, strict=True):
            row = counts[layers.index(one["layer"])]
            one["seconds"] = seconds_of(placement, one["layer"], config, nbytes, row, options.net)
    if options.json:
        print(json.dumps({"path": options.file, "ranks": options.ranks, "layers": facts}, indent=2))
        return 0
    header = (*HEADER, "time") if options.net is not None else HEADER
    print(table(header, [cells(one) for one in facts]))
    print()
    print(LEGEND)
    return 0


def bytes_of_experts(model: Model, layers: list[int], experts: int) -> list[int]:
    """Bytes of one expert of each layer, as stored."""
    sums = dict.fromkeys(layers, 0)
    for one in model.tensors():
        routed = "exps" in one.name or ".experts" in one.name or ".*." in one.name
        if one.layer in sums and routed and "shexp" not in one.name and "shared" not in one.name:
            sums[one.layer] += one.nbytes
    return [nbytes // experts for nbytes in sums.values()]


def counts_of(path: str | None, layers: list[int], experts: int) -> npt.NDArray[np.int64]:
    """Counts [L, E] of a profile; all 1 without one."""
    if path is None:
        return np.ones((len(layers), experts), np.int64)
    profile = mo.ExpertProfile.load(path)
    rows = dict(zip(map(int, profile.layer_indices), profile.counts, strict=True))
    missing = [layer for layer in layers if layer not in rows]
    if missing or profile.counts.shape[1] < experts:
        expected, got = f"counts of layers {layers}", f"those of {sorted(rows)}"
        raise error_of(mo.ShapeError, "plan-ep", "--profile", expected, got)
    return np.stack([rows[layer][:experts] for layer in layers])


def slots_of(per_rank: int | None, expert_bytes: list[int]) -> int | None:
    """Experts of each layer that fit into the memory of a rank."""
    if per_rank is None:
        return None
    return per_rank // max(sum(expert_bytes), 1)


def facts_of(
    placement: Any, i: int, counts: npt.NDArray[np.int64], expert_bytes: int, previous: Any
) -> dict[str, Any]:
    layer = placement.layers[i]
    loads = placement.loads(counts)[i]
    kept = [len(placement.experts(r, layer)) for r in range(placement.ranks)]
    moved = None
    if previous is not None:
        ranks = range(placement.ranks)
        now, then = ([set(p.experts(r, layer)) for r in ranks] for p in (placement, previous))
        moved = sum(len(a - b) for a, b in zip(now, then, strict=True))
    return {
        "layer": layer,
        "experts": placement.num_experts,
        "most": max(kept),
        "copies": sum(kept),
        "imbalance": float(loads.max() / max(loads.mean(), 1e-9)),
        "rank_bytes": max(kept) * expert_bytes,
        "moved": moved,
    }


def seconds_of(
    placement: Any,
    layer: int,
    config: mo.MoeConfig,
    expert_bytes: int,
    counts: npt.NDArray[np.int64],
    net: Any,
) -> float:
    """Seconds of a step of 32 tokens a rank, drawn by the profile."""
    from ..distributed import Shape, estimate

    rng = np.random.default_rng(0)
    logits = np.log(counts + 1e-3)
    noisy = logits + rng.gumbel(size=(4, 32 * placement.ranks, placement.num_experts))
    ids = np.argpartition(-noisy, config.top_k - 1, axis=-1)[..., : config.top_k]
    shape = Shape(config.hidden_size, expert_bytes, width=config.latent_size)
    return estimate(ids, placement, shape, net, layer=layer).seconds


def cells(one: dict[str, Any]) -> list[str]:
    row = [
        str(one["layer"]),
        str(one["experts"]),
        str(one["most"]),
        str(one["copies"]),
        f"{one['imbalance']:.2f}",
        size(one["rank_bytes"]),
        "" if one["moved"] is None else str(one["moved"]),
    ]
    return [*row, f"{one['seconds'] * 1e3:.2f} ms"] if "seconds" in one else row

"""Time of every kernel of a layer on a GPU, by torch's profiler, which sees those of every library.

    python tests/gpu_kernels.py [--shape NAME] [--tokens 1,8,64] [--json FILE] [--once]

``--once`` makes one call per number of tokens and measures nothing, for ncu. Layers take turns, so
that the L2 cache holds none of their weights. Needs torch and a GPU; TEST_DEVICE names another
device, of which "cpu" is one call each.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
from pathlib import Path

import torch

import moesaic as mo
from moesaic.bench.engines import load_stacks
from moesaic.bench.shapes import SHAPES
from moesaic.bench.weights import make_layers

LAYERS = 12
CALLS = 24


def measured(call) -> dict[str, tuple[float, float]]:
    """By kernel: launches a call, and the median of its microseconds."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(CALLS):
            call(i)
        torch.cuda.synchronize()
    times = collections.defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:70]].append(event.device_time)
    return {name: (len(us) / CALLS, statistics.median(us)) for name, us in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-30b-a3b-gptq", choices=SHAPES)
    parser.add_argument("--tokens", default="1,8,64,512,8192")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args()
    device = os.environ.get("TEST_DEVICE", "cuda:0")
    once = given.once or device == "cpu"
    shape = SHAPES[given.shape]
    layer = make_layers(shape, 1)[0]
    stacks = [load_stacks([layer], device)[0] for _ in range(1 if once else LAYERS)]
    results = {}
    for tokens in map(int, given.tokens.split(",")):
        x = torch.randn(tokens, shape.hidden, device=device).bfloat16()
        logits = torch.randn(tokens, shape.num_experts, device=device)
        out = torch.empty_like(x)
        workspace = mo.Workspace.for_stack(stacks[0], shape.top_k, tokens)

        def call(i, x=x, logits=logits, out=out, workspace=workspace):
            mo.moe_forward(
                x, logits, stacks[i % len(stacks)], top_k=shape.top_k, out=out, workspace=workspace
            )

        call(0)
        if once:
            continue
        kernels = results[tokens] = measured(call)
        print(f"{tokens} tokens: {sum(n * us for n, us in kernels.values()):.1f} us in kernels")
        for name, (n, us) in sorted(kernels.items(), key=lambda item: -item[1][0] * item[1][1]):
            print(f"   {n:4.1f} x {us:8.2f} us  {name}")
        if given.json:  # after every point, so that a run that is ended leaves what it has
            given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One layer over the ranks of torchrun, bit for bit as in one process. Does nothing without torch.

    torchrun --nproc-per-node 2 python/examples/06_expert_parallel.py

Without torchrun it is the one rank that there is.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import moesaic as mo
from moesaic import distributed

try:
    import torch.distributed as dist
except ImportError:
    print("torch is not installed: nothing to show")
    sys.exit(0)

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
rank, ranks = dist.get_rank(), dist.get_world_size()

E, H, top_k = 32, 256, 4
with tempfile.TemporaryDirectory() as folder:
    # Every rank writes the same file of its own; a model would lie where all of them can read it.
    path = Path(folder) / "model.gguf"
    mo.testing.write_moe_gguf(path, num_experts=E, top_k=top_k, hidden=H, intermediate=256)

    # What was used most has copies on two ranks, which share its tokens.
    counts = 1.0 / np.arange(1, E + 1)
    plan = distributed.plan_experts(counts, ranks, slots=-(-E // ranks) + (2 if ranks > 1 else 0))
    x = np.random.default_rng(rank).standard_normal((3 + rank, H), np.float32)  # own tokens
    with (
        distributed.MoeLayer.from_gguf(path, 0, plan) as layer,
        mo.MoeLayer.from_gguf(path, 0) as whole,
        mo.tuning(batch_invariant=True),
    ):
        y = layer(x)
        assert np.array_equal(y, whole(x))
        kept = len(layer.layer.stack.experts)
        call = layer.last_call
        assert call is not None
        print(
            f"rank {rank} of {ranks}: {kept} of {E} experts, {len(x)} tokens, "
            f"{call.protocol}, {call.sent} bytes sent, bits of one process"
        )
dist.destroy_process_group()

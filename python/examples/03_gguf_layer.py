"""A layer of a GGUF file: its facts, its own router, a reused workspace, where the time went.

Run with a file of yours, or without one to make a small file first.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

import moesaic as mo

with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    else:
        path = Path(folder) / "small.gguf"
        mo.testing.write_moe_gguf(
            path, num_experts=16, top_k=4, hidden=512, intermediate=256, layers=2,
            gate_type="Q4_K", up_type="Q4_K", down_type="Q6_K", seed=0,
        )  # fmt: skip

    with mo.GgufFile(path) as file:
        index = file.moe_layers[0]
        print(f"MoE layers {file.moe_layers}")
        with mo.MoeLayer.from_gguf(file, index) as layer:
            for role in layer.report.roles:
                print(f"{role.role}: {role.stored}, {role.decision}")

            x = np.random.default_rng(0).standard_normal((32, layer.config.hidden_size))
            x = x.astype(np.float32)
            workspace = mo.Workspace.for_layer(layer, max_tokens=32)
            out = np.empty_like(x)
            with mo.profile() as profile:
                layer(x, out=out, workspace=workspace)
            for zone, total in profile.zones.items():
                if total.calls:
                    print(f"{zone:10} {total.seconds * 1e6:8.0f} us")

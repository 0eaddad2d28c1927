"""Matrices of a file outside of its experts: the shared experts of a layer, by hand."""

import numpy as np

import moesaic as mo

mo.testing.write_moe_gguf(
    "shared.gguf", hidden=512, intermediate=256, shared_intermediate=1024, arch="qwen2moe"
)
x = np.random.default_rng(0).standard_normal((2, 5, 512), dtype=np.float32)

with mo.GgufFile("shared.gguf") as file:
    gate, up, down, weight = (
        mo.QuantMatrix.from_gguf(file, f"blk.0.ffn_{name}.weight")
        for name in ("gate_shexp", "up_shexp", "down_shexp", "gate_inp_shexp")
    )
    layer = mo.MoeLayer.from_gguf(file, 0)

hidden = np.concatenate([gate(x), up(x)], axis=-1).reshape(10, -1)  # [T, 2I], gate first
factor = 1 / (1 + np.exp(-weight(x)))  # the sigmoid of one number per token
by_hand = factor * down(mo.silu_mul(hidden)).reshape(x.shape)

y, routing = layer(x, return_routing=True)
# What the routed experts give goes away from the result of the whole layer.
shared = y - mo.moe_forward(x, None, layer.stack, routing=routing)
error = np.linalg.norm(by_hand - shared) / np.linalg.norm(shared)
print(gate, down, sep="\n")
print(mo.explain(down, 10))
print(f"by hand and in the layer: {error:.1e}")
assert error < 1e-5

out = x.copy()
down(mo.silu_mul(hidden).reshape(2, 5, -1), out=out, accumulate=True)  # a residual
print("with what was there before:", out.shape)

"""torch tensors in, torch tensors out, without copies; bf16 too. Does nothing without torch."""

import sys

import numpy as np

import moesaic as mo

try:
    import torch
except ImportError:
    print("torch is not installed: nothing to show")
    sys.exit(0)

E, H, I, T, top_k = 8, 128, 64, 4, 2
torch.manual_seed(0)
stack = mo.ExpertStack.from_dense_stacks(
    torch.randn(E, I, H) / 11, torch.randn(E, I, H) / 11, torch.randn(E, H, I) / 8
)
x = torch.randn(T, H)
logits = torch.randn(T, E)

y = mo.moe_forward(x, logits, stack, top_k=top_k)
assert isinstance(y, torch.Tensor)
y_bf16 = mo.moe_forward(x.bfloat16(), logits, stack, top_k=top_k)
assert y_bf16.dtype == torch.bfloat16

out = torch.empty_like(x)
assert mo.moe_forward(x, logits, stack, top_k=top_k, out=out) is out
np.testing.assert_array_equal(out.numpy(), y.numpy())
print(f"y {tuple(y.shape)} {y.dtype}, bf16 differs by {(y - y_bf16.float()).abs().max():.3f}")

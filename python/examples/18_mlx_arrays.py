"""MLX arrays in, MLX arrays out: experts in a layer of MLX. Does nothing without mlx.

On a Mac these are arrays in the memory that CPU and GPU share. The experts run on the CPU here, and
no gradients flow through them.
"""

import sys

try:
    import mlx.core as mx
    from mlx import nn
except ImportError:
    print("mlx is not installed: nothing to show")
    sys.exit(0)

import numpy as np

import moesaic as mo

WIDTH, INNER, EXPERTS, TOP_K = 256, 512, 8, 2


class MoE(nn.Module):
    """A router of MLX before experts of moesaic."""

    def __init__(self, stack: mo.ExpertStack) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self._stack = stack  # a name that MLX does not count among its parameters

    def __call__(self, x: mx.array) -> mx.array:
        # Reading an array evaluates it, so that the call stands outside of mx.compile.
        return mo.moe_forward(x, self.router(x), self._stack, top_k=TOP_K)


mx.random.seed(0)
gate, up = (mx.random.normal((EXPERTS, INNER, WIDTH)) / 16 for _ in range(2))
down = mx.random.normal((EXPERTS, WIDTH, INNER)) / 23
stack = mo.ExpertStack.from_dense_stacks(gate, up, down, quant={"up": "Q4_K", "down": "Q6_K"})
layer = MoE(stack)
x = mx.random.normal((2, 3, WIDTH))
y = layer(x)
assert isinstance(y, mx.array) and y.shape == x.shape
assert layer(x.astype(mx.bfloat16)).dtype == mx.bfloat16

# The layer in MLX alone: all experts of all tokens, over the decoded weights.
logits = layer.router(x)
ids = mx.argpartition(-logits, TOP_K - 1, axis=-1)[..., :TOP_K]
weights = mx.softmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1)
gate, up, down = (mx.array(stack.dequantize(role)) for role in ("gate", "up", "down"))
rows = x.reshape(-1, 1, 1, WIDTH)
inner = nn.silu(rows @ gate.swapaxes(1, 2)) * (rows @ up.swapaxes(1, 2))
every = (inner @ down.swapaxes(1, 2)).reshape(*x.shape[:-1], EXPERTS, WIDTH)
want = (mx.take_along_axis(every, ids[..., None], axis=-2) * weights[..., None]).sum(-2)
error = mx.linalg.norm(y - want) / mx.linalg.norm(want)
print(f"y {y.shape} {y.dtype}, {float(error):.1e} from MLX over decoded weights")
assert error < 2e-2 and np.isfinite(np.array(y)).all()

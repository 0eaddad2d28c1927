"""One layer in several types: bytes, error of weights and outputs, speed, and importances."""

import time

import numpy as np

import moesaic as mo

E, H, I, T, top_k = 4, 256, 256, 64, 2
rng = np.random.default_rng(0)
gate = rng.standard_normal((E, I, H), dtype=np.float32) / H**0.5
up = rng.standard_normal((E, I, H), dtype=np.float32) / H**0.5
down = rng.standard_normal((E, H, I), dtype=np.float32) / I**0.5
x = rng.standard_normal((T, H), dtype=np.float32)
exact = mo.ExpertStack.from_dense_stacks(gate, up, down)
routing = mo.route(rng.standard_normal((T, E), dtype=np.float32), top_k=top_k)


def best_us(stack: mo.ExpertStack, calls: int = 20) -> float:
    """The quickest of some calls: what disturbs one makes it slower, never quicker."""
    out = np.empty_like(x)
    workspace = mo.Workspace.for_stack(stack, top_k, max_tokens=T)
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        mo.moe_forward(x, None, stack, routing=routing, out=out, workspace=workspace)
        seconds.append(time.perf_counter() - start)
    return 1e6 * min(seconds)


print("type     encode s  MiB   weights  outputs  us per call")
for quant in ("BF16", "Q8_0", "E4M3", "Q6_K", "Q4_K", "Q4_0", "MXFP4", "IQ3_XXS", "IQ2_XS"):
    start = time.perf_counter()
    stack = mo.ExpertStack.from_dense_stacks(gate, up, down, quant=quant)
    seconds = time.perf_counter() - start
    found = mo.compare(exact, stack, x, routing=routing)
    assert found.outputs is not None
    weights = np.mean([errors.mean() for errors in found.weights.values()])
    print(
        f"{quant:8} {seconds:8.2f} {stack.nbytes / 2**20:4.1f}   {weights:.4f}   "
        f"{found.outputs.mean():.4f} {best_us(stack):8.0f}"
    )

# Columns of the input are of different sizes here: importances say which of them count.
uneven = x * rng.lognormal(0, 1, H).astype(np.float32)
squares = np.mean(uneven**2, axis=0)  # [H]; [E, H] would be one row for each expert
plain = mo.ExpertStack.from_dense_stacks(gate, up, down, quant={"gate": "Q2_K", "up": "Q2_K"})
told = mo.ExpertStack.from_dense_stacks(
    gate, up, down, quant={"gate": "Q2_K", "up": "Q2_K"}, weights={"gate": squares, "up": squares}
)
for name, stack in (("without", plain), ("with", told)):
    found = mo.compare(exact, stack, uneven, routing=routing)
    assert found.outputs is not None
    print(f"Q2_K {name} importances: error of the outputs {found.outputs.mean():.4f}")

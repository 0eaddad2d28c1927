"""Route eight tokens, run their experts, compare with the reference. Needs only numpy."""

import numpy as np

import moesaic as mo

E, H, I, T, top_k = 16, 256, 128, 8, 4
rng = np.random.default_rng(0)
gate = rng.standard_normal((E, I, H), dtype=np.float32) / 16
up = rng.standard_normal((E, I, H), dtype=np.float32) / 16
down = rng.standard_normal((E, H, I), dtype=np.float32) / 11
x = rng.standard_normal((T, H), dtype=np.float32)
logits = rng.standard_normal((T, E), dtype=np.float32)

stack = mo.ExpertStack.from_dense_stacks(gate, up, down)
y = mo.moe_forward(x, logits, stack, top_k=top_k, renormalize=True)

routing = mo.route(logits, top_k=top_k, renormalize=True)
reference = mo.moe_forward_cpu(x, routing, stack)
error = np.linalg.norm(y - reference) / np.linalg.norm(reference)
print(f"token 0 went to experts {routing.topk_ids[0].tolist()}")
print(f"y {y.shape}, relative error {error:.1e}")
assert error < 2e-2

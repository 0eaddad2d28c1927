"""The forward, step by step: plan, gather, gate and up, activation, down, combine."""

import numpy as np

import moesaic as mo

E, H, I, T, top_k = 8, 128, 64, 5, 2
rng = np.random.default_rng(0)
gate = rng.standard_normal((E, I, H), dtype=np.float32) / 11
up = rng.standard_normal((E, I, H), dtype=np.float32) / 11
down = rng.standard_normal((E, H, I), dtype=np.float32) / 8
x = rng.standard_normal((T, H), dtype=np.float32)
stack = mo.ExpertStack.from_dense_stacks(gate, up, down)
routing = mo.route(rng.standard_normal((T, E), dtype=np.float32), top_k=top_k)

# Few tokens: every pair by itself.
hidden = stack.gemv_gate_up_silu(x, routing.topk_ids)  # [T, top_k, I]
pairs = stack.gemv_down(hidden, routing.topk_ids)  # [T, top_k, H]
y_pairs = mo.weighted_sum(pairs, routing)  # [T, H]

# Many tokens: pairs sorted by expert, one product per expert. Rows come back in pair order.
plan = mo.BucketPlan.build(routing, E)
print("pairs per expert", np.diff(plan.expert_offsets).tolist())
gate_up = np.concatenate([stack.gemm_gate(x, plan), stack.gemm_up(x, plan)], axis=1)  # [P, 2I]
rows = stack.gemm_down(mo.silu_mul(gate_up), plan)  # [P, H]
y_plan = mo.weighted_sum(rows.reshape(T, top_k, H), routing)

# An aligned GEMM walks the plan padded to blocks.
block_size = mo.pick_block_size(plan)
aligned = mo.align_block_size(routing, E, block_size)
print(f"block size {block_size}: {plan.num_pairs} pairs in {aligned.num_post_pad} padded rows")

reference = mo.moe_forward_cpu(x, routing, stack)
for name, y in (("pairs", y_pairs), ("plan", y_plan)):
    error = np.linalg.norm(y - reference) / np.linalg.norm(reference)
    print(f"{name}: relative error {error:.1e}")
    assert error < 2e-2

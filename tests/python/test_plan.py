import numpy as np
import pytest

import moesaic as mo

EXAMPLE = np.array([[1, 2], [0, 3], [2, 3]], np.int32)


def routing_of(ids):
    ids = np.asarray(ids, np.int32)
    return mo.Routing(ids, np.ones(ids.shape, np.float32))


def random_ids(tokens, top_k, experts, skipped=0.0, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    ids[rng.random(ids.shape) < skipped] = -1
    return ids


def test_worked_example():
    plan = mo.BucketPlan.build(routing_of(EXAMPLE), 4)
    np.testing.assert_array_equal(plan.expert_offsets, [0, 1, 2, 4, 6])
    np.testing.assert_array_equal(plan.row_token, [1, 0, 0, 2, 1, 2])
    np.testing.assert_array_equal(plan.pair_row, [1, 2, 0, 4, 3, 5])
    for space, ids in (
        ("packed_rows", [0, 6, 6, 6, 1, 6, 6, 6, 2, 3, 6, 6, 4, 5, 6, 6]),
        ("token_pairs", [2, 6, 6, 6, 0, 6, 6, 6, 1, 4, 6, 6, 3, 5, 6, 6]),
    ):
        aligned = mo.align_block_size(routing_of(EXAMPLE), 4, 4, space)
        np.testing.assert_array_equal(aligned.sorted_ids, ids)
        np.testing.assert_array_equal(aligned.block_experts[:4], [0, 1, 2, 3])
        assert (aligned.num_post_pad, aligned.num_blocks, aligned.row_space) == (16, 4, space)


def test_documented_example_of_vllm():
    ids = [[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]
    aligned = mo.align_block_size(routing_of(ids), 5, 4)
    want = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    np.testing.assert_array_equal(aligned.sorted_ids, want)
    np.testing.assert_array_equal(aligned.block_experts[:4], [1, 2, 3, 4])


@pytest.mark.parametrize("experts", [1, 5, 128, 2048])
@pytest.mark.parametrize("skipped", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_plan_is_a_stable_sort(experts, skipped, tokens):
    top_k = min(experts, 4)
    ids = random_ids(tokens, top_k, experts, skipped) if tokens else np.zeros((0, top_k), np.int32)
    plan = mo.BucketPlan.build(routing_of(ids), experts)
    flat = ids.ravel()
    valid = np.flatnonzero(flat >= 0)
    pairs = valid[np.argsort(flat[valid], kind="stable")]
    assert (plan.num_pairs, plan.num_rows) == (flat.size, valid.size)
    np.testing.assert_array_equal(
        np.diff(plan.expert_offsets), np.bincount(flat[valid], minlength=experts)
    )
    np.testing.assert_array_equal(plan.row_pair[: pairs.size], pairs)
    np.testing.assert_array_equal(plan.row_token[: pairs.size], pairs // top_k)
    want = np.full(flat.size, -1)
    want[pairs] = np.arange(pairs.size)
    np.testing.assert_array_equal(plan.pair_row, want)


@pytest.mark.parametrize("block", [8, 16, 32, 48, 64])
@pytest.mark.parametrize("space", ["token_pairs", "packed_rows"])
def test_align_pads_each_expert(block, space):
    ids = random_ids(50, 4, 16, 0.1)
    aligned = mo.align_block_size(routing_of(ids), 16, block, space)
    plan = mo.BucketPlan.build(routing_of(ids), 16)
    blocks = aligned.sorted_ids.reshape(-1, block)
    assert (aligned.block_experts[aligned.num_blocks :] == -1).all()
    seen = []
    for rows, expert in zip(blocks, aligned.block_experts, strict=False):
        real = rows[rows < aligned.num_pairs]
        np.testing.assert_array_equal(rows[: real.size], real)  # padding trails
        np.testing.assert_array_equal(rows[real.size :], aligned.num_pairs)
        pairs = plan.row_pair[real] if space == "packed_rows" else real
        np.testing.assert_array_equal(ids.ravel()[pairs], expert)
        seen.extend(pairs)
    np.testing.assert_array_equal(seen, plan.row_pair[: plan.num_rows])


def test_rebuild():
    plan = mo.BucketPlan.build(routing_of(EXAMPLE), 4)
    before = plan.pair_row
    kept = before.copy()
    other = routing_of(random_ids(500, 2, 4))
    assert plan.rebuild(other) is plan
    np.testing.assert_array_equal(plan.pair_row, mo.BucketPlan.build(other, 4).pair_row)
    np.testing.assert_array_equal(before, kept)


def test_bad_ids():
    for ids in ([[4]], [[-2]]):
        with pytest.raises(mo.ShapeError):
            mo.BucketPlan.build(routing_of(ids), 4)
        with pytest.raises(mo.ShapeError):
            mo.align_block_size(routing_of(ids), 4, 8)
    with pytest.raises(mo.ConfigError):
        mo.align_block_size(routing_of(EXAMPLE), 4, 0)
    with pytest.raises(mo.ConfigError, match=r"row_space: expected token_pairs \| packed_rows"):
        mo.align_block_size(routing_of(EXAMPLE), 4, 8, "rows")


def plan_with(counts):
    ids = np.repeat(np.arange(len(counts)), counts)[:, None]
    return mo.BucketPlan.build(routing_of(ids), len(counts))


@pytest.mark.parametrize(
    ("counts", "block"),
    [([64] * 4, 64), ([50] * 4, 64), ([49] * 4, 16), ([96] * 4, 32), ([16] * 4, 16), ([1] * 8, 16)],
)
def test_pick_block_size(counts, block):
    assert mo.pick_block_size(plan_with(counts)) == block


def test_pick_block_size_rules():
    empty = mo.BucketPlan.build(routing_of(np.zeros((0, 2))), 4)
    assert mo.pick_block_size(empty) == mo.pick_block_size(None) == 16
    full = plan_with([64] * 4)
    assert mo.pick_block_size(full, device_route=True) == 16
    large = mo.Tuning(large_m_block_size=64)
    assert mo.pick_block_size(None, device_route=True, total_pairs=1024, tuning=large) == 64
    assert mo.pick_block_size(None, device_route=True, total_pairs=1023, tuning=large) == 16
    with mo.tuning(block_size=48):
        assert mo.pick_block_size(full) == 48
        assert mo.pick_block_size(None, device_route=True, total_pairs=9999) == 48

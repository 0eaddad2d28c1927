"""A layer over ranks that are threads here: bits, protocols, failures. Nothing of torch or MPI."""

import threading
import time

import numpy as np
import pytest
from fake_group import FakeGroup, Lost, Room, good, run_ranks
from files import write_small, write_small_checkpoint
from test_layer_calls import layer_with_everything
from values import normal
from zoo_models import LAYER, architectures, files_of, inputs_of

import moesaic as mo
from moesaic.distributed import MoeLayer, Placement, RankError, plan_experts
from moesaic.distributed.rounds import TINY, choose_protocol

E, K, H = 12, 3, 256


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "m.gguf"
    write_small(
        path, num_experts=E, top_k=K, hidden=H, intermediate=256, layers=2, shared_intermediate=256,
        arch="qwen2moe",
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def whole(path):
    return mo.MoeLayer.from_gguf(path, 1)


def tokens_of(rank, size, most):
    """Ranks have different numbers of tokens; the last of several has none."""
    return 0 if size > 1 and rank == size - 1 and most > 3 else most * (size - rank) // size


PLANS = {
    "even": lambda size: plan_experts(np.ones(E), size),
    "copies": lambda size: plan_experts(np.arange(E), size, -(-E // size) + 2),
    "one has all": lambda size: Placement.of_lists([range(E)] + [[]] * (size - 1), E),
    "all have all": lambda size: Placement.of_lists([range(E)] * size, E),
    "interleaved": lambda size: Placement.of_lists([range(r, E, size) for r in range(size)], E),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("combine", ["exact", "partial"])
@pytest.mark.parametrize("protocol", ["auto", "alltoall", "allgather"])
def test_results_are_those_of_one_process(path, whole, size, plan, combine, protocol):
    placement = PLANS[plan](size)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, placement, group, combine=combine, protocol=protocol)
        assert layer.layer.stack.experts == placement.experts(group.rank)
        worst, used = 0.0, []
        for tuning in ({"batch_invariant": True}, {"precision": "exact"}, {"precision": "fast"}):
            for most in (0, 1, 3, 200):
                x = normal(tokens_of(group.rank, size, most), H, seed=group.rank)
                with mo.tuning(**tuning, threads=1):
                    y, routing = layer(x, return_routing=True)
                    want, wanted = whole(x, return_routing=True)
                np.testing.assert_array_equal(routing.topk_ids, wanted.topk_ids)
                if combine == "exact":
                    np.testing.assert_array_equal(y, want)
                elif len(x):
                    worst = max(worst, np.linalg.norm(y - want) / np.linalg.norm(want))
                used.append(layer.last_call.protocol)
        assert worst < 1e-6
        return used

    results = good(run_ranks(size, rank))
    assert all(used == results[0] for used in results)
    if protocol != "auto":
        assert set(results[0]) == {protocol}
    elif size <= K:
        assert set(results[0]) == {"alltoall", "allgather"}


@pytest.mark.parametrize("pair", architectures(), ids="-".join)
def test_every_architecture(pair, tmp_path):
    for path in files_of(pair, tmp_path):
        with mo.MoeLayer.from_gguf(path, LAYER) as whole:
            plan = plan_experts(np.arange(whole.config.num_experts), 3, 4)

            def rank(group, path=path, plan=plan, whole=whole):
                exact = MoeLayer.from_gguf(path, LAYER, plan, group)
                partial = MoeLayer.from_gguf(path, LAYER, plan, group, combine="partial")
                for tokens in (5, 0, 2):
                    count = max(tokens - group.rank, 0)
                    x, others = inputs_of(whole, count, seed=group.rank)
                    with mo.tuning(batch_invariant=True, threads=1):
                        want = whole(x, **others)
                        np.testing.assert_array_equal(exact(x, **others), want)
                        y = partial(x, **others)
                    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)

            good(run_ranks(3, rank))


@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_parts_of_few_models(combine):
    """Identity experts take no way at all: they are added where the token is from."""
    whole = layer_with_everything()
    plan = plan_experts(np.arange(6), 2, 4)

    def rank(group):
        layer = MoeLayer(whole, plan, group, combine=combine)
        for tokens in (3, 40):
            x = mo.asarray(normal(tokens, 32, seed=group.rank), "bf16")
            with mo.tuning(batch_invariant=True, threads=1):
                y, want = np.asarray(layer(x)), np.asarray(whole(x))
            assert (y != want).mean() < (0 if combine == "exact" else 0.02) + 1e-9

    good(run_ranks(2, rank))


def test_checkpoints(tmp_path):
    folder = write_small_checkpoint(tmp_path)
    whole = mo.MoeLayer.from_safetensors(folder, 0)
    plan = plan_experts(np.ones(8), 3)

    def rank(group):
        layer = MoeLayer.from_safetensors(folder, 0, plan, group)
        assert layer.layer.stack.experts == plan.experts(group.rank)
        x = normal(9, 64, seed=group.rank)
        with mo.tuning(batch_invariant=True, threads=1):
            np.testing.assert_array_equal(layer(x), whole(x))

    good(run_ranks(3, rank))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_element_types_outputs_and_leading_dimensions(path, whole, dtype):
    plan = plan_experts(np.ones(E), 2)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group)
        x = mo.asarray(normal(2, 3, H, seed=group.rank), dtype)
        with mo.tuning(batch_invariant=True, threads=1):
            want = np.asarray(whole(x))
            y = layer(x)
            assert isinstance(y, mo.Array) and y.dtype == dtype and y.shape == (2, 3, H)
            np.testing.assert_array_equal(np.asarray(y), want)
            start = mo.asarray(normal(2, 3, H, seed=9), dtype)
            out, other = (mo.asarray(start, copy=True) for _ in range(2))
            assert layer(x, out=out, accumulate=True) is out
            whole(x, out=other, accumulate=True)
            np.testing.assert_array_equal(np.asarray(out), np.asarray(other))

    good(run_ranks(2, rank))


@pytest.mark.parametrize("protocol", ["alltoall", "allgather"])
@pytest.mark.parametrize("seed", range(8))
def test_rounds_under_any_schedule(path, whole, protocol, seed):
    plan = plan_experts(np.arange(E), 3, 6)
    counts = np.random.default_rng(seed).integers(0, 23, 3)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group, protocol=protocol, max_tokens=5)
        x = normal(int(counts[group.rank]), H, seed=seed)
        with mo.tuning(batch_invariant=True, threads=1):
            for _ in range(3):
                np.testing.assert_array_equal(layer(x), whole(x))
        return layer.last_call.rounds

    rounds = good(run_ranks(3, rank, seed=seed))
    assert rounds == [max(1, -(-int(counts.max()) // 5))] * 3


def test_all_tokens_to_one_rank_and_skipped_pairs(path, whole):
    plan = Placement.of_lists([range(4), range(4, 8), range(8, 12)], E)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group, protocol="alltoall")
        layer.layer.count_usage()
        ids = np.tile(np.array([[4, 5, -1]], np.int32), (30, 1))
        ids[7] = -1
        routing = mo.Routing(ids, np.full(ids.shape, 0.25, np.float32))
        x = normal(30, H, seed=group.rank)
        with mo.tuning(precision="exact", threads=1):
            np.testing.assert_array_equal(layer(x, routing=routing), whole(x, routing=routing))
        return layer.layer.usage.counts.sum()

    assert good(run_ranks(3, rank)) == [0, 3 * 29 * 2, 0]


def test_copies_share_the_tokens(path):
    plan = Placement.of_lists([range(E), range(E)], E)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group)
        layer.layer.count_usage()
        layer(normal(50, H, seed=group.rank))
        return int(layer.layer.usage.counts.sum())

    shares = good(run_ranks(2, rank))
    assert sum(shares) == 2 * 50 * K
    assert abs(shares[0] - shares[1]) <= K


def test_protocol_is_a_function_of_sizes():
    assert choose_protocol("auto", 2, 8, TINY) == "allgather"
    assert choose_protocol("auto", 2, 8, TINY + 1) == "alltoall"
    assert choose_protocol("auto", 9, 8, 1) == "alltoall"
    assert choose_protocol("allgather", 9, 8, 500) == "allgather"


def test_messages_of_a_small_call(path):
    """Two collectives where the tokens travel with the headers, three otherwise."""
    room = Room(2, 30.0, 0)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan_experts(np.ones(E), 2), group)
        for tokens in (1, 50, 0):
            layer(normal(tokens, H))

    good(run_ranks(2, rank, room=room))
    opening, *calls = room.kinds[0]
    assert opening == "allgather"
    assert calls == ["allgather", "exchange", "allgather", "exchange", "exchange", "allgather"]


def wrong_of(results, kind=RankError):
    assert all(isinstance(result, kind) for result in results), results
    return results


@pytest.mark.parametrize("what", ["dies", "hangs"])
def test_a_lost_rank_is_named_by_all_survivors(path, what):
    plan = plan_experts(np.ones(E), 3)
    timeout = 1.0
    room = Room(3, timeout, 0)
    stop = threading.Event()

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group)
        x = normal(20, H)
        layer(x)
        if group.rank == 1:
            if what == "hangs":
                stop.wait(20)
            return None
        out = np.full_like(x, 7.0)
        start = time.monotonic()
        with pytest.raises(RankError, match=r"layer 1, call 1: rank 1 on ") as caught:
            layer(x, out=out)
        assert time.monotonic() - start < timeout + 2
        assert (out == 7.0).all()
        error = caught.value
        assert (error.layer, error.call, error.ranks) == (1, 1, (1,))
        assert error.hosts[0] in str(error)
        assert isinstance(error, mo.DeviceError)
        with pytest.raises(RankError, match="earlier call"):
            layer(x)
        if group.rank == 0:
            stop.set()
        return None

    good(run_ranks(3, rank, room=room))


def test_a_rank_that_gives_up_says_why(path, monkeypatch):
    plan = plan_experts(np.ones(E), 2)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group)
        if group.rank == 1:

            def fail(*_):
                raise MemoryError("no room")

            layer._rounds._compute = fail
            with pytest.raises(MemoryError):
                layer(normal(9, H))
        else:
            with pytest.raises(RankError, match=r"rank 1 on .*MemoryError: no room"):
                layer(normal(9, H))
        with pytest.raises(RankError):
            layer(normal(9, H))

    good(run_ranks(2, rank, timeout=1.0))


def test_bad_arguments_of_one_rank_are_an_error_of_all_and_calls_go_on(path, whole):
    plan = plan_experts(np.ones(E), 2)

    def rank(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group)
        x = normal(4, H)
        ones = np.ones((4, 1), np.float32)
        outside = mo.Routing(np.full((4, 1), E, np.int32), ones)
        shorter = mo.Routing(np.zeros((3, 1), np.int32), ones[:3])
        bad = [
            {"x": x[:, :-1]},
            {"x": x.astype(np.float64)},
            {"x": x, "routing": outside},
            {"x": x, "routing": shorter},
            {"x": x, "out": np.zeros((4, 3), np.float32)},
            {"x": "no array"},
        ]  # fmt: skip
        for arguments in bad:
            if group.rank == 0:
                with pytest.raises((mo.Error, TypeError)) as caught:
                    layer(**arguments)
                assert not isinstance(caught.value, RankError)
            else:
                with pytest.raises(RankError, match="rank 0"):
                    layer(x)
        with mo.tuning(batch_invariant=True, threads=1):
            np.testing.assert_array_equal(layer(x), whole(x))

    good(run_ranks(2, rank))


def test_ranks_that_disagree_in_a_call(path):
    plan = plan_experts(np.ones(E), 2)

    def precision(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group)
        with mo.tuning(precision=["exact", "fast"][group.rank]):
            layer(normal(4, H))

    for error in wrong_of(run_ranks(2, precision), mo.ConfigError):
        assert "precision" in str(error) and "rank 1" in str(error)

    def element_type(group):
        layer = MoeLayer.from_gguf(path, 1, plan, group)
        layer(mo.asarray(normal(4, H), ["f32", "bf16"][group.rank]))

    for error in wrong_of(run_ranks(2, element_type), mo.ConfigError):
        assert "x.dtype" in str(error)


def open_with_isa(path, plan, group):
    with mo.tuning(cpu_isa=[None, "scalar"][group.rank]):
        MoeLayer.from_gguf(path, 0, plan, group)


def test_ranks_that_disagree_at_open(path, tmp_path):
    other = tmp_path / "other.gguf"
    write_small(other, num_experts=E, top_k=K, hidden=H, intermediate=512)
    plan = plan_experts(np.ones(E), 2)
    uneven = plan_experts(np.arange(E), 2)
    assert plan != uneven
    cases = {
        "source": lambda r: MoeLayer.from_gguf([path, other][r.rank], 0, plan, r),
        "plan": lambda r: MoeLayer.from_gguf(path, 0, [plan, uneven][r.rank], r),
        "precision": lambda r: MoeLayer.from_gguf(
            path, 0, plan, r, precision=["exact", "fast"][r.rank]
        ),
        "isa": lambda r: open_with_isa(path, plan, r),
        "settings": lambda r: MoeLayer.from_gguf(
            path, 0, plan, r, combine=["exact", "partial"][r.rank]
        ),
    }
    for name, open_layer in cases.items():
        for error in wrong_of(run_ranks(2, open_layer), mo.ConfigError):
            assert f"{name} of rank 1" in str(error)


def test_a_rank_that_cannot_open_is_named(path, tmp_path):
    plan = plan_experts(np.ones(E), 2)

    def rank(group):
        MoeLayer.from_gguf([path, tmp_path / "none.gguf"][group.rank], 0, plan, group)

    first, second = run_ranks(2, rank)
    assert isinstance(second, FileNotFoundError)
    assert isinstance(first, RankError)
    assert "opening: rank 1" in str(first) and "FileNotFoundError" in str(first)

    def wrong_plan(group):
        MoeLayer.from_gguf(path, 0, plan_experts(np.ones(E), 3), group)

    for error in wrong_of(run_ranks(2, wrong_plan), mo.ConfigError):
        assert "plan.ranks" in str(error)


def test_other_ways_to_make_one(path, whole):
    plan = plan_experts(np.ones(E), 2)

    def rank(group):
        part = mo.MoeLayer.from_gguf(path, 1, experts=plan.experts(group.rank))
        with MoeLayer(part, plan, group) as layer:
            assert f"rank {group.rank} of 2" in repr(layer)
            assert (layer.rank, layer.size) == (group.rank, 2)
            x = normal(3, H)
            with mo.tuning(batch_invariant=True, threads=1):
                np.testing.assert_array_equal(layer(x), whole(x))
        with pytest.raises(mo.ConfigError, match="gives to this rank"):
            MoeLayer(mo.MoeLayer.from_gguf(path, 1, experts=[0]), plan, group)

    good(run_ranks(2, rank))


def test_groups_of_nothing():
    with pytest.raises(mo.DTypeError, match="TorchGroup"):
        MoeLayer.from_gguf("none.gguf", 0, plan_experts([1], 1), object())
    assert issubclass(Lost, RuntimeError) and FakeGroup.exchange


def test_one_failure_ends_all_layers_of_a_group(path):
    plan = plan_experts(np.ones(E), 2)

    def rank(group):
        layers = [MoeLayer.from_gguf(path, block, plan, group) for block in (0, 1)]
        if group.rank == 1:
            return
        with pytest.raises(RankError, match="layer 0"):
            layers[0](normal(2, H))
        with pytest.raises(RankError, match="earlier call"):
            layers[1](normal(2, H))

    good(run_ranks(2, rank, timeout=0.5))

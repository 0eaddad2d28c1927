"""Stores, pools and layers on them, from Python."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from files import write_small
from values import normal, poisoned

import moesaic as mo


@pytest.fixture
def file(small):
    return mo.GgufFile(small.path)


@pytest.fixture
def store(file):
    return mo.MoeExpertStore.from_gguf(file)


def inputs(small, tokens, seed=0):
    return normal(tokens, small.hidden, seed=seed)


def make_pools(store, budget, **settings):
    return [mo.ExpertPool(layer.up.num_experts, budget, **settings) for layer in store.layers]


def test_worked_values():
    assert mo.target_from_counts([0, 2, 1, 0, 2], 3) == [1, 4, 2]
    pool = mo.ExpertPool(8, 4, mo.RefreshPolicy.every_decode_steps(3))
    assert [s for s in range(8) if pool.should_refresh(s)] == [0, 3, 6]
    assert pool.should_refresh(1, is_prefill_block=True)
    assert pool.should_refresh(1, mode=mo.MoeExecMode.Refresh)
    assert mo.MoEExecMode is mo.MoeExecMode
    assert not pool.should_refresh(1, mode="reuse")
    result = pool.refresh_from_indices(np.array([[5, 6], [5, 0]]))
    assert result and (result.promotions, result.demotions) == ([5, 6], [3, 2])
    assert result.loads == [(5, 3, 3), (6, 2, 2)]
    assert pool.slot_map.tolist() == [0, 1, -1, -1, -1, 3, 2, -1]
    assert pool.resident_mask.tolist() == [True, True, False, False, False, True, True, False]
    stats = pool.stats
    assert (stats.refreshes, stats.promotions, stats.demotions) == (1, 2, 2)
    assert mo.merged_resident_mask([pool, mo.ExpertPool(8, 1)]).sum() == 4
    assert not mo.ExpertPool.all_resident(4).should_refresh(0, True)


def test_bad_arguments(store, file):
    with pytest.raises(mo.ConfigError, match="ranking"):
        mo.ExpertPool(4, 2, ranking="best")
    with pytest.raises(mo.ConfigError, match="decay"):
        mo.ExpertPool(4, 2, decay=2.0)
    with pytest.raises(mo.ConfigError, match="mode"):
        mo.ExpertPool(4, 2).should_refresh(0, mode="now")
    with pytest.raises(mo.ShapeError, match="ids"):
        mo.ExpertPool(4, 2).observe([4])
    with pytest.raises(mo.ConfigError, match="on_miss"):
        mo.MoeLayer.from_store(store, 0, on_miss="wait")
    with pytest.raises(mo.ShapeError, match="experts: 0, 1"):
        mo.MoeLayer.from_store(store, 9)
    with pytest.raises(mo.ShapeError, match="8 experts"):
        mo.MoeLayer.from_store(store, 0, mo.ExpertPool(7, 2))
    with pytest.raises(mo.ConfigError, match="memory_limit"):
        mo.MoeExpertStore.from_gguf(file, memory_limit=1000)
    with pytest.raises(mo.ConfigError, match="profile"):
        store.profile()


@pytest.mark.parametrize("limit", [None, 1 << 28])
@pytest.mark.parametrize("on_miss", ["compute", "stage"])
@pytest.mark.parametrize("budget", [0, 3, 8])
def test_results_do_not_depend_on_who_is_resident(small, file, layer, limit, on_miss, budget):
    store = mo.MoeExpertStore.from_gguf(file, memory_limit=limit, staging=4 if limit else 0)
    pools = make_pools(store, budget)
    with mo.MoeLayer.from_store(store, 0, pools[0], on_miss) as offloaded:
        for tokens in (1, 5, 64):
            x = inputs(small, tokens, seed=tokens)
            want, routing = layer(x, return_routing=True)
            np.testing.assert_array_equal(offloaded(x), want)
            store.refresh_pools(pools, [routing.topk_ids, [0]], 0)
            store.apply(pools)
            np.testing.assert_array_equal(offloaded(x), want)
            for gemm in ("bucketed", "aligned"):
                with mo.tuning(gemm=gemm, row_space="packed_rows", precision="exact"):
                    np.testing.assert_array_equal(offloaded(x), layer(x))
    assert pools[0].stats.forwards == 12
    assert store.memory()["limit"] == limit
    assert (store.io_stats()["reads"] > 0) == (limit is not None)


def test_only_changes_are_moved(store):
    pools = make_pools(store, 4)
    expert = store.layers[0].expert_bytes
    assert store.apply(pools) == 8 * expert
    assert store.apply(pools) == 0
    results = store.refresh_pools(pools, [[6, 7, 6], [0]], 0)
    assert [r.bytes for r in results] == [2 * expert, 0]
    assert store.apply(pools) == 2 * expert
    np.testing.assert_array_equal(store.slot_map(0), pools[0].slot_map)
    with pytest.raises(mo.ShapeError, match="ids"):
        store.refresh_pools(pools, [[0]], 0)
    with pytest.raises(mo.ShapeError, match="pools"):
        store.apply(pools[:1])


def test_without_a_pool_everything_is_loaded(small, store, layer):
    with mo.MoeLayer.from_store(store, 0, on_miss="error") as whole:
        np.testing.assert_array_equal(store.slot_map(0), np.arange(8))
        np.testing.assert_array_equal(whole(inputs(small, 9)), layer(inputs(small, 9)))
        assert store.pools()[1] is None and store.pools()[0].stats.hit_rate == 1


def test_role_views(small, store):
    role = store.layers[1].down
    assert (role.num_experts, role.k, role.n) == (8, small.intermediate, small.hidden)
    raw = role.expert_slice(3)
    assert raw.dtype == np.uint8 and len(raw) == role.expert_stride
    decoded = mo.testing.dequantize(raw, role.quant, (small.hidden, small.intermediate))
    np.testing.assert_array_equal(decoded, small.weights[1].down[3])
    np.testing.assert_array_equal(role.as_slice()[3 * len(raw) : 4 * len(raw)], raw)
    with pytest.raises(mo.ShapeError):
        role.expert_slice(8)
    with pytest.raises(ValueError):
        raw[0] = 1


def test_store_of_arrays(dense):
    gate, up, down = (a.transpose(0, 2, 1) for a in dense)  # the grouped-matmul layout [E, k, n]
    store = mo.MoeExpertStore.from_arrays([(gate, up, down)], layer_indices=[5])
    weights = store.layers[0]
    assert weights.layer_index == 5
    np.testing.assert_array_equal(weights.gate.as_slice(), gate)
    np.testing.assert_array_equal(weights.down.expert_slice(2), down[2])
    assert weights.gate.expert_stride == 24 * 40
    stack = mo.ExpertStack.from_dense_stacks(*dense)
    config = mo.MoeConfig(24, 40, 5, 2)
    router, x = normal(5, 24), normal(6, 24, seed=1)
    whole = mo.MoeLayer(stack, config, router)
    part = mo.MoeLayer.from_store(
        store, 5, mo.ExpertPool(5, 2), "stage", config=config, router_weight=router
    )
    np.testing.assert_array_equal(part(x), whole(x))
    with pytest.raises(mo.UnsupportedError, match="router"):
        mo.MoeLayer.from_store(store, 5)
    with pytest.raises(mo.ShapeError, match="down"):
        mo.MoeExpertStore.from_arrays([(gate, up, gate)])
    with pytest.raises(mo.ShapeError, match="gate"):
        mo.MoeExpertStore.from_arrays([(down, up, down)])
    assert mo.MoeExpertStore.from_arrays([(None, up, down)]).layers[0].gate is None


def test_blocks_of_a_store_count_as_those_of_the_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "late.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in {
        "block_count": 4, "embedding_length": 32, "feed_forward_length": 32, "expert_count": 4,
        "expert_used_count": 2, "expert_feed_forward_length": 32,
    }.items():  # fmt: skip
        writer.add_uint32(f"qwen3moe.{key}", value)
    for block in (1, 3):  # 0 and 2 are dense
        writer.add_tensor(f"blk.{block}.ffn_gate_inp.weight", rng.random((4, 32), np.float32))
        for role in ("gate", "up", "down"):
            weights = rng.random((4, 32, 32), np.float32)
            writer.add_tensor(f"blk.{block}.ffn_{role}_exps.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = mo.GgufFile(path)
    store = mo.MoeExpertStore.from_gguf(file)
    x = normal(2, 32)
    for block in (1, 3):
        layer = mo.MoeLayer.from_store(store, block)
        assert layer.config.layer == block
        np.testing.assert_array_equal(layer(x), mo.MoeLayer.from_gguf(file, block)(x))
    with pytest.raises(mo.ShapeError, match=r"one with experts: 1, 3"):
        mo.MoeLayer.from_store(store, 0)


def test_a_miss_can_be_an_error(small, store):
    pools = make_pools(store, 4)
    with mo.MoeLayer.from_store(store, 0, pools[0], "error") as layer:
        store.apply(pools)
        out = poisoned(1, small.hidden)
        weights = np.ones((1, 2), np.float32)
        with pytest.raises(mo.DeviceError, match="expert 6"):
            layer(inputs(small, 1), routing=mo.Routing(np.array([[1, 6]]), weights), out=out)
        assert np.isnan(out).all()
        layer(inputs(small, 1), routing=mo.Routing(np.array([[1, 3]]), weights), out=out)
        assert np.isfinite(out).all()


def test_profile(small, store, tmp_path):
    pools = make_pools(store, 2, coactivation=True)
    for i, pool in enumerate(pools):
        with mo.MoeLayer.from_store(store, i, pool) as layer:
            ids = layer(inputs(small, 40), return_routing=True)[1].topk_ids
            layer(inputs(small, 1))
        assert pool.usage.tokens == 41
        np.testing.assert_array_equal(pool.usage.history[0], np.bincount(ids.ravel(), minlength=8))
        together = pool.usage.coactivation
        np.testing.assert_array_equal(np.diag(together), pool.usage.counts)
        np.testing.assert_array_equal(together, together.T)
    profile = store.profile()
    assert profile.counts.sum() == 2 * 41 * small.top_k
    profile.save(tmp_path / "p.npz")
    loaded = mo.ExpertProfile.load(tmp_path / "p.npz")
    np.testing.assert_array_equal(loaded.counts, profile.counts)
    np.testing.assert_array_equal(loaded.coactivation[1], profile.coactivation[1])
    np.testing.assert_array_equal(loaded.history[1], profile.history[1])
    fresh = make_pools(store, 3)
    loaded.warm(fresh)
    best = mo.target_from_counts(profile.counts[0].tolist(), 3)
    assert sorted(fresh[0].residents.tolist()) == sorted(best)
    assert 0 < profile.best_hit_rate(3)[0] <= 1 == profile.best_hit_rate(8)[0]
    assert 1 <= profile.effective_experts()[0] <= 8
    with pytest.raises(mo.ShapeError):
        loaded.warm(fresh[:1])
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(mo.FormatError):
        mo.ExpertProfile.load(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError):
        mo.ExpertProfile.load(tmp_path / "none.npz")


def test_a_plot_goes_where_it_is_asked_to(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    profile = mo.ExpertProfile.from_counts([[1, 2, 0, 5], [3, 0, 0, 1]], [4, 7])
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot and (matplotlib.get_backend(), pyplot.get_fignums())
    own = profile.plot()
    axes = own.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "7"]
    np.testing.assert_allclose(axes.images[0].get_array().sum(axis=0), [4, 4])

    figure = matplotlib.figure.Figure()
    left, right = figure.subplots(1, 2)
    assert profile.plot(ax=right) is figure
    assert right.images and not left.images
    part = matplotlib.figure.Figure().subfigures(1, 2)[0]
    assert profile.plot(tmp_path / "part.png", ax=part.subplots()) is part

    assert profile.plot(tmp_path / "own.pdf") is not own
    assert (tmp_path / "own.pdf").read_bytes()[:4] == b"%PDF"
    assert (tmp_path / "part.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(OSError, match="no/such"):
        profile.plot(tmp_path / "no" / "such" / "folder.png")
    # No window was opened, and nobody's choice of a backend was made or changed.
    if before is None:
        assert "matplotlib.pyplot" not in sys.modules
    else:
        assert (matplotlib.get_backend(), pyplot.get_fignums()) == before


def test_forwards_while_experts_move(small, store, layer):
    pools = make_pools(store, 3)
    batches = [inputs(small, 2, seed) for seed in range(4)]
    want = [layer(x) for x in batches]
    wrong = []
    done = threading.Event()

    def move():
        e = 0
        while not done.is_set():
            pools[0].refresh_from_indices([e % 8, (e + 3) % 8])
            store.apply(pools)
            e += 1

    def run(on_miss):
        with mo.MoeLayer.from_store(store, 0, pools[0], on_miss) as offloaded:
            for i in range(40):
                if not np.array_equal(offloaded(batches[i % 4]), want[i % 4]):
                    wrong.append(on_miss)

    threads = [threading.Thread(target=run, args=(m,)) for m in ("compute", "stage", "stage")]
    mover = threading.Thread(target=move)
    for thread in (mover, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    mover.join()
    assert wrong == []


RSS_CHECK = """
import re, sys
import numpy as np
import moesaic as mo

def rss():
    text = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", text)[1]) * 1024

file = mo.GgufFile(sys.argv[1])
x = np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32)
weights = np.full((1, 4), 0.25, np.float32)
limit = int(sys.argv[2])
store = mo.MoeExpertStore.from_gguf(file, memory_limit=limit, staging=4)
pool = mo.ExpertPool(64, 8)
layer = mo.MoeLayer.from_store(store, 0, pool, "stage")
layer(x, routing=mo.Routing(np.array([[0, 1, 2, 3]]), weights))
before = rss()
for first in range(0, 64, 4):
    layer(x, routing=mo.Routing(np.arange(first, first + 4)[None], weights))
memory = store.memory()
print(before, rss(), memory["slots"] + memory["staging"], store.io_stats()["bytes"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_larger_than_its_limit(tmp_path):
    small = write_small(
        tmp_path / "m.gguf", num_experts=64, top_k=4, hidden=512, intermediate=1024,
        gate_type="Q8_0", down_type="Q8_0",
    )  # fmt: skip
    size = small.path.stat().st_size
    limit = size // 3
    command = [sys.executable, "-c", RSS_CHECK, str(small.path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after, held, read = map(int, done.stdout.split())
    assert held <= limit
    assert read > 0.9 * size  # every expert passed through
    # The slots and buffers are touched little by little; the file itself never comes in.
    assert after - before <= limit


@pytest.mark.parametrize("ids", [[0.5], [[1], [1, 2]], ["a"], [2**70], [2**40], [None]])
def test_lists_that_are_no_ids(ids):
    pool = mo.ExpertPool(8, 4)
    with pytest.raises((mo.ShapeError, mo.DTypeError), match=r"ExpertPool\.observe: ids"):
        pool.observe(ids)
    pool.observe([])
    pool.observe((1, np.int32(2), np.uint8(3)))
    assert pool.usage.counts.sum() == 0  # observed by hand, not by a layer


ONE = np.array([[1, 2]])
NONE = np.zeros((0, 2), np.int64)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mo.ExpertProfile.from_counts("counts"),
        lambda: mo.ExpertProfile.from_counts([[0.5, 1.5]]),
        lambda: mo.ExpertProfile.from_counts([[1, 2], [3]]),
        lambda: mo.ExpertProfile.from_counts([[1, -2]]),
        lambda: mo.ExpertProfile.from_counts([1, 2]),
        lambda: mo.ExpertProfile.from_counts(ONE, [0, 1]),
        lambda: mo.ExpertProfile.of_store("store"),
        lambda: mo.ExpertProfile.from_counts(ONE).warm(3),
        lambda: mo.ExpertProfile.from_counts(ONE).warm(["pool"]),
        lambda: mo.ExpertProfile(ONE, ONE, ONE[0], (NONE,), ONE[0], ()),
        lambda: mo.ExpertProfile([0], ONE, [1], None, [1], ()),
        lambda: mo.ExpertProfile([0], ONE, [1], (), [1], ()),
        lambda: mo.ExpertProfile([0], ONE, [1], (np.zeros((1, 9), int),), [1], ()),
        lambda: mo.ExpertProfile([0], ONE, [1], (NONE,), [1], (NONE,)),
        lambda: mo.ExpertProfile([0], ONE, [1], (NONE,), [1], (3,)),
    ],
)
def test_profiles_of_what_is_no_profile(call):
    with pytest.raises((mo.ShapeError, mo.DTypeError), match="ExpertProfile"):
        call()


@pytest.mark.parametrize("path", [1, True, None])
def test_a_profile_is_no_file_descriptor(path):
    profile = mo.ExpertProfile.from_counts(ONE)
    for call in (profile.save, mo.ExpertProfile.load):
        with pytest.raises(TypeError):
            call(path)


def test_arrays_that_are_no_profile(tmp_path):
    np.save(tmp_path / "one.npy", ONE)
    np.savez(tmp_path / "other.npz", counts=ONE)
    for name in ("one.npy", "other.npz"):
        with pytest.raises(mo.FormatError, match=name):
            mo.ExpertProfile.load(tmp_path / name)


def test_a_profile_prints_as_a_table():
    profile = mo.ExpertProfile.from_counts(np.array([[1, 2, 3], [9, 0, 0]]), [4, 7])
    assert repr(profile) == "moesaic.ExpertProfile(layers=2, experts=3, pairs=15)"
    header, line, first, second = str(profile).splitlines()
    assert set(line) == {"-", " "}
    assert header.split()[:3] == ["layer", "tokens", "pairs"]
    assert first.split() == ["4", "0", "6", "2.7", "2"]
    assert second.split() == ["7", "0", "9", "1.0", "0"]

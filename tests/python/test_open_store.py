"""Models that do not fit in memory, by open_store."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from files import write_small
from values import normal

import moesaic as mo

LIMIT = 16 << 20
#: Room for a few of eight experts a layer.
TIGHT = {"memory": 3 << 20, "max_tokens": 4}


@pytest.fixture
def store(small):
    return mo.open_store(small.path, LIMIT)


def test_layers_are_those_of_the_file(small, store):
    file = mo.GgufFile(small.path)
    assert store.blocks == file.moe_layers
    for block in store.blocks:
        with store.layer(block) as layer, mo.MoeLayer.from_gguf(file, block) as whole:
            for tokens in (0, 1, 5, 64):
                x = normal(tokens, small.hidden, seed=tokens)
                np.testing.assert_array_equal(layer(x), whole(x))
    memory = store.memory()
    assert memory["slots"] + memory["staging"] + memory["other"] <= memory["limit"] == LIMIT
    assert store.reading == "O_DIRECT" or store.reading.startswith("page cache (")


def test_a_size_may_be_text(small):
    for memory in ("16MiB", "16M", str(LIMIT), np.int64(LIMIT)):
        assert mo.open_store(small.path, memory).memory()["limit"] == LIMIT


@pytest.mark.parametrize("memory", ["", "12 apples", 0, -1, "0", 2**70])
def test_what_is_no_size(small, memory):
    with pytest.raises(mo.ConfigError, match=r"open_store: memory.*12GiB"):
        mo.open_store(small.path, memory)


@pytest.mark.parametrize("memory", [None, 1.5, True, b"16MiB"])
def test_what_is_no_number_either(small, memory):
    with pytest.raises(mo.DTypeError, match="open_store: memory"):
        mo.open_store(small.path, memory)


def test_too_little_memory_says_how_much_is_needed(small):
    with pytest.raises(mo.ConfigError, match=r"routers, shared experts and the workspace") as error:
        mo.open_store(small.path, 1000)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    store = mo.open_store(small.path, least)
    assert [pool.budget for pool in store.pools] == [1, 1]
    with store.layer(0) as layer:
        layer(normal(3, small.hidden))
    memory = store.memory()
    assert memory["slots"] + memory["staging"] + memory["other"] <= least
    with pytest.raises(mo.ConfigError, match=rf"open_store: memory.*at least {least}"):
        mo.open_store(small.path, least - 1)
    with pytest.raises(mo.ConfigError, match="max_tokens"):
        mo.open_store(small.path, LIMIT, max_tokens=1 << 20)


# Any memory that is accepted is enough: nothing fails later under its own limit.
def test_every_accepted_limit_holds(small):
    opened = 0
    for limit in range(1 << 19, 4 << 20, 1 << 17):
        try:
            store = mo.open_store(small.path, limit, max_tokens=8)
        except mo.ConfigError:
            assert not opened, "more memory was refused than less"
            continue
        opened += 1
        for block in store.blocks:
            with store.layer(block) as layer:
                for seed in range(4):
                    layer(normal(8, small.hidden, seed=seed))
        memory = store.memory()
        assert memory["slots"] + memory["staging"] + memory["other"] <= limit
    assert opened > 4


# Without a call of refresh or apply, experts that are asked for again and again stay.
def test_hits_rise_by_themselves(small):
    store = mo.open_store(small.path, **TIGHT)
    assert 2 <= store.pools[0].budget < 8
    weights = np.full((1, 2), 0.5, np.float32)
    with store.layer(0) as layer:
        for step in range(30):
            ids = [[6, 7]] if step % 5 else [[step % 6, 7]]
            layer(normal(1, small.hidden), routing=mo.Routing(np.array(ids), weights))
    assert store.hit_rate() > 0.8
    assert {6, 7} <= set(store.pools[0].residents.tolist())


def test_a_profile_brings_what_was_used(small):
    store = mo.open_store(small.path, **TIGHT)
    weights = np.full((1, 2), 0.5, np.float32)
    for block in store.blocks:
        with store.layer(block) as layer:
            layer(normal(1, small.hidden), routing=mo.Routing(np.array([[5, 7]]), weights))
    again = mo.open_store(small.path, **TIGHT, profile=store.profile())
    assert again.experts.slot_map(0)[5] >= 0 and again.experts.slot_map(1)[7] >= 0
    with again.layer(1) as layer:
        layer(normal(1, small.hidden), routing=mo.Routing(np.array([[5, 7]]), weights))
    assert again.hit_rate() == 1
    with pytest.raises(mo.ShapeError):
        mo.open_store(small.path, LIMIT, profile=mo.ExpertProfile.from_counts([[1, 2]]))


def test_what_is_prefetched_is_there(small):
    store = mo.open_store(small.path, LIMIT, read_ahead=0)
    weights = np.full((1, 2), 0.5, np.float32)
    store.prefetch(1, [3, 4])
    with store.layer(1) as layer:
        layer(normal(1, small.hidden), routing=mo.Routing(np.array([[3, 4]]), weights))
    stats = store.io_stats()
    assert stats["ahead"] == stats["ahead_used"] == 2
    with pytest.raises(mo.ShapeError, match="ids"):
        store.prefetch(1, [8])
    with pytest.raises(mo.ShapeError, match="block"):
        store.prefetch(7, [0])


def test_direct_io_is_a_choice(small):
    assert mo.open_store(small.path, LIMIT, direct_io=False).reading == "page cache (asked for)"


def test_pickles_as_the_way_to_open_it(small, store):
    again = pickle.loads(pickle.dumps(store))
    assert again.memory()["limit"] == LIMIT
    assert [p.budget for p in again.pools] == [p.budget for p in store.pools]
    with again.layer(0) as one, store.layer(0) as other:
        x = normal(2, small.hidden)
        np.testing.assert_array_equal(one(x), other(x))


def test_a_miss_may_be_an_error(small):
    store = mo.open_store(small.path, LIMIT, on_miss="error")
    with store.layer(0) as layer, pytest.raises(mo.DeviceError, match="without a slot"):
        layer(normal(1, small.hidden))
    with pytest.raises(mo.ConfigError, match="on_miss"):
        mo.open_store(small.path, LIMIT, on_miss="wait")


def test_blocks_without_experts(store):
    with pytest.raises(mo.ShapeError, match="experts: 0, 1"):
        store.layer(9)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        mo.open_store(tmp_path / "none.gguf", LIMIT)
    with pytest.raises(FileNotFoundError):
        mo.open_store(tmp_path, LIMIT)  # a folder without files of tensors


def test_repr(store):
    assert "layers=2" in repr(store) and "of 8 experts" in repr(store)


RSS_CHECK = """
import re, sys
import numpy as np
import moesaic as mo

def rss():
    text = open("/proc/self/status").read()
    return int(re.search(r"VmRSS:\\s+(\\d+)", text)[1]) * 1024

warm = mo.open_store(sys.argv[2], "64MiB")
with warm.layer(0) as layer:
    layer(np.ones((1, layer.config.hidden_size), np.float32))
del warm, layer
limit = int(sys.argv[3])
before = rss()
store = mo.open_store(sys.argv[1], limit, max_tokens=4)
with store.layer(0) as layer:
    for first in range(0, 64, 4):
        x = np.ones((1, 512), np.float32)
        weights = np.full((1, 4), 0.25, np.float32)
        layer(x, routing=mo.Routing(np.arange(first, first + 4)[None], weights))
held = store.memory()
print(before, rss(), store.io_stats()["bytes"], held["slots"] + held["staging"] + held["other"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_stays_below_its_limit(small, tmp_path):
    large = write_small(
        tmp_path / "m.gguf", num_experts=64, top_k=4, hidden=512, intermediate=1024,
        gate_type="Q8_0", down_type="Q8_0",
    )  # fmt: skip
    size = large.path.stat().st_size
    command = [sys.executable, "-c", RSS_CHECK, str(large.path), str(small.path), str(size // 3)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after, read, held = map(int, done.stdout.split())
    assert held <= size // 3
    assert read > 0.4 * size  # of one layer, every expert was read
    assert after - before <= size // 3

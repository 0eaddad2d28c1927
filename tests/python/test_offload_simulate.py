"""Pools on traces: what they promise, and that the simulation is what layers do."""

import dataclasses
import itertools
import json
import os
import statistics
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from files import write_small_checkpoint
from values import expert_weights

import moesaic as mo
from moesaic import simulate as sim
from moesaic.cli import main, simulate_file
from moesaic.cli import trace as trace_command
from moesaic.safetensors import CheckpointExperts
from moesaic.simulate import measure, places, probe, stored

EXPERTS, TOP_K, STEPS = 64, 6, 240


def make(kind, seed, **changes):
    sizes = {"steps": STEPS, "num_experts": EXPERTS, "top_k": TOP_K, "seed": seed, **changes}
    return kind(**sizes)


@pytest.mark.parametrize("kind", [sim.zipf, sim.drifting])
def test_traces(kind):
    trace = make(kind, 3, layers=2, tokens=3, steps=20)
    assert (trace.steps, trace.layers, trace.tokens) == (20, 2, 3)
    assert trace.ids.min() >= 0 and trace.ids.max() < EXPERTS
    assert all(len(set(row)) == TOP_K for row in trace.ids.reshape(-1, TOP_K))
    np.testing.assert_array_equal(trace.ids, make(kind, 3, layers=2, tokens=3, steps=20).ids)
    assert trace.counts().sum() == 20 * 2 * 3 * TOP_K
    first, rest = trace.split(0.25)
    assert (first.steps, rest.steps) == (5, 15)


def test_trace_files(tmp_path):
    trace = make(sim.zipf, 0, steps=3)
    trace.save(tmp_path / "t.npz")
    np.testing.assert_array_equal(sim.Trace.load(tmp_path / "t.npz").ids, trace.ids)
    sim.Trace(trace.ids, 4).save(tmp_path / "bad.npz")
    with pytest.raises(mo.FormatError, match="4 experts"):
        sim.Trace.load(tmp_path / "bad.npz")
    (tmp_path / "no.npz").write_bytes(b"no")
    with pytest.raises(mo.FormatError):
        sim.Trace.load(tmp_path / "no.npz")


# Seeded: these are medians of 20 traces each, not of luck.
@pytest.mark.parametrize("share", [8, 4, 2])
@pytest.mark.parametrize("kind", [sim.zipf, sim.drifting])
def test_the_pool_moves_no_more_than_lru_and_a_static_set(kind, share):
    moved = {"pool": [], "lru": [], "static": []}
    for seed in range(20):
        warm, trace = make(kind, seed).split(0.1)
        for name, loads in moved.items():
            outcome = sim.simulate(trace, sim.POLICIES[name], EXPERTS // share, warm=warm)
            loads.append(outcome.loads)
    medians = {name: statistics.median(loads) for name, loads in moved.items()}
    assert medians["pool"] <= min(medians["lru"], medians["static"]), medians


@pytest.mark.parametrize("policy", sorted(sim.POLICIES))
@pytest.mark.parametrize("on_miss", ["stage", "compute"])
def test_bounds_of_any_policy(policy, on_miss):
    trace = make(sim.drifting, 1, steps=60, tokens=2)
    last = -1
    for budget in (0, 1, EXPERTS // 2, EXPERTS):
        outcome = sim.simulate(trace, sim.POLICIES[policy], budget, on_miss=on_miss)
        again = sim.simulate(trace, sim.POLICIES[policy], budget, on_miss=on_miss)
        assert outcome == again
        assert outcome.pairs == 60 * 2 * TOP_K
        assert outcome.hit_pairs >= last
        last = outcome.hit_pairs
        if budget == 0:
            assert outcome.hits == 0
        if budget == EXPERTS:
            assert outcome.hit_rate == 1 and outcome.loads == 0
        elif on_miss == "stage":
            assert outcome.loads >= outcome.misses


# The published rule on a trace small enough to follow by hand: every second step the two experts
# with the most hits of that step become resident.
def test_tide_decisions_by_hand():
    ids = np.array([[4, 4, 5], [1, 2, 3], [6, 5, 6], [4, 4, 4], [7, 0, 7]], np.int32)
    pool = mo.ExpertPool(8, 2, mo.RefreshPolicy.every_steps(2))
    residents, swaps = [], []
    for step, row in enumerate(ids):
        if pool.should_refresh(step):
            result = pool.refresh_from_indices(row)
            swaps.append((result.target, result.promotions, result.demotions))
        residents.append(pool.residents.tolist())
    assert residents == [[4, 5], [4, 5], [5, 6], [5, 6], [0, 7]]
    # The higher id of two cold residents goes first.
    assert swaps == [([4, 5], [4, 5], [1, 0]), ([6, 5], [6], [4]), ([7, 0], [7, 0], [6, 5])]


def test_costs():
    outcome = sim.Outcome(
        steps=10, layers=2, tokens=3, on_miss="stage", hits=6, misses=4, loads=5,
        placed=3, admitted=1, hit_pairs=6, pairs=10,
    )  # fmt: skip
    costs = sim.Costs(expert_bytes=100.0, fast=1000.0, slow=100.0, move=50.0, fixed=0.01)
    assert sim.tokens_per_second(outcome, costs) == pytest.approx(30 / (0.2 + 0.7 + 3.0 + 6.0))
    computed = sim.Outcome(
        **{**vars(outcome), "on_miss": "compute", "loads": 0, "placed": 0, "admitted": 0}
    )
    assert sim.tokens_per_second(computed, costs) == pytest.approx(30 / (0.2 + 0.6 + 4.0))


def test_costs_of_a_disk():
    slow = sim.Disk(bandwidth=100.0, latency=0.5, amplification=1.1)
    costs = sim.DiskCosts(
        expert_bytes=10.0, disk=slow, fast=100.0, slow=50.0, move=25.0, fixed=0.25
    )
    assert costs.seconds(5, 0, 0) == pytest.approx(0.25 + 0.5)
    # Two misses: the disk takes 0.5 + 0.22, the cold ones 0.2 as read and 0.4 + 0.1 in a slot;
    # half of that is the tail.
    assert costs.seconds(0, 2, 1) == pytest.approx(0.25 + 0.35 + max(0.72, 0.35))
    # With residents for 0.6 seconds the disk is not what takes time.
    assert costs.seconds(6, 2, 1) == pytest.approx(0.25 + 0.35 + max(0.72, 0.6 + 0.35))
    ahead = sim.DiskCosts(**{**vars(costs), "predicted": 0.5})
    assert ahead.seconds(0, 2, 1) == pytest.approx(0.25 + 0.35 + 0.72 - 0.36)
    assert ahead.seconds(5, 0, 0) == costs.seconds(5, 0, 0)


def test_a_disk_in_the_simulation():
    trace = make(sim.zipf, 0, layers=2, steps=100)
    costs = sim.DiskCosts(1e6, sim.Disk(1e9), fast=1e10, slow=1e10, move=1e9, fixed=1e-5)
    last = None
    for budget in (0, 8, 32, EXPERTS):
        outcome = sim.simulate_disk(trace, [budget] * 2, costs, warm=20)
        assert outcome == sim.simulate_disk(trace, [budget] * 2, costs, warm=20)
        assert outcome.tokens_per_second <= outcome.floor
        if last is not None:
            assert outcome.hit_rate > last.hit_rate
            assert outcome.missed_bytes < last.missed_bytes
            assert outcome.tokens_per_second > last.tokens_per_second
        last = outcome
    slower = sim.DiskCosts(**{**vars(costs), "disk": sim.Disk(1e8)})
    assert (
        sim.simulate_disk(trace, [8] * 2, slower).tokens_per_second
        < sim.simulate_disk(trace, [8] * 2, costs).tokens_per_second
    )
    with pytest.raises(mo.ShapeError, match="2, one a layer"):
        sim.simulate_disk(trace, [8], costs)


def test_a_miss_may_be_smaller_than_what_kernels_read():
    """Bytes come from the file, and are decoded."""
    trace = make(sim.zipf, 0, steps=40)
    costs = sim.DiskCosts(1e6, sim.Disk(1e9), fast=1e12, slow=1e12, move=1e12)
    half = dataclasses.replace(costs, stored_bytes=0.5e6)
    whole, decoded = (sim.simulate_disk(trace, [8], one) for one in (costs, half))
    assert decoded.hit_rate == whole.hit_rate
    assert decoded.missed_bytes == pytest.approx(whole.missed_bytes / 2)
    assert decoded.floor == pytest.approx(2 * whole.floor)
    assert whole.tokens_per_second < decoded.tokens_per_second <= decoded.floor


class TestPlaces:
    def test_a_file(self, small):
        file = mo.GgufFile(small.path)
        found = places.places_of(file)
        assert found.paths == file.shard_paths and len(found.layers) == 2
        assert found.expert_bytes == mo.MoeExpertStore.from_gguf(file).layers[0].expert_bytes
        data = small.path.read_bytes()
        down = file.tensors["blk.1.ffn_down_exps.weight"]
        want = np.array(down.data).reshape(8, -1)[5].tobytes()
        pieces = [data[at : at + size] for _, at, size in found.layers[1][5]]
        assert len(pieces) == 3 and want in pieces

    def test_a_tensor_for_each_expert(self, tmp_path):
        """As files of the first Mixtral have it."""
        names = [
            f"blk.0.ffn_{role}.{e}.weight" for e in range(2) for role in ("gate", "up", "down")
        ]
        tensors = {
            name: SimpleNamespace(shard=0, offset=100 * i, nbytes=10 * i, shape=(1, 1))
            for i, name in enumerate([*names, "blk.0.ffn_gate_inp.weight"], 1)
        }
        file = mock.Mock(spec=mo.GgufFile, tensors=tensors, moe_layers=[0], shard_paths=["a"])
        (layer,) = places.places_of(file).layers
        assert layer[1].tolist() == [[0, 400, 40], [0, 500, 50], [0, 600, 60]]

    def test_a_checkpoint(self, tmp_path):
        source = CheckpointExperts(write_small_checkpoint(tmp_path))
        found = places.places_of(source)
        assert found.expert_bytes == 4 * 3 * 64 * 32
        data = (tmp_path / "model.safetensors").read_bytes()
        want = expert_weights(8, 64, 32)[2][6].tobytes()
        assert want in [data[at : at + size] for _, at, size in found.layers[0][6]]

    def test_what_has_no_experts(self):
        file = mock.Mock(spec=mo.GgufFile, tensors={}, moe_layers=[], shard_paths=["a.gguf"])
        with pytest.raises(mo.FormatError, match=r"a\.gguf: expected layers with experts"):
            places.places_of(file)


class TestProbe:
    def test_it_reads_what_it_is_told(self, small, monkeypatch):
        """Whole blocks, so long as there is something to read."""
        read = []
        monkeypatch.setattr(probe, "_read_all", lambda files, pieces: read.append(pieces) or 0.5)
        file = mo.GgufFile(small.path)
        try:
            found = probe.measure_disk(file, [(1, 5), (0, 2)])
        except mo.UnsupportedError as error:
            pytest.skip(str(error))
        asked = sum(size for _, _, size in read[0])
        size = places.places_of(file).expert_bytes
        assert found.bandwidth == asked / 0.5
        assert found.amplification == asked / (2 * size) >= 1
        assert all(at % 4096 == size % 4096 == 0 for _, at, size in read[0])
        probe.measure_disk(file, itertools.repeat((0, 1)), megabytes=5)
        assert 5e6 <= sum(size for _, _, size in read[1]) < 1.1 * (5e6 + size)

    def test_its_buffers_are_read_into(self, tmp_path):
        """Each on its own, aligned as reads past the page cache need it."""
        rooms = probe._buffers(3)
        assert [len(room) for room in rooms] == [1 << 20] * 3
        assert rooms[0].ctypes.data % (2 << 20) == 0
        content = np.random.default_rng(0).bytes(3 << 20)
        (tmp_path / "x").write_bytes(content)
        with (tmp_path / "x").open("rb") as file:
            for i, room in enumerate(rooms):
                assert os.preadv(file.fileno(), [room.data], i << 20) == 1 << 20
        assert b"".join(room.tobytes() for room in rooms) == content
        with pytest.raises(OSError):
            probe._read_all([-1], [(0, 0, 4096)])

    def test_what_a_store_misses(self, small):
        store = mo.open_store(small.path, 3 << 20, max_tokens=4)
        assert probe.missed_experts(store) is None
        trace = make(sim.zipf, 3, layers=2, steps=40, num_experts=8, top_k=3)
        stored.measure_store(store, trace, 0)
        experts = probe.missed_experts(store, 7)
        drawn = list(itertools.islice(experts, 3000))
        assert drawn == list(itertools.islice(probe.missed_experts(store, 7), 3000))
        counts = np.zeros((2, 8), int)
        np.add.at(counts, tuple(np.array(drawn).T), 1)
        uses = np.stack([pool.usage.counts for pool in store.pools])
        resident = np.stack([pool.resident_mask for pool in store.pools])
        assert not counts[resident].any() and resident.any()
        want = np.where(resident, 0, uses) / uses[~resident].sum()
        np.testing.assert_allclose(counts / 3000, want, atol=0.04)


def test_latency_is_what_calls_take_beside_the_model(small, monkeypatch):
    """Calls of 20 ms that miss one expert of three: its bytes take 5, its kernels 2, the rest 1."""
    file = mo.GgufFile(small.path)
    size = places.places_of(file).expert_bytes
    costs = sim.DiskCosts(
        size, sim.Disk(size / 0.005, latency=7.0), fast=1.0, slow=size / 0.002, move=1.0,
        fixed=0.001, predicted=0.5,
    )  # fmt: skip
    ticks, stores = itertools.count(), []

    def kept(*arguments, **options):
        stores.append(disk_store(*arguments, **options))
        return stores[-1]

    disk_store = stored.disk_store
    monkeypatch.setattr(stored, "disk_store", kept)
    clock = SimpleNamespace(perf_counter=lambda: 0.02 * next(ticks))
    monkeypatch.setattr(stored, "time", clock)
    experts = [(layer, e) for e in range(8) for layer in range(2)]
    found = stored.measure_latency(file, costs, experts, calls=10)
    assert found.disk.latency == pytest.approx(0.012)
    assert dataclasses.replace(found, disk=costs.disk) == costs
    assert stores[0].io_stats()["bytes"] >= 10 * size
    # What the rest of the model takes more than there was is no time before a disk begins.
    dear = dataclasses.replace(costs, fixed=10.0)
    assert stored.measure_latency(file, dear, experts, calls=4).disk.latency == 0
    assert stored.measure_latency(file, costs, []) == costs


# The pools of a store decide as those of the simulation do, from empty slots on.
def test_a_store_does_what_was_simulated(small):
    trace = make(sim.drifting, 3, layers=2, steps=60, num_experts=8, top_k=3)
    store = mo.open_store(small.path, 3 << 20, max_tokens=4)
    budgets = [pool.budget for pool in store.pools]
    assert 0 < budgets[1] < 8
    costs = sim.DiskCosts(1.0, sim.Disk(1.0), 1.0, 1.0, 1.0)
    for warm in (0, 30):
        store = mo.open_store(small.path, 3 << 20, max_tokens=4)
        predicted = sim.simulate_disk(trace, budgets, costs, warm=warm)
        measured = stored.measure_store(store, trace, warm)
        assert measured.hit_rate == predicted.hit_rate
        expert = store.experts.layers[0].expert_bytes
        assert measured.missed_bytes == predicted.missed_bytes * expert


# The layer takes the same decisions as the simulation; only time is predicted.
@pytest.mark.parametrize("on_miss", ["stage", "compute"])
def test_a_layer_does_what_was_simulated(on_miss, monkeypatch):
    trace = make(sim.drifting, 2, steps=50, num_experts=16, top_k=3)
    rows = measure.compare(
        trace, list(sim.POLICIES.items()), (0, 4, 8), on_miss=on_miss, hidden=256, intermediate=256
    )
    assert len(rows) == 3 * len(sim.POLICIES)
    for _, policy, rate, measured_rate, moved, measured_moved, *speeds in rows:
        assert (rate, moved) == (measured_rate, measured_moved), policy
        assert all(float(s) > 0 for s in speeds)


def test_simulate_command(capsys, tmp_path):
    arguments = ["simulate-offload", "--experts", "16", "--top-k", "2", "--steps", "30"]
    assert main([*arguments, "--trace", "drift", "--seeds", "2", "--budgets", "1/4,8"]) == 0
    out = capsys.readouterr().out
    rows, legend = out.split("\n\n")
    assert "tokens/s" in rows and rows.count("\n") == 1 + 2 * len(sim.POLICIES)
    assert legend.startswith("budget: ")
    make(sim.zipf, 0, steps=5).save(tmp_path / "t.npz")
    command = ["simulate-offload", "--trace", str(tmp_path / "t.npz"), "--policies", "lru"]
    assert main([*command, "--markdown"]) == 0
    assert "| lru |" in capsys.readouterr().out
    for bad in (["--budgets", "x"], ["--budgets", "1/0"], ["--trace", str(tmp_path / "none.npz")]):
        assert main([*arguments, *bad]) == 2
    for bad in (["--policies", "best"], ["--steps", "0"]):
        with pytest.raises(SystemExit):
            main([*arguments, *bad])
    capsys.readouterr()


def test_simulate_command_of_a_file(small, capsys, tmp_path):
    command = ["simulate-offload", str(small.path), "--memory", "3MiB,16MiB", "--steps", "20"]
    command += ["--seeds", "2", "--max-tokens", "4"]
    assert main([*command, "--disk", "3GB/s"]) == 0
    out = capsys.readouterr().out
    assert "2 layers with 8 experts, top 3" in out and "disk 3.00 GB/s" in out
    head = out.split("\n\n")[1].splitlines()[0]
    for heading in simulate_file.HEADER:
        assert heading in head
    assert main([*command, "--disk", "2e9", "--latency-us", "50", "--measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["costs"]["disk"]["bandwidth"] == 2e9
    assert found["costs"]["disk"]["latency"] == pytest.approx(5e-5)
    tight, roomy = found["memory"]
    assert tight["budget"] < roomy["budget"] == 8
    assert tight["hit_rate"] < roomy["hit_rate"]
    assert tight["tokens_per_second"] <= tight["floor"]
    assert tight["measured_tokens_per_second"] > 0
    make(sim.zipf, 0, steps=5).save(tmp_path / "t.npz")
    assert main([*command, "--disk", "1GB/s", "--trace", str(tmp_path / "t.npz")]) == 2
    assert "2 layers of 8 experts" in capsys.readouterr().err
    for bad in (command[:2], ["simulate-offload", "--memory", "3MiB"]):
        assert main(bad) == 2
    for bad in ("--disk 0", "--disk fast", "--memory x", "--predicted 2"):
        with pytest.raises(SystemExit):
            main([*command, *bad.split()])
    capsys.readouterr()


def test_trace_command(small, capsys, tmp_path):
    picture, profile, trace = (tmp_path / n for n in ("h.png", "p.npz", "t.npz"))
    pytest.importorskip("matplotlib")
    assert (
        main([
            "trace", str(small.path), "--tokens", "24", "--batch", "2", "--budget", "3",
            "--plot", str(picture), "--save", str(profile), "--save-trace", str(trace),
        ]) == 0
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "24 tokens" in out
    head = out.split("\n\n")[1].splitlines()[0]
    for heading in trace_command.HEADER[1:]:
        assert heading in head and f"{heading}: " in trace_command.LEGEND.replace("\n", " ")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    recorded = sim.Trace.load(trace)
    assert recorded.ids.shape == (12, 2, 2, small.top_k)
    loaded = mo.ExpertProfile.load(profile)
    np.testing.assert_array_equal(loaded.counts, recorded.counts())
    assert main(["simulate-offload", "--trace", str(trace), "--budgets", "2"]) == 0
    rows = np.zeros((6, small.hidden), np.float32)
    np.save(tmp_path / "x.npy", rows)
    command = ["trace", str(small.path), "--input", str(tmp_path / "x.npy"), "--layers", "1"]
    # A quarter of the experts would not fit below some of these; what fits is taken.
    for limit in ("0.001", "0.002", "0.01"):
        assert main([*command, "--memory-limit", limit]) == 0
    assert capsys.readouterr().out.count("6 tokens") == 3
    np.save(tmp_path / "x.npy", rows[:, :3])
    assert main(command) == 2
    assert main(["trace", str(small.path), "--layers", "7"]) == 2
    assert main(["trace", str(tmp_path / "none.gguf")]) == 2
    capsys.readouterr()


def test_a_plot_without_matplotlib_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(mo.UnsupportedError, match="moesaic\\[plot\\]"):
        mo.ExpertProfile.from_counts([[1, 2]]).plot(tmp_path / "x.png")

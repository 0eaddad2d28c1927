"""Pools on traces: what they promise, and that the simulation is what layers do."""

import statistics

import numpy as np
import pytest

import moesaic as mo
from moesaic import simulate as sim
from moesaic.cli import main
from moesaic.cli import trace as trace_command
from moesaic.simulate import measure

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
    pool = mo.ExpertPool(8, 2, mo.RefreshPolicy.every_denoise_steps(2))
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
        hit_pairs=6, pairs=10,
    )  # fmt: skip
    costs = sim.Costs(expert_bytes=100.0, fast=1000.0, slow=100.0, move=50.0, fixed=0.01)
    assert sim.tokens_per_second(outcome, costs) == pytest.approx(30 / (0.2 + 1.0 + 10.0))
    computed = sim.Outcome(**{**vars(outcome), "on_miss": "compute", "loads": 0})
    assert sim.tokens_per_second(computed, costs) == pytest.approx(30 / (0.2 + 0.6 + 4.0))


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
    assert main([*command, "--memory-limit", "0.01"]) == 0
    assert "6 tokens" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", rows[:, :3])
    assert main(command) == 2
    assert main(["trace", str(small.path), "--layers", "7"]) == 2
    assert main(["trace", str(tmp_path / "none.gguf")]) == 2
    capsys.readouterr()


def test_a_plot_without_matplotlib_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(mo.UnsupportedError, match="moesaic\\[plot\\]"):
        mo.ExpertProfile.from_counts([[1, 2]]).plot(tmp_path / "x.png")

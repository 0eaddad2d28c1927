import json
import time

import numpy as np
import pytest
from files import write_small
from values import normal

import moesaic as mo


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """Large enough that a call takes many times what its own bookkeeping does."""
    small = write_small(
        tmp_path_factory.mktemp("busy") / "busy.gguf",
        num_experts=16, top_k=4, hidden=512, intermediate=512,
    )  # fmt: skip
    return mo.MoeLayer.from_gguf(mo.GgufFile(small.path), 0), normal(64, 512)


@pytest.mark.parametrize("gemm", ["bucketed", "aligned"])
def test_zones_add_up_to_the_wall_time(busy, gemm):
    layer, x = busy
    out = np.empty_like(x)
    shares = []
    with mo.tuning(gemm=gemm):
        layer(x, out=out)
        for _ in range(15):
            with mo.profile() as p:
                begin = time.perf_counter()
                layer(x, out=out)
                wall = time.perf_counter() - begin
            shares.append(sum(z.seconds for z in p.zones.values()) / wall)
            assert {z.calls for z in p.zones.values()} == {1}, p.zones
    # Zones do not overlap, so they never exceed the wall; the median shrugs off a preemption.
    assert max(shares) <= 1
    assert np.median(shares) >= 0.9, shares
    assert {"router", "route", "plan", "gate_up", "down"} <= set(p.zones), p.zones


def test_counters(busy):
    layer, x = busy
    with mo.profile("counters") as p:
        layer(x)
        layer(x[:3])
    assert p.counters["calls"] == 2
    assert p.counters["tokens"] == 67
    assert p.counters["pairs"] == 4 * 67
    assert p.counters["nonfinite_rows"] == 0
    p.reset()
    assert p.zones == {} and p.counters["calls"] == 0


def test_innermost_collects(busy):
    layer, x = busy
    with mo.profile() as outer:
        with mo.profile() as inner:
            layer(x)
        assert outer.counters["calls"] == 0 and inner.counters["calls"] == 1
        layer(x)
    layer(x)
    assert outer.counters["calls"] == 1 and inner.counters["calls"] == 1


def test_chrome_trace(busy, tmp_path):
    layer, x = busy
    with mo.profile() as p:
        layer(x)
    p.save_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert {e["name"] for e in trace["traceEvents"]} == set(p.zones)
    assert all(e["dur"] >= 0 for e in trace["traceEvents"])
    with mo.profile("counters") as totals:
        layer(x)
    assert json.loads(totals.chrome_trace())["traceEvents"] == []
    with pytest.raises(FileNotFoundError):
        p.save_chrome_trace(tmp_path / "no" / "such" / "folder.json")


def test_mode():
    with pytest.raises(mo.ConfigError, match=r"expected counters \| events \| sync, got 'all'"):
        mo.Profile("all")


def test_the_knob_chooses_the_mode(busy):
    layer, x = busy
    for knob, keeps, waits in (
        ("off", True, False),
        ("counters", False, False),
        ("events", True, False),
        ("sync", True, True),
    ):
        with mo.tuning(profile=knob), mo.profile() as p:
            layer(x)
        assert ('"ph"' in p.chrome_trace()) == keeps, knob
        assert ("sync" in p.zones) == waits, knob

"""The bench on a tiny shape: points, table, picture, comparison with itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moesaic as mo
from moesaic import bench
from moesaic.bench import BenchOptions, BenchShape, gpu, records, report, roofline, run
from moesaic.bench.run import BenchResult, Point
from moesaic.bench.weights import SCALE_AT, answer_f64, make_layers
from moesaic.cli import main

TINY = BenchShape("tiny", 256, 256, 8, 2)


@pytest.fixture(scope="module")
def result() -> object:
    options = BenchOptions(
        tokens=(1, 4), threads=(1,), precisions=("auto", "exact", "fast"), rounds=2, seconds=0.02
    )
    return run(TINY, options)


def test_every_engine_has_every_point(result: object) -> None:
    points = result.points  # type: ignore[attr-defined]
    assert {(p.engine, p.tokens) for p in points} == {
        (engine, tokens)
        for engine in ("moesaic", "moesaic exact", "moesaic fast")
        for tokens in (1, 4)
    }
    for p in points:
        assert p.us > 0 and p.floor_us > 0 and p.gb_per_s > 0
        assert p.rel_l2 < (1.3e-2 if p.engine.endswith("fast") else 1e-4)


def test_report_and_comparison(result: object, tmp_path: Path) -> None:
    plain = json.loads(json.dumps(result.to_json()))  # type: ignore[attr-defined]
    table = report.markdown(plain)
    assert "| 1 | 4 |" in table and "tiny" in table
    assert report.compare(result, plain) == []  # type: ignore[arg-type]
    for point in plain["points"]:
        point["us"] /= 10
    slower = report.compare(result, plain)  # type: ignore[arg-type]
    assert len(slower) == 6 and "x at equal limits" in slower[0]
    pytest.importorskip("matplotlib")
    roofline.plot(json.loads(json.dumps(result.to_json())), str(tmp_path / "r.png"))  # type: ignore[attr-defined]
    assert (tmp_path / "r.png").stat().st_size > 1000


SHORT = ["bench", "--threads=1", "--peers=none", "--rounds=1", "--seconds=0.01"]


def test_what_is_measured_is_saved_after_every_point(tmp_path, monkeypatch) -> None:
    """A run that is ended from outside leaves the points that it finished."""
    monkeypatch.setitem(bench.SHAPES, "qwen3-30b-a3b", TINY)
    saved: list[int] = []

    def counted(results, path):
        saved.append(len(results[-1]["points"]))
        return save(results, path)

    save = records.save
    monkeypatch.setattr(records, "save", counted)
    path = tmp_path / "r.json"
    assert main([*SHORT, "--tokens=1,2,3", "--json", str(path)]) == 0
    assert saved == [1, 2, 3, 3]
    assert [p["tokens"] for p in records.load(path)[0]["points"]] == [1, 2, 3]


def test_no_point_begins_after_the_time_limit(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(bench.SHAPES, "qwen3-30b-a3b", TINY)
    path = tmp_path / "r.json"
    limit = ["--time-limit=1e-9", "--tokens=2,3", "--json", str(path)]
    assert main([*SHORT, *limit]) == 0
    left = "from 2 tokens, 1 threads on: 2 points"
    assert f"absent: time limit: {left}" in capsys.readouterr().out
    (result,) = records.load(path)
    assert result["points"] == [] and result["absent"] == {"time limit": left}


def one_point(**changes: float) -> BenchResult:
    facts = {"us": 100.0, "spread": 0.02, "floor_us": 50.0, "floor_spread": 0.02, **changes}
    point = Point(
        engine="moesaic", tokens=1, threads=1, gb_per_s=1, gop_per_s=1, floor_kind="memory",
        rel_l2=0, **facts,
    )  # fmt: skip
    return BenchResult({}, {}, "", "", [point])


@pytest.mark.parametrize(
    ("changes", "is_slower"),
    [
        ({}, False),
        ({"us": 109.0}, False),
        ({"us": 115.0}, True),
        ({"us": 115.0, "floor_us": 58.0}, False),  # the machine was as much slower
        ({"us": 101.0, "floor_us": 40.0}, True),  # it was faster, and the time was not
        ({"us": 99.0, "floor_us": 40.0}, False),  # a faster run is no regression
        ({"us": 101.0, "floor_us": 40.0, "floor_spread": 0.3}, False),
        ({"us": 115.0, "spread": 0.2}, False),
        ({"us": 200.0, "spread": 0.2, "floor_spread": 0.3}, True),
    ],
)
def test_compare_counts_all_spreads(changes: dict[str, float], is_slower: bool) -> None:
    before = one_point().to_json()
    assert bool(report.compare(one_point(**changes), before)) is is_slower
    old = json.loads(json.dumps(before))  # of a version that kept no spread of the limit
    del old["points"][0]["floor_spread"]
    assert bool(report.compare(one_point(**changes), old)) is is_slower


def test_results_keep_their_history(result: object, tmp_path: Path) -> None:
    """A folder has one file per date; later runs of a day join it, equal ones are replaced."""
    plain = json.loads(json.dumps(result.to_json()))  # type: ignore[attr-defined]
    first = {**plain, "date": "2000-01-01"}
    other = {**first, "shape": {**first["shape"], "name": "other"}}
    second = {**plain, "date": "2000-01-02"}
    for results in ([first], [other], [first], [second]):
        written = records.save(results, tmp_path)
    assert written.name == "2000-01-02.json"
    assert len(records.load(tmp_path / "2000-01-01.json")) == 2
    entries = records.history(records.load_folder(tmp_path))
    of_one = [e for e in entries if (e.engine, e.tokens) == ("moesaic", 1) and "tiny" in e.shape]
    assert [e.date for e in of_one] == ["2000-01-01", "2000-01-02"]
    assert of_one[0].us == plain["points"][0]["us"]
    pytest.importorskip("matplotlib")
    records.plot_history(entries, tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 1000


def test_the_history_command(result: object, tmp_path: Path, capsys) -> None:
    assert main(["bench", "--history", str(tmp_path)]) == 2
    assert "<date>.json" in capsys.readouterr().err
    plain = json.loads(json.dumps(result.to_json()))  # type: ignore[attr-defined]
    records.save([plain], tmp_path)
    assert main(["bench", "--history", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count(plain["date"]) == len(plain["points"])
    assert "time/limit: " in out


def test_an_absent_device_says_why(capsys) -> None:
    reasons = [b.reason for b in mo.backends() if b.name == "metal" and not b.available]
    if not reasons:
        pytest.skip("there is a Metal device")
    assert main(["bench", "--device", "metal"]) == 2
    assert reasons[0] in capsys.readouterr().err


def test_recorded_results_are_read() -> None:
    folder = Path(__file__).parents[1] / "bench" / "results"
    assert {entry.error < 0.1 for entry in records.history(records.load_folder(folder))} == {True}


def test_headings_are_explained() -> None:
    for heading in ("us/layer", "spread", "GB/s", "GOP/s", "time/limit", "error"):
        assert heading in report.lines([]) and f"{heading}: " in report.LEGEND


@pytest.mark.parametrize("quant", SCALE_AT)
def test_random_codes_have_the_scale_of_weights(quant: str) -> None:
    layer = make_layers(BenchShape("tiny", 512, 256, 4, 2, quant, quant), 1)[0]
    for weight, cols in ((layer.gate, 512), (layer.down, 256)):
        assert 0.5 < weight.values.std() * np.sqrt(cols) < 2
        decoded = mo.testing.dequantize(weight.data, quant, weight.shape)
        np.testing.assert_array_equal(decoded, weight.values)


def test_answer_follows_the_routing() -> None:
    layer = make_layers(TINY, 1)[0]
    x = np.ones((2, 256), np.float32)
    ids = np.array([[0, 4], [0, 1]], np.int32)  # expert 4 holds the values of expert 0
    weights = np.array([[0.25, 0.75], [1.0, 0.0]], np.float32)
    y = answer_f64(layer, x, ids, weights)
    np.testing.assert_allclose(y[0], y[1], rtol=1e-12)


def test_a_gpu_without_a_backend_says_why() -> None:
    if any(b.available and b.name == "cuda" for b in mo.backends()):
        pytest.skip("this machine has one")
    with pytest.raises(mo.DeviceError, match=r"got cuda:0 \(.*cuda: "):
        gpu.run(TINY, gpu.GpuOptions("cuda:0", (1,)))


def test_gpu_report() -> None:
    point = gpu.GpuPoint(
        "moesaic", 8, 12, 51.6, 36.0, 35.5, 38.0, 29.2, "memory", 4100.0, 1.5, 3e-3
    )
    assert "51.6" in gpu.lines([point]) and "1.23" in gpu.lines([point])
    facts = {"gpu": "X, sm_90", "copy_gb_per_s": 4300.0, "bf16_tflop_per_s": 790.0}
    result = {
        "shape": TINY.__dict__,
        "machine": facts,
        "date": "2000-01-01",
        "command": "moesaic bench",
        "points": [point.__dict__],
        "absent": {"torch-grouped": "why"},
    }
    table = gpu.markdown(result)
    assert "| 8 | 52 | 29.2 | 36.0 (3e-03) |" in table and "torch-grouped (why)" in table


def test_gpu_layers_exceed_the_cache() -> None:
    shape = BenchShape("x", 2048, 768, 128, 8)
    count = gpu._layers_needed(shape, 1, 2.4e6, 60 << 20)
    assert count * 8 * 2.4e6 >= gpu.CACHES * (60 << 20)
    assert gpu._layers_needed(shape, 4096, 2.4e6, 60 << 20) == 2

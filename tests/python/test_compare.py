"""compare(): errors of weights and outputs, how they print, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import pytest

import moesaic as mo

E, H, I, T = 12, 64, 32, 20


def dense(seed=0, experts=E):
    rng = np.random.default_rng(seed)
    shapes = ((experts, I, H), (experts, I, H), (experts, H, I))
    return [rng.standard_normal(shape, dtype=np.float32) / 8 for shape in shapes]


@pytest.fixture(scope="module")
def stacks():
    matrices = dense()
    coded = [(mo.quantize(w, "Q8_0"), "Q8_0", w.shape) for w in matrices]
    return mo.ExpertStack.from_dense_stacks(*matrices), mo.ExpertStack.from_encoded(*coded)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((T, H), dtype=np.float32)


def test_errors_of_weights_by_role_and_expert(stacks):
    gate, up, down = dense()
    up[3] *= 1.25
    down[5, 0, 0] += 1
    other = mo.ExpertStack.from_dense_stacks(gate, up, down)
    found = mo.compare(stacks[0], other)
    assert found.outputs is None and list(found.weights) == ["gate", "up", "down"]
    np.testing.assert_array_equal(found.weights["gate"], 0)
    want = np.where(np.arange(E) == 3, 0.25, 0)
    np.testing.assert_allclose(found.weights["up"], want, atol=1e-6)
    want = np.where(np.arange(E) == 5, 1 / np.linalg.norm(dense()[2][5]), 0)
    np.testing.assert_allclose(found.weights["down"], want, atol=1e-6)


def test_errors_of_outputs_by_token(stacks, x):
    ids = np.stack([np.arange(T) % E, (np.arange(T) + 3) % E], axis=1)
    routing = mo.Routing(ids, np.full((T, 2), 0.5, np.float32))
    want = mo.moe_forward(x, None, stacks[0], routing=routing)
    got = mo.moe_forward(x, None, stacks[1], routing=routing)
    errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert 1e-4 < errors.mean() < 0.05
    for given in ({"ids": ids}, {"routing": routing}):
        found = mo.compare(*stacks, x, **given)
        np.testing.assert_allclose(found.outputs, errors, rtol=1e-6)
    assert mo.compare(*stacks, x).outputs.shape == (T,)
    np.testing.assert_array_equal(mo.compare(stacks[0], stacks[0], x).outputs, 0)


def test_layers_route_by_their_own_routers(stacks, x):
    router = np.random.default_rng(2).standard_normal((E, H), dtype=np.float32)
    config = mo.MoeConfig(H, I, E, 2)
    a, b = (mo.MoeLayer(stack, config, router) for stack in stacks)
    errors = np.linalg.norm(b(x) - a(x), axis=1) / np.linalg.norm(a(x), axis=1)
    found = mo.compare(a, b, x)
    np.testing.assert_allclose(found.outputs, errors, rtol=1e-6)
    ids = np.zeros((T, 1), np.int64)
    assert not np.array_equal(mo.compare(a, b, x, ids=ids).outputs, found.outputs)


def test_it_prints_as_a_table(stacks, x):
    found = mo.compare(*stacks, x)
    text = repr(found)
    assert text == str(found)
    lines = text.splitlines()
    assert lines[0].split() == ["types", "mean", "max", "worst"]
    assert set(lines[1]) == {"-", " "}
    assert lines[2].split()[:3] == ["gate", "F32", "Q8_0"] and "expert" in lines[2]
    assert any(line.startswith("outputs") and "token" in line for line in lines)
    assert f"the worst 8 of {E} experts" in lines[-1]
    assert all(line == line.rstrip() and len(line) < 80 for line in lines)
    html = found._repr_html_()
    assert html.count("<table>") == html.count("</table>") == 2 and "<td>Q8_0" not in html
    small = mo.ExpertStack.from_dense_stacks(*dense(experts=2))
    assert "worst" not in str(mo.compare(small, small)).splitlines()[-1]


def test_numbers_come_out_for_json(stacks, x):
    found = mo.compare(*stacks, x)
    facts = json.loads(json.dumps(found.to_dict()))
    assert facts["weights"]["down"] == found.weights["down"].tolist()
    assert len(facts["outputs"]) == T and facts["quants"]["up"] == ["F32", "Q8_0"]
    assert facts["nbytes"] == [stack.nbytes for stack in stacks]
    assert mo.compare(*stacks).to_dict()["outputs"] is None


def test_ungated_experts_have_two_roles():
    _, up, down = dense()
    stack = mo.ExpertStack.from_dense_stacks(None, up, down)
    assert list(mo.compare(stack, stack).weights) == ["up", "down"]


def test_plot_leaves_the_backend_alone(stacks, x):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams._get("backend") if hasattr(matplotlib.rcParams, "_get") else None
    found = mo.compare(*stacks, x)
    figure = found.plot()
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 3
    assert len(mo.compare(*stacks).plot().axes) == 1
    mine = matplotlib.figure.Figure()
    ax = mine.subplots()
    assert found.plot(ax=ax) is mine and len(ax.lines) == 3
    if before is not None:
        assert matplotlib.rcParams._get("backend") == before
        assert "matplotlib.pyplot" not in sys.modules or before != "agg"


def test_misuse(stacks, x):
    small = mo.ExpertStack.from_dense_stacks(*dense(experts=2))
    with pytest.raises(mo.ShapeError, match=r"compare: b: .*\(12, 32, 64, True\)"):
        mo.compare(stacks[0], small)
    with pytest.raises(mo.DTypeError, match="compare: a: expected ExpertStack or MoeLayer"):
        mo.compare("model.gguf", small)
    layer = mo.MoeLayer(small, mo.MoeConfig(H, I, 2, 1))
    with pytest.raises(mo.DTypeError, match="compare: b: expected MoeLayer"):
        mo.compare(layer, small)
    ids = np.zeros((T, 1), np.int32)
    with pytest.raises(mo.ConfigError, match="got both"):
        mo.compare(*stacks, x, ids=ids, routing=mo.Routing(ids, np.ones((T, 1), np.float32)))
    with pytest.raises(mo.ConfigError, match="compare: x"):
        mo.compare(*stacks, ids=ids)


@pytest.mark.parametrize(
    "parts",
    [
        (3,),
        ({},),
        ({"up": [0.5]},),
        ({"up": np.zeros(2), "down": np.zeros(3)},),
        ({"up": np.zeros(2, int)},),
        ({"up": np.zeros(2)}, np.zeros((2, 2))),
        ({"up": np.zeros(2)}, None, 5),
        ({"up": np.zeros(2)}, None, {}, 7),
    ],
)
def test_parts_of_another_form(parts):
    with pytest.raises(mo.DTypeError, match="Comparison: "):
        mo.Comparison(*parts)


def test_what_cannot_be_drawn_on():
    found = mo.Comparison({"up": np.zeros(2)})
    for plot in (found.plot, mo.ExpertProfile.from_counts([[1, 2]]).plot):
        with pytest.raises(mo.DTypeError, match="ax: expected Axes"):
            plot(ax=0.5)


def test_a_delta_counts_as_part_of_the_matrix(stacks):
    rng = np.random.default_rng(3)
    a = rng.standard_normal((E, 2, H), dtype=np.float32) / 8
    b = rng.standard_normal((E, I, 2), dtype=np.float32) / 8
    tuned = stacks[0].with_deltas({"up": (a, b, 0.5)})
    found = mo.compare(tuned, tuned.bake())  # f32 holds the sum but for its last bits
    assert found.weights["up"].max() < 1e-6
    up = stacks[0].dequantize("up")
    change = np.linalg.norm(0.5 * b @ a, axis=(1, 2)) / np.linalg.norm(up, axis=(1, 2))
    np.testing.assert_allclose(mo.compare(stacks[0], tuned).weights["up"], change, rtol=1e-5)


def test_comparisons_are_values(stacks, x):
    found = mo.compare(*stacks, x)
    assert found == mo.compare(*stacks, x) and hash(found) == hash(mo.compare(*stacks, x))
    assert found == pickle.loads(pickle.dumps(found))
    assert found != mo.compare(*stacks) and found != mo.compare(stacks[0], stacks[0], x)
    assert found != 1


def test_plot_writes_a_file(stacks, tmp_path):
    pytest.importorskip("matplotlib")
    found = mo.compare(*stacks)
    found.plot(tmp_path / "errors.svg")
    assert "<svg" in (tmp_path / "errors.svg").read_text()
    with pytest.raises(
        mo.ConfigError, match=r"path: expected one that ends in .*\.png.*, got '.xyz'"
    ):
        found.plot(tmp_path / "errors.xyz")
    with pytest.raises(mo.DTypeError, match=r"path: expected a path or None, got Axes .*ax="):
        found.plot(found.plot().axes[0])

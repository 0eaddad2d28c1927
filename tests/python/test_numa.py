"""Weights dealt to NUMA nodes give the bits of weights in one place, and say where they lie.

Numbers of nodes that the machine does not have are groups of CPUs: the same code, but no page is
bound. ``tests/numa`` runs machines that have them.
"""

import pickle

import numpy as np
import pytest
from files import write_small
from oracle import rel_l2
from values import normal, random_routing

import moesaic as mo


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """22 and 18 panels, which 4 and 8 nodes cannot share evenly."""
    path = tmp_path_factory.mktemp("numa") / "uneven.gguf"
    return write_small(path, gate_type="Q8_0", down_type="Q5_0", hidden=288, intermediate=352)


def load(small, numa, **options) -> mo.MoeLayer:
    with mo.tuning(numa=numa):
        return mo.MoeLayer.from_gguf(mo.GgufFile(small.path), 0, **options)


def outputs(layer, small, *, numa, threads) -> list[np.ndarray]:
    """One token, a few (one job has all experts' rows), and more (jobs of buckets)."""
    out = []
    with mo.tuning(numa=numa, threads=threads):
        for tokens in (1, 7, 90):
            x = normal(tokens, small.hidden, seed=tokens)
            routing = random_routing(tokens, small.num_experts, small.top_k, seed=tokens)
            out.append(mo.moe_forward(x, None, layer.stack, routing=routing))
    return out


@pytest.mark.parametrize("file", ["small", "uneven"])
@pytest.mark.parametrize("numa", [2, 3, 4, 8])
def test_bits_depend_neither_on_nodes_nor_on_threads(file, numa, request):
    small = request.getfixturevalue(file)
    want = outputs(load(small, "off"), small, numa="off", threads=1)
    layer = load(small, numa)
    assert f"dealt to {numa} nodes" in str(layer.report)
    for called_with in ("off", 2, numa):
        for threads in range(1, 9):
            got = outputs(layer, small, numa=called_with, threads=threads)
            for one, other in zip(want, got, strict=True):
                np.testing.assert_array_equal(other, one)


def test_the_reference_reads_dealt_panels(uneven):
    layer = load(uneven, 3)
    x = normal(5, uneven.hidden)
    routing = random_routing(5, uneven.num_experts, uneven.top_k)
    want = mo.moe_forward_cpu(x, routing, layer.stack)
    assert rel_l2(mo.moe_forward(x, None, layer.stack, routing=routing), want) < 2e-3


def test_a_dealt_stack_is_like_any_other(uneven):
    plain, dealt = load(uneven, "off").stack, load(uneven, 4).stack
    assert dealt.kind == plain.kind == "stacked"
    assert dealt.nbytes == plain.nbytes
    for role in plain.quants:
        np.testing.assert_array_equal(dealt.encoded(role), plain.encoded(role))
        for expert in range(plain.num_experts):
            np.testing.assert_array_equal(
                dealt.dequantize(role, expert), plain.dequantize(role, expert)
            )


def test_experts_of_dealt_stacks(uneven):
    with mo.tuning(numa=3):
        layer = load(uneven, 3)
        ids = [4, 1, 4]
        few = layer.stack.select(ids)
        assert few.kind == "per_expert"
        for role in few.quants:
            np.testing.assert_array_equal(few.encoded(role), layer.stack.encoded(role)[ids])
        again = few.select([1])
        both = mo.ExpertStack.concat([few, again])
        np.testing.assert_array_equal(both.encoded("down")[3], layer.stack.encoded("down")[1])
        x = normal(3, uneven.hidden)
        weights = np.full((3, 2), 0.5, np.float32)
        got = mo.moe_forward(x, None, both, routing=mo.Routing(np.int32([[0, 3]] * 3), weights))
        want = mo.moe_forward(
            x, None, layer.stack, routing=mo.Routing(np.int32([[4, 1]] * 3), weights)
        )
        np.testing.assert_array_equal(got, want)
        edited = layer.stack.with_expert(2, up=layer.stack.dequantize("up", 2))
        np.testing.assert_array_equal(edited.encoded("gate"), layer.stack.encoded("gate"))


def test_experts_that_are_dealt_otherwise_do_not_mix(uneven):
    with pytest.raises(mo.UnsupportedError, match=r"dealt to 2 nodes.*MOESAIC_NUMA"):
        mo.ExpertStack.concat([load(uneven, "off").stack, load(uneven, 2).stack])


def test_fewer_panels_than_nodes_stay_together(stack, dense):
    with mo.tuning(numa=3):
        few = mo.ExpertStack.from_dense_stacks(*dense)
    report = {role.role: role.reason for role in few.report.roles}
    assert "dealt to 3 nodes" in report["gate"]
    assert "too few to deal to nodes" in report["down"]  # 24 rows are 2 panels
    np.testing.assert_array_equal(few.encoded("down"), stack.encoded("down"))


def test_explain_says_where_panels_lie(small):
    def facts(layer, numa):
        with mo.tuning(numa=numa):
            return mo.explain(layer, num_tokens=4)

    layer = load(small, 2)
    near = facts(layer, 2)
    assert near["numa"].startswith("2 nodes: group 0 (")
    assert near["gate placement"] == "panels dealt to 2 nodes: 16 + 16"
    assert near["remote weight bytes (uniform routing)"] == "0"
    # The three of four nodes that did not write the rows read them once, as two planes.
    far = facts(layer, 4)
    assert far["gate placement"].endswith("the threads have 4")
    assert far["remote activation bytes"] == str(3 * 2 * (4 * 256 + 12 * 512))
    read = int(far["weight bytes read (uniform routing)"])
    assert int(far["remote weight bytes (uniform routing)"]) == pytest.approx(read * 3 / 4, abs=2)
    file = facts(load(small, 2, layout="file"), 2)
    assert file["down placement"] == "not dealt to nodes"
    assert int(file["remote weight bytes (uniform routing)"]) == pytest.approx(read / 2, abs=2)
    one = facts(layer, "off")
    assert one["numa"].startswith("1 node (")
    assert not any("remote" in name or "placement" in name for name in one)


def test_a_matrix_is_dealt_too(uneven):
    values = normal(200, 256)
    plain = mo.QuantMatrix.from_dense(values, "Q4_K")
    with mo.tuning(numa=4):
        dealt = mo.QuantMatrix.from_dense(values, "Q4_K")
        for rows in (1, 50):
            np.testing.assert_array_equal(dealt(normal(rows, 256)), plain(normal(rows, 256)))
    np.testing.assert_array_equal(dealt.dequantize(), plain.dequantize())


def test_what_is_here():
    assert "node" in mo.build_info()["numa"]
    with mo.tuning(numa=3):
        assert mo.build_info()["numa"].startswith("3 nodes: group 0 (")


@pytest.mark.parametrize("value", ["0", "-1", "65", "on", "two"])
def test_values_that_are_no_number_of_nodes(value):
    with pytest.raises(mo.ConfigError, match=r"MOESAIC_NUMA.*auto\|off\|1\.\.64"):
        mo.Tuning.from_env({"MOESAIC_NUMA": value})


def test_values_of_the_environment():
    for text, value in [("auto", None), ("off", "off"), ("1", "off"), ("4", 4)]:
        tuning = mo.Tuning.from_env({"MOESAIC_NUMA": text})
        assert tuning.numa == value
        assert pickle.loads(pickle.dumps(tuning)) == tuning

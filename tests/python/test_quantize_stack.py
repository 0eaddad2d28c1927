"""from_dense_stacks(quant=, weights=): the bytes of quantize by role, a report, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import moesaic as mo

E, H, I = 3, 256, 512


@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    shapes = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I)}
    return {role: rng.standard_normal(s, dtype=np.float32) / 16 for role, s in shapes.items()}


def test_one_type_for_all_roles_gives_the_bytes_of_quantize(matrices):
    stack = mo.ExpertStack.from_dense_stacks(**matrices, quant="Q4_K")
    coded = {role: (mo.quantize(w, "Q4_K"), "Q4_K", w.shape) for role, w in matrices.items()}
    want = mo.ExpertStack.from_encoded(**coded)
    assert stack.quants == dict.fromkeys(("gate", "up", "down"), "Q4_K")
    for role in matrices:
        for e in range(E):
            np.testing.assert_array_equal(stack.dequantize(role, e), want.dequantize(role, e))


def test_types_by_role_and_what_the_report_says(matrices):
    quant = {"up": "Q4_K", "down": "Q6_K"}
    stack = mo.ExpertStack.from_dense_stacks(**matrices, quant=quant, layout="file")
    assert stack.quants == {"gate": "F32", "up": "Q4_K", "down": "Q6_K"}
    said = {r.role: (r.stored, r.kept, r.decision) for r in stack.report.roles}
    assert said == {
        "gate": ("F32", "F32", "copied"),
        "up": ("F32", "Q4_K", "encoded"),
        "down": ("F32", "Q6_K", "encoded"),
    }
    np.testing.assert_array_equal(stack.dequantize("gate", 1), matrices["gate"][1])


ROLES = ("gate", "up", "down")


def importances(shape, seed):
    return np.random.default_rng(seed).lognormal(0, 2, shape).astype(np.float32)


def test_weights_by_role_give_the_bytes_of_quantize(matrices):
    """For all experts, for each, and for each row of each."""
    weights = {
        "gate": importances(H, 1),
        "up": importances((E, H), 2),
        "down": importances((E, H, I), 3),
    }
    types = {"gate": "Q4_K", "up": "IQ2_XS", "down": "Q5_K"}
    stack = mo.ExpertStack.from_dense_stacks(**matrices, quant=types, weights=weights)
    wide = {"gate": weights["gate"], "up": weights["up"][:, None], "down": weights["down"]}
    for role in ROLES:
        want = mo.quantize(matrices[role], types[role], weights=wide[role])
        np.testing.assert_array_equal(stack.encoded(role), want)
        plain = mo.quantize(matrices[role], types[role])
        assert (stack.encoded(role) != plain).any()


def test_weights_of_size_one_repeat_and_roles_may_be_without(matrices):
    one = importances((1, 1, H), 4)
    got = mo.ExpertStack.from_dense_stacks(
        **matrices, quant="Q4_K", weights={"gate": one, "up": one[:, 0], "down": None}
    )
    for role in ("gate", "up"):
        want = mo.quantize(matrices[role], "Q4_K", weights=one[0, 0])
        np.testing.assert_array_equal(got.encoded(role), want)
    np.testing.assert_array_equal(got.encoded("down"), mo.quantize(matrices["down"], "Q4_K"))


def test_weights_of_narrow_floats_and_strides(matrices):
    half = importances((H, E), 5).astype(np.float16)
    got = mo.ExpertStack.from_dense_stacks(**matrices, quant="Q4_K", weights={"up": half.T})
    want = mo.quantize(matrices["up"], "Q4_K", weights=half.T.astype(np.float32)[:, None])
    np.testing.assert_array_equal(got.encoded("up"), want)


MISFITS = [
    ({"up": np.ones(I)}, "DTypeError", r"weights\['up'\]"),
    (
        {"up": np.ones(I, np.float32)},
        "ShapeError",
        r"weights\['up'\]: expected \[256\], or \[3, 25",
    ),
    ({"down": np.ones((2, I), np.float32)}, "ShapeError", r"weights\['down'\].*got f32\[2, 512\]"),
    ({"down": np.ones((E, 2, I), np.float32)}, "ShapeError", r"weights\['down'\]"),
    ({"down": np.ones((1, 1, 1, I), np.float32)}, "ShapeError", r"weights\['down'\]"),
    ({"router": np.ones(H, np.float32)}, "ConfigError", "gate"),
    (np.ones(H, np.float32), "DTypeError", "weights: expected a dict of arrays by role"),
    ({"gate": np.ones(H, np.float32)}, "ConfigError", r"weights\['gate'\].*not encoded"),
]


@pytest.mark.parametrize(("weights", "error", "message"), MISFITS)
def test_weights_that_do_not_fit(matrices, weights, error, message):
    types = {"up": "Q4_K", "down": "Q4_K"}
    seen = []
    with pytest.raises(getattr(mo, error), match=message):
        mo.ExpertStack.from_dense_stacks(
            **matrices, quant=types, weights=weights, progress=seen.append
        )
    assert not seen  # before anything is encoded


def test_types_and_roles_without_weights_say_so(matrices):
    counts = np.ones(I, np.float32)
    with pytest.raises(mo.UnsupportedError, match=r"weights\['down'\]: expected none for Q8_0"):
        mo.ExpertStack.from_dense_stacks(
            **matrices, quant={"up": "Q4_K", "down": "Q8_0"}, weights={"down": counts}
        )
    ungated = {"gate": None, "up": matrices["up"], "down": matrices["down"]}
    with pytest.raises(mo.ConfigError, match=r"weights\['gate'\]"):
        mo.ExpertStack.from_dense_stacks(**ungated, quant="Q4_K", weights={"gate": counts})
    bad = np.ones((E, I), np.float32)
    bad[1, 7] = -2
    with pytest.raises(mo.ConfigError, match=r"down of expert 1: .*weights\[.*7\].*got -2"):
        mo.ExpertStack.from_dense_stacks(**matrices, quant="Q4_K", weights={"down": bad})


def test_biases_narrow_floats_and_strides(matrices):
    half = {role: w.astype(np.float16) for role, w in matrices.items()}
    bias = {"up": np.arange(E * I, dtype=np.float32).reshape(E, I)}
    stack = mo.ExpertStack.from_dense_stacks(**half, quant="Q8_0", biases=bias)
    np.testing.assert_array_equal(stack.biases["up"], bias["up"])
    across = {
        role: np.ascontiguousarray(w.transpose(0, 2, 1)).transpose(0, 2, 1)
        for role, w in half.items()
    }
    other = mo.ExpertStack.from_dense_stacks(**across, quant="Q8_0")
    for role, w in half.items():
        want = mo.dequantize(mo.quantize(w[1], "Q8_0"), "Q8_0")
        np.testing.assert_array_equal(stack.dequantize(role, 1), want)
        np.testing.assert_array_equal(other.dequantize(role, 1), want)


def test_progress_is_told_by_expert_and_can_end_it(matrices):
    seen = []
    mo.ExpertStack.from_dense_stacks(**matrices, quant="Q8_0", layout="file", progress=seen.append)
    done, totals = zip(*((p.done_bytes, p.total_bytes) for p in seen), strict=True)
    assert len(seen) >= 3 * E and list(done) == sorted(done)
    assert done[-1] == totals[0] == sum(w.nbytes for w in matrices.values())
    with pytest.raises(mo.OperationCancelled):
        mo.ExpertStack.from_dense_stacks(**matrices, quant="Q8_0", progress=lambda p: False)


def test_misuse(matrices):
    with pytest.raises(mo.ConfigError, match="nearest: Q4_K"):
        mo.ExpertStack.from_dense_stacks(**matrices, quant="q4_k")
    with pytest.raises(mo.ConfigError, match="gate"):
        mo.ExpertStack.from_dense_stacks(**matrices, quant={"router": "Q4_K"})
    with pytest.raises(mo.UnsupportedError, match="Q8_K"):
        mo.ExpertStack.from_dense_stacks(**matrices, quant="Q8_K")
    narrow = [np.ones((E, 48, 48), np.float32)] * 3
    with pytest.raises(mo.ShapeError, match="256"):
        mo.ExpertStack.from_dense_stacks(*narrow, quant="Q4_K")
    bad = {role: w.copy() for role, w in matrices.items()}
    bad["down"][2, 5, 9] = np.nan
    with pytest.raises(mo.ConfigError, match=r"down of expert 2: .*values\[5, 9\].*nan"):
        mo.ExpertStack.from_dense_stacks(**bad, quant="Q4_K")
    assert mo.ExpertStack.from_dense_stacks(**bad).quants["down"] == "F32"


def test_a_delta_that_no_type_holds_is_refused_when_baked(matrices):
    stack = mo.ExpertStack.from_dense_stacks(**matrices, quant="Q8_0")
    a = np.zeros((E, 1, H), np.float32)
    b = np.zeros((E, I, 1), np.float32)
    a[1, 0, 3], b[1, 7, 0] = 1e30, 1.0
    with pytest.raises(mo.ConfigError, match=r"values\[7, 3\].*1e\+30"):
        stack.with_deltas({"up": (a, b, 1.0)}).bake()

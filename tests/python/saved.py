"""Layers of every architecture for files to be saved as, and all that has to come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from test_gguf_layers import E, H, Model, S
from values import normal

import moesaic as mo
from moesaic.saving.facts import facts_of


def open_layer(path, block: int = 0) -> mo.MoeLayer:
    return mo.MoeLayer.from_gguf(path, block, precision="exact")


def assert_same_stack(a: mo.ExpertStack, b: mo.ExpertStack) -> None:
    assert a.quants == b.quants
    for role in a.quants:
        np.testing.assert_array_equal(a.encoded(role), b.encoded(role))
    for found, wanted in ((a.biases, b.biases), (a.scales, b.scales)):
        assert found.keys() == wanted.keys()
        for role in wanted:
            np.testing.assert_array_equal(found[role], wanted[role])


def assert_same(a: mo.MoeLayer, b: mo.MoeLayer) -> None:
    """All that a layer is made of, bit by bit."""
    assert facts_of(a.config) == facts_of(b.config)
    assert_same_stack(a.stack, b.stack)
    np.testing.assert_array_equal(a.router_weight, b.router_weight)
    assert (a.shared is None) == (b.shared is None)
    if a.shared is not None:
        assert_same_stack(a.shared.stack, b.shared.stack)
        assert (a.shared.gate is None) == (b.shared.gate is None)
        if a.shared.gate is not None:
            np.testing.assert_array_equal(a.shared.gate, b.shared.gate)
    assert (a.latent is None) == (b.latent is None)
    if a.latent is not None:
        assert_same_stack(a.latent, b.latent)
    assert a.norms.keys() == b.norms.keys()
    for name in a.norms:
        np.testing.assert_array_equal(a.norms[name], b.norms[name])
    assert (a.token_experts is None) == (b.token_experts is None)
    if a.token_experts is not None:
        np.testing.assert_array_equal(a.token_experts, b.token_experts)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ROWS = {row["architecture"]: row for row in mo.architecture_table() if not row["missing"]}


def model_of(row: dict[str, str]) -> Model:
    """A file of an architecture with everything that it may have, at values of their own."""
    name = row["architecture"]
    score = 1 if "softmax" in row["score"] else 4 if name == "deepseek4" else 2
    shared = bool(row["shared"])
    model = Model.small(
        name, shared=shared, expert_gating_func=score, expert_weights_norm=True,
        expert_weights_scale=2.5, expert_group_count=2, expert_group_used_count=1,
        swiglu_clamp_exp=4.0, swiglu_clamp_shexp=3.0, expert_shared_count=1,
        expert_shared_feed_forward_length=S,
    )  # fmt: skip
    model.keys |= {
        "attention.layer_norm_rms_epsilon": 1e-5, "activation.situ_beta": 2.0,
        "activation.situ_linear_beta": 0.5,
    }  # fmt: skip
    tensors = model.tensors
    if "bias" in row["selection"]:
        tensors["exp_probs_b.bias"] = normal(E, seed=1)
    if "router bias" in row["notes"]:
        tensors["ffn_gate_inp.bias"] = normal(E, seed=2)
    if row["shared"].startswith("sigmoid"):
        tensors["ffn_gate_inp_shexp.weight"] = normal(H, seed=3)
    if row["activation"] in ("relu_squared", "gelu_tanh"):
        del tensors["ffn_gate_exps.weight"]
        tensors.pop("ffn_gate_shexp.weight", None)
    if "input norm" in row["notes"].split("; "):
        norm = "ffn_norm_exps" if name == "arctic" else "pre_ffw_norm_2"
        tensors[f"{norm}.weight"] = normal(H, seed=4)
    if "router norm" in row["notes"]:
        tensors["ffn_gate_inp.scale"] = normal(H, seed=5)
    for role in tensors.keys() & {f"ffn_{r}_exps.weight" for r in ("gate", "up", "down")}:
        tensors[role.replace("weight", "scale")] = np.linspace(0.5, 2, E).astype(np.float32)
        rows = tensors[role].shape[1]
        tensors[role.replace("weight", "bias")] = normal(E, rows, seed=6)
    return model

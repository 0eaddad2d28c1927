"""Weights of a transformers module in GGUF, under the architecture that llama.cpp gives them."""

from typing import Any

import gguf
import numpy as np
import pytest
from arrays import (
    experts_of,
    latent_of,
    router_biases_of,
    router_weight_of,
    shared_of,
)
from comparison import compare
from models import ARCHITECTURES, MODELS, Model
from oracle import moe_f64, rel_l2
from reference import Reference, make_reference
from values import expert_weights, normal

import moesaic as mo

GATING = {"softmax": 1, "sigmoid": 2, "softmax_selected": 3, "sqrt_softplus": 4}


def write(path: Any, arch: str, reference: Reference, config: mo.MoeConfig) -> None:
    """One MoE layer of one block. Keys that an architecture does not know have no effect."""
    writer = gguf.GGUFWriter(path, arch)
    block, router = f"blk.{config.layer}.", config.router
    for key, value in {
        "block_count": config.layer + 1,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.top_k,
        "expert_gating_func": GATING[router.score],
        "leading_dense_block_count": 1,
        "interleave_moe_layer_step": 1,
        "expert_shared_count": config.shared_intermediate_size // config.intermediate_size,
        "expert_shared_feed_forward_length": config.shared_intermediate_size,
        "expert_group_count": router.num_groups,
        "expert_group_used_count": router.groups_used,
        "moe_latent_size": config.latent_size,
    }.items():
        if value:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_bool(f"{arch}.expert_weights_norm", router.renormalize)
    if config.activation.kind.startswith("swiglu_clamp"):
        writer.add_float32(f"{arch}.swiglu_clamp_exp", config.activation.limit)
    writer.add_float32(f"{arch}.expert_weights_scale", router.scale / config.shared_scale)

    def add(name: str, values: Any) -> None:
        writer.add_tensor(block + name, np.ascontiguousarray(values, np.float32))

    add("ffn_gate_inp.weight", router_weight_of(reference))
    biases = router_biases_of(reference)
    if "router_bias" in biases:
        add("ffn_gate_inp.bias", biases["router_bias"])
    if "selection_bias" in biases:
        add("exp_probs_b" if arch == "hy_v3" else "exp_probs_b.bias", biases["selection_bias"])
    for name, values in experts_of(reference).items():
        role, _, kind = name.partition(" ")
        add(f"ffn_{role}_exps.{kind or 'weight'}", values)
    for role, values in shared_of(reference).items():
        add("ffn_gate_inp_shexp.weight" if role == "router" else f"ffn_{role}_shexp.weight", values)
    latent = latent_of(reference)
    if latent is not None:
        add("ffn_latent_down.weight", latent[0])
        add("ffn_latent_up.weight", latent[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "model",
    [model for model in MODELS if model.name in ARCHITECTURES],
    ids=lambda model: model.name,
)
def test_same_weights_in_gguf(model: Model, tmp_path):
    reference = make_reference(model, seed=9)
    config = mo.MoeConfig.from_hf(reference.config, model.layer)
    path = tmp_path / "layer.gguf"
    write(path, ARCHITECTURES[model.name], reference, config)
    with mo.GgufFile(path) as file, mo.MoeLayer.from_gguf(file, model.layer) as layer:
        compare(layer, reference)


def test_phimoe(tmp_path):
    """llama.cpp takes the softmax of the best two, where transformers has SparseMixer."""
    experts, hidden, inter, tokens = 6, 32, 24, 20
    router = normal(experts, hidden, scale=hidden**-0.5)
    gate, up, down = expert_weights(experts, hidden, inter)
    path = tmp_path / "phi.gguf"
    writer = gguf.GGUFWriter(path, "phimoe")
    for key, value in {
        "block_count": 1, "embedding_length": hidden, "feed_forward_length": inter,
        "expert_count": experts, "expert_used_count": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"phimoe.{key}", value)
    for name, values in (("ffn_gate_inp", router), ("ffn_gate_exps", gate), ("ffn_up_exps", up),
                         ("ffn_down_exps", down)):  # fmt: skip
        writer.add_tensor(f"blk.0.{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    x = normal(tokens, hidden, seed=9)
    odds = np.exp(x.astype(np.float64) @ router.T)
    best = np.argsort(-odds, axis=1)[:, :2]
    weights = np.take_along_axis(odds, best, 1)
    weights /= weights.sum(1, keepdims=True)
    want = moe_f64(x, best, weights, gate, up, down)
    with mo.GgufFile(path) as file, mo.MoeLayer.from_gguf(file, 0) as layer:
        assert rel_l2(layer(x, precision="exact"), want) < 1e-5

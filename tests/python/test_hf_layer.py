"""MoeLayer.from_safetensors: every tensor of a block finds its place, or an error names it."""

import itertools

import numpy as np
import pytest
from files import write_checkpoint
from oracle import rel_l2
from values import expert_weights, normal

import moesaic as mo

E, H, I, S, TOP_K, LAYER = 6, 64, 32, 48, 2, 1
BLOCK = f"model.layers.{LAYER}.mlp"
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": H, "n_routed_experts": E,
    "num_experts_per_tok": TOP_K, "moe_intermediate_size": I, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.0,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "hidden_act": "silu",
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2_moe", "hidden_size": H, "num_experts": E, "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": I, "shared_expert_intermediate_size": S, "norm_topk_prob": False,
    "num_hidden_layers": 2, "hidden_act": "silu",
}  # fmt: skip


class Checkpoint:
    """The tensors and configuration of one layer."""

    def __init__(self, config, seed=0):
        seeds = itertools.count(100 * seed)

        def matrix(*shape):
            return normal(*shape, seed=next(seeds), scale=shape[-1] ** -0.5)

        self.config = dict(config)
        qwen = config["model_type"] == "qwen2_moe"
        self.width = S if qwen else I
        self.shared_name = "shared_expert" if qwen else "shared_experts"
        self.gate, self.up, self.down = expert_weights(E, H, I, seed=seed)
        self.shared = {
            "gate": matrix(self.width, H),
            "up": matrix(self.width, H),
            "down": matrix(H, self.width),
        }
        self.router = matrix(E, H) * 2
        self.tensors = {f"{BLOCK}.gate.weight": self.router}
        for role, weights in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            for e in range(E):
                self.tensors[f"{BLOCK}.experts.{e}.{role}_proj.weight"] = weights[e]
            self.tensors[f"{BLOCK}.{self.shared_name}.{role}_proj.weight"] = self.shared[role]
        self.shared_gate, self.bias = None, []
        if qwen:
            self.shared_gate = matrix(1, H)
            self.tensors[f"{BLOCK}.shared_expert_gate.weight"] = self.shared_gate
        else:
            bias = normal(E, seed=next(seeds), scale=0.1)
            self.tensors[f"{BLOCK}.gate.e_score_correction_bias"] = bias
            self.bias = bias.tolist()
        # Other layers and other parts of the layer are no concern of the loader.
        self.tensors["model.layers.0.mlp.gate_proj.weight"] = matrix(8, H)
        self.tensors[f"model.layers.{LAYER}.input_layernorm.weight"] = matrix(H)

    def write(self, folder, types=None):
        return write_checkpoint(folder, self.tensors, self.config, types)

    def from_parts(self):
        config = mo.MoeConfig.from_hf(self.config, LAYER)
        config = config.replace(router=config.router.replace(selection_bias=self.bias))
        stack = mo.ExpertStack.from_dense_stacks(self.gate, self.up, self.down)
        shared = mo.ExpertStack.from_dense_stacks(*(w[None] for w in self.shared.values()))
        gate = None if self.shared_gate is None else self.shared_gate[0]
        return mo.MoeLayer(stack, config, self.router, shared=shared, shared_gate=gate)


@pytest.mark.parametrize("config", [DEEPSEEK, QWEN2], ids=lambda c: c["model_type"])
def test_whole_layer(tmp_path, config):
    checkpoint, seen = Checkpoint(config), []
    layer = mo.MoeLayer.from_safetensors(checkpoint.write(tmp_path), LAYER, progress=seen.append)
    want = checkpoint.from_parts()
    assert layer.config == want.config and layer.config.layer == LAYER
    np.testing.assert_array_equal(layer.router_weight, checkpoint.router)
    x = normal(9, H)
    np.testing.assert_array_equal(layer(x), want(x))
    assert layer.memory()["shared"] > 0
    assert any("shared" in p.what for p in seen)
    with pytest.raises(mo.OperationCancelled):
        mo.MoeLayer.from_safetensors(tmp_path, LAYER, progress=lambda p: False)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("said", [True, False, None])
def test_a_bias_that_the_configuration_switches_off(tmp_path, said, stored):
    """LFM2 selects without a bias where use_expert_bias is false, and a stored one is an error."""
    checkpoint = Checkpoint(DEEPSEEK)
    config = {
        "model_type": "lfm2_moe", "hidden_size": H, "num_experts": E, "num_dense_layers": 0,
        "num_experts_per_tok": TOP_K, "moe_intermediate_size": I, "num_hidden_layers": 2,
    }  # fmt: skip
    config |= {} if said is None else {"use_expert_bias": said}
    bias = checkpoint.tensors.pop(f"{BLOCK}.gate.e_score_correction_bias")
    tensors = {n: t for n, t in checkpoint.tensors.items() if "shared" not in n}
    if stored:
        tensors[f"{BLOCK}.expert_bias"] = bias
    write_checkpoint(tmp_path, tensors, config)
    if said is False and stored:
        with pytest.raises(mo.UnsupportedError, match="expert_bias"):
            mo.MoeLayer.from_safetensors(tmp_path, LAYER)
        return
    with mo.MoeLayer.from_safetensors(tmp_path, LAYER) as layer:
        got = layer.config.router.selection_bias
    np.testing.assert_array_equal(np.float32(got), bias if stored else [])


def test_dense_shared_beside_quantised_experts(tmp_path):
    """FP8 experts and a shared expert in floats, as some checkpoints mix them."""
    checkpoint = Checkpoint(DEEPSEEK)
    rng, values = np.random.default_rng(3), {}
    for name in [n for n in checkpoint.tensors if ".experts." in n]:
        codes = rng.integers(0x20, 0x40, checkpoint.tensors[name].shape).astype(np.uint8)
        checkpoint.tensors[name] = codes
        checkpoint.tensors[f"{name}_scale_inv"] = np.full((1, 1), 2.0**-6, np.float32)
        values[name] = np.ldexp(1 + (codes & 7) / 8, (codes >> 3).astype(int) - 7 - 6)
    folder = checkpoint.write(tmp_path, dict.fromkeys(values, "F8_E4M3"))
    layer = mo.MoeLayer.from_safetensors(folder, LAYER)
    for role in ("gate", "up", "down"):
        for e in range(E):
            want = values[f"{BLOCK}.experts.{e}.{role}_proj.weight"]
            np.testing.assert_array_equal(layer.stack.dequantize(role, e), want)
            getattr(checkpoint, role)[e] = want
    x = normal(4, H)
    got, want = (f(x, precision="exact") for f in (layer, checkpoint.from_parts()))
    assert rel_l2(got, want) < 1e-6


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate.weight", None),
        ("gate.weight", lambda t: t[:-1]),
        ("gate.weight", lambda t: t.T),
        ("gate.weight", lambda t: t.astype(np.int32)),
        ("gate.e_score_correction_bias", None),
        ("gate.e_score_correction_bias", lambda t: t[:-1]),
        ("shared_experts.up_proj", None),
        ("shared_experts.up_proj.weight", lambda t: t[:-1]),
        ("shared_experts.down_proj.weight", lambda t: t[:, :-1]),
        ("experts.3.up_proj.weight", None),
        ("experts.3.down_proj.weight", lambda t: t[:-1]),
    ],
)
def test_bad_tensor_is_named(tmp_path, name, change):
    checkpoint = Checkpoint(DEEPSEEK)
    full = f"{BLOCK}.{name}"
    if change is None:
        for found in [n for n in checkpoint.tensors if n.startswith(full)]:
            del checkpoint.tensors[found]
    else:
        checkpoint.tensors[full] = change(checkpoint.tensors[full])
    part = name.removesuffix(".weight").rpartition(".")[0] or name
    with pytest.raises(mo.FormatError, match=part.replace(".", r"\.")):
        mo.MoeLayer.from_safetensors(checkpoint.write(tmp_path), LAYER)


def test_shared_gate_is_required(tmp_path):
    checkpoint = Checkpoint(QWEN2)
    del checkpoint.tensors[f"{BLOCK}.shared_expert_gate.weight"]
    with pytest.raises(mo.FormatError, match="shared_expert_gate"):
        mo.MoeLayer.from_safetensors(checkpoint.write(tmp_path), LAYER)


@pytest.mark.parametrize("name", ["gate.bias", "adapter.weight", "experts.0.up_proj.lora_a"])
def test_nothing_is_left_out(tmp_path, name):
    checkpoint = Checkpoint(QWEN2)
    checkpoint.tensors[f"{BLOCK}.{name}"] = np.zeros(E, np.float32)
    with pytest.raises(mo.UnsupportedError, match=name.replace(".", r"\.")):
        mo.MoeLayer.from_safetensors(checkpoint.write(tmp_path), LAYER)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": H + 1}, "experts|gate"),
        ({"moe_intermediate_size": I + 8}, "config.json says"),
        ({"n_routed_experts": E + 1}, "experts"),
        ({"n_routed_experts": E - 1}, "experts"),
        ({"n_shared_experts": 2}, "shared_experts"),
    ],
)
def test_config_disagrees(tmp_path, change, match):
    checkpoint = Checkpoint(DEEPSEEK)
    checkpoint.config |= change
    with pytest.raises(mo.FormatError, match=match):
        mo.MoeLayer.from_safetensors(checkpoint.write(tmp_path), LAYER)


def test_shared_experts_that_no_key_announces(tmp_path):
    checkpoint = Checkpoint(DEEPSEEK)
    checkpoint.config["n_shared_experts"] = 0
    with pytest.raises(mo.UnsupportedError, match="shared_experts"):
        mo.MoeLayer.from_safetensors(checkpoint.write(tmp_path), LAYER)


def test_dense_layer_and_no_config(tmp_path):
    folder = Checkpoint(DEEPSEEK).write(tmp_path)
    with pytest.raises(mo.ShapeError, match="layer 0"):
        mo.MoeLayer.from_safetensors(folder, 0)
    (folder / "config.json").unlink()
    with pytest.raises(mo.FormatError, match=r"config\.json"):
        mo.MoeLayer.from_safetensors(folder, LAYER)

"""Layers of small GGUF files: every tensor of a block counts, is named, or is known as harmless."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import moe_f64, rel_l2, silu

import moesaic as mo
from moesaic.cli import main

gguf = pytest.importorskip("gguf")

H, I, E, K, S = 32, 32, 4, 2, 32
BOUND = 1e-5


@dataclass
class Model:
    """Keys and tensors of a file of one block; ``path`` writes it."""

    architecture: str = "qwen3moe"
    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def small(architecture: str = "qwen3moe", *, shared: bool = False, **keys: Any) -> "Model":
        rng = np.random.default_rng(5)

        def matrix(*shape):
            return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

        sizes = {
            "block_count": 1, "embedding_length": H, "feed_forward_length": I, "expert_count": E,
            "expert_used_count": K, "expert_feed_forward_length": I,
        }  # fmt: skip
        tensors = {
            "ffn_gate_inp.weight": 2 * matrix(E, H), "ffn_gate_exps.weight": matrix(E, I, H),
            "ffn_up_exps.weight": matrix(E, I, H), "ffn_down_exps.weight": matrix(E, H, I),
        }  # fmt: skip
        if shared:
            tensors |= {
                "ffn_gate_shexp.weight": matrix(S, H), "ffn_up_shexp.weight": matrix(S, H),
                "ffn_down_shexp.weight": matrix(H, S),
            }  # fmt: skip
        return Model(architecture, {**sizes, **keys}, tensors)

    def path(self, folder: Path) -> Path:
        to = folder / "m.gguf"
        writer = gguf.GGUFWriter(to, self.architecture)
        for key, value in self.keys.items():
            if value is None:
                continue
            name = f"{self.architecture}.{key}"
            if isinstance(value, bool):
                writer.add_bool(name, value)
            elif isinstance(value, float):
                writer.add_float32(name, value)
            elif isinstance(value, list):
                writer.add_array(name, value)
            else:
                writer.add_uint32(name, value)
        for name, array in self.tensors.items():
            writer.add_tensor(name if name.startswith("blk.") else f"blk.0.{name}", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return to

    def run(self, folder: Path, **options: Any) -> np.ndarray:
        return mo.MoeLayer.from_gguf(
            mo.GgufFile(self.path(folder)), 0, precision="exact", **options
        )(X)

    def want(self, *, renormalize: bool = True, top_k: int = K, **factors: Any) -> np.ndarray:
        """Softmax routing in f64; factors by role: gate, up and down [E], sgate, sup and sdown."""
        t = {k: v.astype(np.float64) for k, v in self.tensors.items()}
        logits = X @ t["ffn_gate_inp.weight"].reshape(-1, H).T
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        ids = np.argsort(-p, 1)[:, :top_k]
        w = np.take_along_axis(p, ids, 1)
        if renormalize:
            w /= w.sum(1, keepdims=True)

        def role(name):
            matrix = t[f"ffn_{name}_exps.weight"].reshape(-1, H, H)
            return matrix * np.reshape(factors.get(name, 1.0), (-1, 1, 1))

        y = moe_f64(X, ids, w, role("gate"), role("up"), role("down"))
        if "ffn_up_shexp.weight" in t:
            g, u, d = (
                t[f"ffn_{name}_shexp.weight"].reshape(-1, H) * factors.get("s" + name, 1.0)
                for name in ("gate", "up", "down")
            )
            y += (silu(X @ g.T) * (X @ u.T)) @ d.T
        return y


X = np.random.default_rng(1).standard_normal((3, H)).astype(np.float32)
FACTORS = np.linspace(0.5, 2, E).astype(np.float32)


def one(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def split_experts(model: Model) -> None:
    for role in ("gate", "up", "down"):
        for e, matrix in enumerate(model.tensors.pop(f"ffn_{role}_exps.weight")):
            model.tensors[f"ffn_{role}.{e}.weight"] = matrix


def fuse(model: Model) -> None:
    gate, up = (model.tensors.pop(f"ffn_{role}_exps.weight") for role in ("gate", "up"))
    model.tensors["ffn_gate_up_exps.weight"] = np.concatenate([gate, up], 1)


SCALES: dict[str, tuple[Model, Callable[[Model], None], dict[str, np.ndarray], dict[str, Any]]] = {
    "shared experts": (
        Model.small("deepseek2", shared=True, expert_shared_count=1),
        lambda model: None,
        {f"ffn_{r}_shexp.scale": one(v) for r, v in (("gate", 0.5), ("up", 2), ("down", 0.75))},
        {"renormalize": False, "sgate": 0.5, "sup": 2.0, "sdown": 0.75},
    ),
    "fused": (
        Model.small(),
        fuse,
        {"ffn_gate_up_exps.scale": FACTORS},
        {"gate": FACTORS, "up": FACTORS},
    ),
    "fused, named after up": (
        Model.small(),
        fuse,
        {"ffn_up_exps.scale": FACTORS},
        {"gate": FACTORS, "up": FACTORS},
    ),
    "one per expert": (
        Model.small("llama"),
        split_experts,
        {f"ffn_{r}.{e}.scale": one(FACTORS[e]) for r in ("gate", "up", "down") for e in range(E)},
        {"gate": FACTORS, "up": FACTORS, "down": FACTORS},
    ),
    "harmless": (
        Model.small(),
        lambda model: None,
        {
            "ffn_gate_exps.input_scale": FACTORS,
            "ffn_gate_inp.input_scale": one(3),
            "attn_q.x": X,
            "ffn_res_score.weight": X,
        },
        {},
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_count(tmp_path, name):
    model, change, scales, factors = SCALES[name]
    want = model.want(**factors)
    changed = Model(model.architecture, dict(model.keys), dict(model.tensors))
    change(changed)
    changed.tensors |= scales
    assert rel_l2(changed.run(tmp_path), want) < BOUND


def test_scales_of_latent_projections_count(tmp_path):
    latent = 32
    model = Model.small("nemotron_h_moe", moe_latent_size=latent)
    rng = np.random.default_rng(2)
    del model.tensors["ffn_gate_exps.weight"]
    model.tensors |= {
        "exp_probs_b.bias": np.zeros(E, np.float32),
        "ffn_latent_down.weight": rng.standard_normal((latent, H)).astype(np.float32),
        "ffn_latent_up.weight": rng.standard_normal((H, latent)).astype(np.float32),
    }
    plain = model.run(tmp_path)
    model.tensors |= {"ffn_latent_down.scale": one(0.5), "ffn_latent_up.scale": one(0.25)}
    # The experts are relu squared, so a factor of their input comes out squared.
    assert rel_l2(model.run(tmp_path), plain * 0.25 * 0.25) < BOUND


UNUSED = [
    "exp_probs_b.weight", "ffn_exp_probs_b.bias", "ffn_gate_inp.e_score_correction_bias",
    "expert_bias", "router.weight", "gate.bias", "mlp.gate.weight",
    "ffn_gate_shexp.bias", "ffn_gate_inp_shexp.bias", "ffn_up_shexp.weight_scale",
    "ffn_norm_exps.weight", "pre_ffw_norm_2.weight", "post_ffw_norm_1.weight",
    "ffn_gate_exps.weight_scale", "ffn_gate_up_exps.bias", "ffn_gate_up_exps.scale",
    "ffn_gate_up_exps.weight", "ffn_up_chexps.weight", "ffn_gate_exps.weight.lora_a",
    "ffn_gate_inp.weight.lora_b", "ffn_up.3.weight", "ffn_up.3.scale", "ffn_up.weight",
    "ffn_latent_down.scale", "ffn_gate_inp.scale", "exp_probs_b_vl.bias",
]  # fmt: skip


@pytest.mark.parametrize("architecture", ["qwen3moe", "deepseek2"])
@pytest.mark.parametrize("name", UNUSED)
def test_unused_tensors_are_named(tmp_path, architecture, name):
    model = Model.small(architecture)
    array = np.ones((E, 2 * I, H), np.float32) if name == "ffn_gate_up_exps.weight" else X
    model.tensors[name] = array
    # Where gate and up are stored twice, the fused form is used.
    unused = "ffn_gate_exps.weight" if name == "ffn_gate_up_exps.weight" else name
    with pytest.raises(mo.FormatError, match=rf"blk\.0\.{unused}"):
        model.run(tmp_path)


def test_stacks_name_unused_tensors_of_experts(tmp_path):
    model = Model.small()
    model.tensors["ffn_down_exps.weight_scale"] = FACTORS
    with pytest.raises(mo.FormatError, match=r"ffn_down_exps\.weight_scale"):
        mo.ExpertStack.load_from_gguf(mo.GgufFile(model.path(tmp_path)), 0)


def test_dequantize_applies_the_scale(tmp_path):
    model = Model.small()
    model.tensors["ffn_down_exps.scale"] = FACTORS
    file = mo.GgufFile(model.path(tmp_path))
    for options in ({}, {"layout": "file"}, {"dequantize": "f32"}):
        stack = mo.ExpertStack.load_from_gguf(file, 0, **options)
        for e in range(E):
            want = model.tensors["ffn_down_exps.weight"][e] * FACTORS[e]
            np.testing.assert_array_equal(stack.dequantize("down", e), want)
            np.testing.assert_array_equal(
                stack.dequantize("up", e), model.tensors["ffn_up_exps.weight"][e]
            )


def test_roles_of_a_store_show_the_scale_beside_the_stored_bytes(tmp_path):
    model = Model.small()
    model.tensors["ffn_down_exps.scale"] = FACTORS
    (layer,) = mo.MoeExpertStore.from_gguf(mo.GgufFile(model.path(tmp_path))).layers
    np.testing.assert_array_equal(layer.down.scale, FACTORS)
    assert layer.gate.scale is None and layer.up.scale is None
    np.testing.assert_array_equal(
        layer.down.expert_slice(1).T, model.tensors["ffn_down_exps.weight"][1]
    )


def test_cohere2_takes_the_mean_of_routed_and_shared_experts(tmp_path):
    model = Model.small("cohere2moe", shared=True, expert_gating_func=1, expert_weights_norm=True)
    file = mo.GgufFile(model.path(tmp_path))
    layer = mo.MoeLayer.from_gguf(file, 0, precision="exact")
    want = model.want() / 2
    assert rel_l2(layer(X), want) < BOUND
    _, routing = layer(X, return_routing=True)
    assert rel_l2(mo.moe_forward_cpu(X, routing, layer), want) < BOUND
    parts = {k: v[None] for k, v in model.tensors.items()}
    shared = mo.ExpertStack.from_dense_stacks(
        *(parts[f"ffn_{r}_shexp.weight"] for r in ("gate", "up", "down"))
    )
    again = mo.MoeLayer(
        layer.stack, layer.config, model.tensors["ffn_gate_inp.weight"], shared=shared,
        precision="exact",
    )  # fmt: skip
    assert rel_l2(again(X), want) < BOUND
    del model.tensors["ffn_gate_shexp.weight"], model.tensors["ffn_down_shexp.weight"]
    del model.tensors["ffn_up_shexp.weight"]
    assert rel_l2(model.run(tmp_path), model.want()) < BOUND


KEYS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("deepseek2", {"expert_gating_func": 0}, {"score": "softmax"}),
    ("deepseek2", {"expert_weights_scale": 0.0}, {"scale": 1.0}),
    ("mimo2", {"expert_weights_scale": 2.5}, {"scale": 2.5}),
    ("mimo2", {}, {"scale": 1.0}),
    ("mellum", {}, {"renormalize": True, "score": "softmax"}),
    ("mellum", {"expert_weights_norm": False}, {"renormalize": False}),
    ("mellum", {"expert_gating_func": 2}, {"score": "sigmoid"}),
    ("maple", {}, {"limit": 7.0}),
    ("maple", {"swiglu_clamp_exp": 5.0}, {"limit": 5.0}),
    ("maple", {"swiglu_clamp_exp": 0.0}, {"limit": None}),
]


@pytest.mark.parametrize(("architecture", "keys", "want"), KEYS)
def test_what_keys_mean(tmp_path, architecture, keys, want):
    file = mo.GgufFile(Model.small(architecture, **keys).path(tmp_path))
    config = mo.MoeConfig.from_gguf(file, 0)
    clamped = config.activation.kind == "swiglu_clamp_input"
    got = {
        "score": config.router.score, "scale": config.router.scale,
        "limit": config.activation.limit if clamped else None,
        "renormalize": config.router.renormalize,
    }  # fmt: skip
    assert {key: got[key] for key in want} == want


CLAMPS: list[tuple[str, dict[str, Any], float | None]] = [
    ("glm5-next", {"swiglu_clamp_exp": 4.0}, 4.0),
    ("glm5-next", {"swiglu_clamp_exp": 4.0, "swiglu_clamp_shexp": 3.0}, 3.0),
    ("glm5-next", {"swiglu_clamp_exp": 4.0, "swiglu_clamp_shexp": 0.0}, None),
    ("step35", {"swiglu_clamp_exp": 4.0}, None),
    ("bailingmoe3", {"swiglu_clamp_exp": 4.0}, None),
]


@pytest.mark.parametrize(("architecture", "keys", "limit"), CLAMPS)
def test_clamps_of_shared_experts(tmp_path, architecture, keys, limit):
    """Also, bailingmoe3 stores the width of all shared experts together."""
    model = Model.small(
        architecture, shared=True, expert_gating_func=2, expert_shared_feed_forward_length=S,
        expert_shared_count=1 if architecture == "glm5-next" else 2, **keys,
    )  # fmt: skip
    model.tensors["exp_probs_b.bias"] = np.zeros(E, np.float32)
    config = mo.MoeConfig.from_gguf(mo.GgufFile(model.path(tmp_path)), 0)
    assert (config.activation.limit, config.shared_intermediate_size) == (4.0, S)
    shared = config.shared_activation
    assert (shared.limit if shared.kind != "swiglu" else None) == limit


@pytest.mark.parametrize("key", ["expert_weights_norm", "expert_weights_scale"])
def test_laguna_requires_its_keys(tmp_path, key):
    keys = {"expert_weights_norm": True, "expert_weights_scale": 2.5, key: None}
    model = Model.small("laguna", **keys)
    model.tensors["exp_probs_b.bias"] = np.zeros(E, np.float32)
    with pytest.raises(mo.FormatError, match=rf"laguna\.{key}"):
        mo.MoeConfig.from_gguf(mo.GgufFile(model.path(tmp_path)), 0)


def test_a_required_score_of_zero_is_none(tmp_path):
    file = mo.GgufFile(Model.small("dots1", expert_gating_func=0).path(tmp_path))
    with pytest.raises(mo.FormatError, match=r"dots1\.expert_gating_func: expected 1 to 4, got 0"):
        mo.MoeConfig.from_gguf(file, 0)


@pytest.mark.parametrize(
    "architecture",
    ["qwen3moe", "qwen3vlmoe", "rnd1", "mellum", "smallthinker", "glm4moe", "hy_v3", "llada-moe"],
)
def test_width_without_its_key(tmp_path, architecture):
    model = Model.small(
        architecture, expert_feed_forward_length=None, feed_forward_length=K * I,
        expert_gating_func=2,
    )  # fmt: skip
    if architecture == "glm4moe":
        model.tensors["exp_probs_b.bias"] = np.zeros(E, np.float32)
    file = mo.GgufFile(model.path(tmp_path))
    assert mo.MoeConfig.from_gguf(file, 0).intermediate_size == I


SHAPES: list[tuple[str, dict[str, tuple[int, ...]]]] = [
    ("ones outside", {"ffn_gate_inp.weight": (1, E, H), "ffn_up_exps.weight": (1, E, I, H)}),
    ("shared", {f"ffn_{r}_shexp.weight": (1, 1, H, H) for r in ("gate", "up", "down")}),
]


@pytest.mark.parametrize(("name", "shapes"), SHAPES)
def test_outer_ones_do_not_count(tmp_path, name, shapes):
    model = Model.small("deepseek2", shared=True, expert_weights_norm=True)
    want = model.want()
    for tensor, shape in shapes.items():
        model.tensors[tensor] = model.tensors[tensor].reshape(shape)
    assert rel_l2(model.run(tmp_path), want) < BOUND


def test_one_expert_without_its_dimension(tmp_path):
    model = Model.small("qwen3moe", expert_count=1, expert_used_count=1)
    for name in list(model.tensors):
        model.tensors[name] = model.tensors[name][0]
    assert rel_l2(model.run(tmp_path), model.want(top_k=1)) < BOUND
    model.tensors["ffn_gate_inp.weight"] = model.tensors["ffn_gate_inp.weight"][:, None]
    with pytest.raises(
        mo.FormatError, match=r"ffn_gate_inp\.weight: expected \[1, 32\], got \[32, 1\]"
    ):
        model.run(tmp_path)


SPELLINGS = {
    "cohere2_moe": "cohere2moe", "gptoss": "gpt-oss", "glm5next": "glm5-next",
    "Qwen3MoE": "qwen3moe", "dflash-draft": "dflash", "deepseek_v3": "deepseek2",
}  # fmt: skip


@pytest.mark.parametrize(("spelling", "known"), SPELLINGS.items())
def test_spellings(tmp_path, spelling, known):
    model = Model.small(
        spelling, expert_gating_func=2, expert_weights_norm=True, expert_weights_scale=1.5
    )
    if known == "gpt-oss":
        model.tensors["ffn_gate_inp.bias"] = np.zeros(E, np.float32)
    if known in ("glm5-next", "dflash"):
        model.tensors["exp_probs_b.bias"] = np.zeros(E, np.float32)
    if known == "dflash":
        model.keys["swiglu_clamp_exp"] = 10.0
    file = mo.GgufFile(model.path(tmp_path))
    assert mo.MoeLayer.from_gguf(file, 0).config.architecture == known


@pytest.mark.parametrize(
    ("unknown", "near"), [("qwen5moe", "qwen3moe"), ("deepseek5", "deepseek4")]
)
def test_unknown_architectures_name_near_ones(tmp_path, unknown, near):
    file = mo.GgufFile(Model.small(unknown).path(tmp_path))
    with pytest.raises(
        mo.UnsupportedError, match=rf"expected perhaps .*{near}.*; one of .*config="
    ):
        mo.MoeConfig.from_gguf(file, 0)


def test_a_config_of_ones_own(tmp_path):
    model = Model.small("neverseen", shared=True)
    file = mo.GgufFile(model.path(tmp_path))
    config = mo.MoeConfig(H, I, E, K, shared="plain", shared_intermediate_size=S)
    layer = mo.MoeLayer.from_gguf(file, 0, config=config, precision="exact")
    assert rel_l2(layer(X), model.want()) < BOUND
    for k in (1, 3):
        got = mo.MoeLayer.from_gguf(file, 0, config=config, top_k=k, precision="exact")
        assert rel_l2(got(X), model.want(top_k=k)) < BOUND
    with pytest.raises(mo.ConfigError, match="top_k"):
        mo.MoeLayer.from_gguf(file, 0, config=config, top_k=E + 1)
    with pytest.raises(mo.FormatError, match="shexp"):
        mo.MoeLayer.from_gguf(file, 0, config=mo.MoeConfig(H, I, E, K))


def test_top_k_of_a_known_architecture(tmp_path):
    model = Model.small()
    assert rel_l2(model.run(tmp_path, top_k=1), model.want(top_k=1)) < BOUND


def test_biases_of_a_config_are_those_of_the_file(tmp_path):
    model = Model.small("deepseek2")
    bias = np.arange(E, dtype=np.float32)
    model.tensors["exp_probs_b.bias"] = bias
    file = mo.GgufFile(model.path(tmp_path))
    own = mo.MoeConfig.from_gguf(file, 0)
    layer = mo.MoeLayer.from_gguf(file, 0, config=own.replace(router=own.router.replace(scale=2.0)))
    assert list(layer.config.router.selection_bias) == bias.tolist()
    other = own.router.replace(selection_bias=(bias + 1).tolist())
    with pytest.raises(mo.ConfigError, match=r"selection_bias.*exp_probs_b\.bias"):
        mo.MoeLayer.from_gguf(file, 0, config=own.replace(router=other))


def with_type(path: Path, name: str, type_id: int) -> None:
    """Change the type of a tensor in the head of the file."""
    data = bytearray(path.read_bytes())
    at = data.index(name.encode()) + len(name)
    rank = int.from_bytes(data[at : at + 4], "little")
    at += 4 + 8 * rank
    data[at : at + 4] = type_id.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"])
def test_unknown_types_fail_when_they_are_read(tmp_path, name):
    model = Model.small("qwen3moe", block_count=2)
    second = {f"blk.1.{k}": v for k, v in model.tensors.items()}
    model.tensors |= second  # the down experts are the last tensor of the file
    path = model.path(tmp_path)
    with_type(path, name, 144)
    for mmap in (True, False):
        file = mo.GgufFile(path, mmap=mmap)
        tensor = file.tensors[name]
        assert tensor.quant == "type 144" and "type 144" in repr(tensor)
        assert tensor.nbytes == 4 * E * I * H
        with pytest.raises(mo.UnsupportedError, match=r"144: ik_llama\.cpp private type IQ4_KS"):
            tensor.data  # noqa: B018
        layer = mo.MoeLayer.from_gguf(file, 0, precision="exact")
        assert rel_l2(layer(X), model.want()) < BOUND
        with pytest.raises(mo.UnsupportedError, match=name):
            mo.MoeLayer.from_gguf(file, 1)
    assert main(["gguf", str(path)]) == 0


def test_blocks_behind_the_trunk(tmp_path):
    """Per-layer arrays of trunk length, and experts at full width where projections are missing."""
    latent = 64
    model = Model.small(
        "nemotron_h_moe", block_count=2, nextn_predict_layers=1, moe_latent_size=latent,
        expert_used_count=[K], expert_feed_forward_length=[I], expert_count=[E],
    )  # fmt: skip
    del model.tensors["ffn_gate_exps.weight"]
    model.tensors["exp_probs_b.bias"] = np.zeros(E, np.float32)
    model.tensors = {f"blk.1.{name}": array for name, array in model.tensors.items()}
    file = mo.GgufFile(model.path(tmp_path))
    config = mo.MoeLayer.from_gguf(file, 1).config
    sizes = (config.latent_size, config.top_k, config.num_experts, config.intermediate_size)
    assert sizes == (0, K, E, I)


def test_a_disk_store_reads_what_the_file_opened(tmp_path, monkeypatch):
    path = Model.small().path(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = mo.GgufFile("m.gguf")
    want = mo.MoeLayer.from_gguf(file, 0, precision="exact")(X)
    other = tmp_path / "other.gguf"
    other.write_bytes(bytes(len(path.read_bytes())))
    other.replace(path)
    monkeypatch.chdir("/")
    store = mo.MoeExpertStore.from_gguf(file, memory_limit=1 << 20)
    layer = mo.MoeLayer.from_store(store, 0, mo.ExpertPool(E, 1), "stage", precision="exact")
    assert rel_l2(layer(X), want) < BOUND
    path.unlink()
    assert rel_l2(layer(X), want) < BOUND


def test_text_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path / "m") + b"\xff\xe9.gguf"
    Path(os.fsdecode(path)).write_bytes(Model.small().path(tmp_path).read_bytes())
    file = mo.GgufFile(os.fsdecode(path))
    assert file.path == os.fsdecode(path) and file.shard_paths == [file.path]
    assert "\udcff" in repr(file)
    for missing in (file.path + "no", str(tmp_path)):
        with pytest.raises(OSError) as caught:
            mo.GgufFile(missing)
        assert caught.value.filename == missing
    for key in ("\udcff", "\ud800", 3, None):
        assert key not in file.metadata and key not in file.tensors
        assert file.metadata.get(key, "d") == file.tensors.get(key, "d") == "d"
        with pytest.raises(KeyError):
            file.metadata[key]
    for command in ("gguf", "explain"):
        done = subprocess.run(
            [sys.executable, "-m", "moesaic", command, path], capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
    data = (
        Path(file.path)
        .read_bytes()
        .replace(b"\x08\0\0\0\0\0\0\0qwen3moe", b"\x08\0\0\0\0\0\0\0qwen3mo\xff")
    )
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(mo.UnsupportedError, match=r"qwen3mo\\xff"):
        mo.MoeConfig.from_gguf(mo.GgufFile(tmp_path / "bad.gguf"), 0)


def latent_file() -> Model:
    model = Model.small("nemotron_h_moe", moe_latent_size=16)
    rng = np.random.default_rng(2)
    for name, shape in {
        "ffn_up_exps.weight": (E, I, 16), "ffn_down_exps.weight": (E, 16, I),
        "exp_probs_b.bias": (E,), "ffn_latent_down.weight": (16, H),
        "ffn_latent_up.weight": (H, 16),
    }.items():  # fmt: skip
        model.tensors[name] = rng.standard_normal(shape).astype(np.float32)
    del model.tensors["ffn_gate_exps.weight"]
    return model


def hashed_file() -> Model:
    model = Model.small(
        "deepseek4", expert_gating_func=4, expert_weights_norm=True, expert_weights_scale=1.5,
        hash_layer_count=1,
    )  # fmt: skip
    model.tensors["ffn_gate_tid2eid.weight"] = np.arange(20, dtype=np.int32).reshape(10, 2) % E
    return model


def counts_file() -> Model:
    model = Model.small("qwen3moe", block_count=2, expert_count=[E, 2])
    model.tensors |= {f"blk.1.{name}": array[:2] for name, array in model.tensors.items()}
    return model


COMMANDS = {
    "latent": latent_file,
    "router_input": lambda: Model.small("smallthinker", expert_gating_func=2),
    "hashed": hashed_file,
    "counts": counts_file,
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("command", ["gguf", "trace", "demo", "explain"])
def test_commands(tmp_path, capsys, command, name):
    options = ["--tokens", "8", "--save", str(tmp_path / "p.npz")] if command == "trace" else []
    assert main([command, str(COMMANDS[name]().path(tmp_path)), *options]) == 0
    out = capsys.readouterr().out
    if command == "gguf":
        for tensor in COMMANDS[name]().tensors:
            assert tensor.removeprefix("blk.1.") in out
    if command == "trace" and name == "counts":
        assert f"of {E} " in out and "of 2 " in out
        profile = mo.ExpertProfile.load(tmp_path / "p.npz")
        profile.warm([mo.ExpertPool(E, 1), mo.ExpertPool(2, 1)])


def test_from_store_takes_a_config_and_top_k(tmp_path):
    model = Model.small("neverseen", shared=True)
    file = mo.GgufFile(model.path(tmp_path))
    config = mo.MoeConfig(H, I, E, K, shared="plain", shared_intermediate_size=S)
    store = mo.MoeExpertStore.from_gguf(file)
    for k in (1, 3):
        for pool in (None, mo.ExpertPool(E, 2)):
            with mo.MoeLayer.from_store(store, 0, pool, config=config, top_k=k) as layer:
                assert layer.config.top_k == k
                assert rel_l2(layer(X, precision="exact"), model.want(top_k=k)) < BOUND
            store = mo.MoeExpertStore.from_gguf(file)
    with pytest.raises(mo.UnsupportedError, match="neverseen"):
        mo.MoeLayer.from_store(store, 0, top_k=1)
    with pytest.raises(mo.ConfigError, match=r"MoeLayer\.from_store.*top_k|top_k"):
        mo.MoeLayer.from_store(store, 0, config=config, top_k=E + 1)


def test_from_store_with_fewer_experts_per_token(tmp_path):
    model = Model.small()
    store = mo.MoeExpertStore.from_gguf(mo.GgufFile(model.path(tmp_path)))
    with mo.MoeLayer.from_store(store, 0, mo.ExpertPool(E, 2), "stage", top_k=1) as layer:
        assert rel_l2(layer(X, precision="exact"), model.want(top_k=1)) < BOUND

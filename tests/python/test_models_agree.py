"""A model stored as GGUF and as a Hugging Face checkpoint is one model: its MoeConfigs are equal.

For every model type that the table of GGUF architectures names, one description (``Spec``) is
written as a GGUF file and as a config.json, and both are read. What only one of the two can say
keeps the value that the other implies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import moesaic as mo
from moesaic.hf_config import find_family
from moesaic.hf_config.families import FAMILIES, Family, Key

gguf = pytest.importorskip("gguf")

H, I, E, TOP_K, LAYER, VOCAB = 64, 32, 8, 2, 1, 10
GATING = {"softmax": 1, "sigmoid": 2, "softmax_selected": 3, "sqrt_softplus": 4}
SCORING = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrt_softplus": "sqrtsoftplus"}
ACTIVATIONS = {"swiglu": "silu", "geglu_tanh": "gelu_pytorch_tanh", "relu_squared": "relu2"}
PRESETS = {row["architecture"]: row for row in mo.architecture_table()}
PAIRS = [
    (name, model_type) for name, row in PRESETS.items() for model_type in row["model_types"].split()
]


def family_of(model_type: str) -> Family:
    return find_family({"model_type": model_type})[0]


def readable(pair: tuple[str, str]) -> bool:
    return not PRESETS[pair[0]]["missing"] and not family_of(pair[1]).missing


@dataclass(frozen=True)
class Spec:
    """One layer, by the words of this library."""

    renormalize: bool
    scale: float = 1.0
    num_groups: int = 1
    groups_used: int = 1
    limit: float = 5.0
    shared: bool = True
    hashed: bool = False
    norm_eps: float = 1e-5
    latent: int = 0


def hf_config(model_type: str, spec: Spec) -> tuple[dict[str, Any], int]:
    """config.json, and the width of its shared experts together."""
    family = family_of(model_type)
    facts = family.facts
    config: dict[str, Any] = {
        "model_type": model_type, "hidden_size": H, "vocab_size": VOCAB, "num_hidden_layers": 4,
        "rms_norm_eps": spec.norm_eps, "hybrid_override_pattern": "EEEE",
        "num_hash_layers": 4 if spec.hashed else 0, "topk_method": "noaux_tc",
        "first_k_dense_replace": 0, "num_dense_layers": 0,
    }  # fmt: skip

    def put(field: Key | None, value: Any) -> None:
        if field is not None:
            config.setdefault(field.names[0], value)

    put(family.experts, E)
    put(family.top_k, TOP_K)
    put(family.width, I)
    put(family.score, SCORING.get(facts["score"]))
    put(family.renormalize, spec.renormalize)
    put(family.scale, spec.scale)
    put(family.activation, ACTIVATIONS.get(facts["activation"]))
    put(family.limit, spec.limit)
    put(family.latent, spec.latent)
    if family.groups is not None:
        put(family.groups[0], spec.num_groups)
        put(family.groups[1], spec.groups_used)
    if "topk_method" in family.expects:
        config["topk_method"] = family.expects["topk_method"][-1]
    for field, accepted in family.expects.items():
        config.setdefault(field, accepted[0])
    if family.shared is None:
        return config, 0
    count: Any = family.shared.count
    if isinstance(count, Key):
        put(count, 2 if spec.shared else 0)
        count = config[count.names[0]]
    put(family.shared.width, I if spec.shared or isinstance(family.shared.count, Key) else 0)
    return config, count * config[family.shared.width.names[0]]


def write_gguf(
    path, architecture: str, model_type: str, spec: Spec, shared: int, values=np.ones
) -> None:
    """The keys of a converter, also those that an architecture ignores, and its tensors.

    ``values`` makes an array of a shape.
    """
    family = family_of(model_type)
    facts = family.facts
    writer = gguf.GGUFWriter(path, architecture)

    def key(name: str, value: Any) -> None:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{architecture}.{name}", value)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(f"blk.{LAYER}.{name}", values(shape).astype(np.float32))

    key("block_count", 4)
    key("embedding_length", H)
    key("expert_count", E)
    key("expert_used_count", TOP_K)
    key("expert_feed_forward_length", I)
    key("expert_gating_func", GATING[facts["score"]])
    key("expert_weights_norm", spec.renormalize)
    key("expert_weights_scale", spec.scale)
    key("expert_group_count", spec.num_groups)
    key("expert_group_used_count", spec.groups_used)
    key("swiglu_clamp_exp", spec.limit)
    key("swiglu_clamp_shexp", spec.limit)
    key("attention.layer_norm_rms_epsilon", spec.norm_eps)
    key("hash_layer_count", 4 if spec.hashed else 0)
    tensor("ffn_gate_inp.weight", E, H)
    width = spec.latent or H
    if facts["gated"]:
        tensor("ffn_gate_exps.weight", E, I, width)
    tensor("ffn_up_exps.weight", E, I, width)
    tensor("ffn_down_exps.weight", E, width, I)
    if facts["router_bias"] == "required":
        tensor("ffn_gate_inp.bias", E)
    if facts["selection_bias"] != "ignored":
        tensor("exp_probs_b.bias", E)
    if spec.hashed:
        table = np.zeros((VOCAB, TOP_K), np.int32)
        writer.add_tensor(f"blk.{LAYER}.ffn_gate_tid2eid.weight", table)
    if facts["input_norm"]:
        tensor("pre_ffw_norm_2.weight", H)
    if facts["router_input"] == "norm":
        tensor("ffn_gate_inp.scale", H)
    if spec.latent:
        key("moe_latent_size", spec.latent)
        tensor("ffn_latent_down.weight", spec.latent, H)
        tensor("ffn_latent_up.weight", H, spec.latent)
    if shared:
        key("expert_shared_feed_forward_length", shared)
        key("expert_shared_count", shared // I)
        if facts["gated"]:
            tensor("ffn_gate_shexp.weight", shared, H)
        tensor("ffn_up_shexp.weight", shared, H)
        tensor("ffn_down_shexp.weight", H, shared)
        if facts["shared"] == "sigmoid_gated":
            tensor("ffn_gate_inp_shexp.weight", H)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def specs(architecture: str, model_type: str) -> list[Spec]:
    """The values that both forms can say, one after the other."""
    family, row = family_of(model_type), PRESETS[architecture]
    facts = family.facts
    keyed = row["renormalize"].startswith("key")
    free = keyed and family.renormalize is not None
    # Where one form leaves it to a key and the other fixes it, the fixed value is the model's.
    fixed = facts["renormalize"] if keyed else row["renormalize"] == "yes"
    base = Spec(renormalize=fixed)
    if facts["activation"] == "swiglu_oai":
        base = replace(base, limit=7.0)  # no key in GGUF
    found = [base]
    if free:
        found.append(replace(base, renormalize=not fixed))
    if family.scale is not None and row["scale"] == "key":
        found.append(replace(base, scale=2.5))
    if family.groups is not None:
        found.append(replace(base, num_groups=4, groups_used=2))
    if family.shared is not None and "if stored" in row["shared"]:
        found.append(replace(base, shared=False))
    if family.latent is not None:
        found.append(replace(base, latent=16))
    if family.layers == "deepseek_v4":
        found.append(replace(base, hashed=True))
    return found


def facts_of(config: mo.MoeConfig) -> dict[str, Any]:
    """All fields but the name, which each form spells its way, and the biases (tensors)."""
    router = config.router.replace(router_bias=[], selection_bias=[])
    fields = config.replace(architecture="", router=router).to_dict()
    return {**fields, "router": router.to_dict()}


@pytest.mark.parametrize("pair", [p for p in PAIRS if readable(p)], ids="-".join)
def test_both_forms_agree(pair, tmp_path):
    architecture, model_type = pair
    for number, spec in enumerate(specs(*pair)):
        config, shared = hf_config(model_type, spec)
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, architecture, model_type, spec, shared)
        stored = mo.MoeConfig.from_gguf(mo.GgufFile(path), LAYER)
        given = mo.MoeConfig.from_hf(config, LAYER)
        assert facts_of(stored) == facts_of(given), spec
        # The description reached the configurations.
        assert stored.router.renormalize == spec.renormalize
        assert stored.router.scale == pytest.approx(spec.scale)
        assert stored.router.num_groups == spec.num_groups
        assert stored.latent_size == spec.latent
        assert stored.shared_intermediate_size == shared
        assert (stored.router.select_on == "given") == spec.hashed
        if stored.activation.kind.startswith("swiglu_clamp"):
            assert stored.activation.limit == spec.limit


def test_pairs_are_complete():
    """Every family is stored as some architecture, but for those that llama.cpp lacks."""
    paired = {model_type for _, model_type in PAIRS}
    names = [name for family in FAMILIES for name in family.model_types]
    assert paired <= set(names)
    lonely = {f.model_types[0] for f in FAMILIES if paired.isdisjoint(f.model_types)}
    assert lonely == {"longcat_flash", "jetmoe", "zaya"}
    assert sum(map(readable, PAIRS)) >= 44


def test_one_row_for_both():
    """The facts of both forms come from one row, which is what keeps later changes equal."""
    v2 = family_of("deepseek_v2").facts
    assert (v2["group_reduce"], v2["group_mask"]) == ("max", "zero")
    v3 = family_of("deepseek_v3").facts
    assert (v3["group_reduce"], v3["group_mask"]) == ("top2_sum", "minus_infinity")

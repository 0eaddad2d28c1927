"""MoeConfig.from_hf: what each family's configuration means, and what is wrong with bad ones."""

import json

import pytest

import moesaic as mo
from moesaic.hf_config.families import FAMILIES, family_table

QWEN3 = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "intermediate_size": 100, "norm_topk_prob": True,
    "hidden_act": "silu", "num_hidden_layers": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 64, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 24, "n_shared_experts": 2, "n_group": 4,
    "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu",
    "num_hidden_layers": 6, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 64, "num_local_experts": 8, "num_experts_per_tok": 4,
    "intermediate_size": 32, "hidden_act": "silu", "num_hidden_layers": 2, "swiglu_limit": 7.0,
}  # fmt: skip
V4 = {
    "model_type": "deepseek_v4", "hidden_size": 64, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "moe_intermediate_size": 24, "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_hidden_layers": 6,
    "num_hash_layers": 3, "vocab_size": 100, "hidden_act": "silu",
}  # fmt: skip


def test_qwen3():
    config = mo.MoeConfig.from_hf(QWEN3, 1)
    assert (config.hidden_size, config.intermediate_size) == (64, 24)
    assert (config.num_experts, config.top_k, config.layer) == (8, 2, 1)
    assert config.architecture == "qwen3_moe" and config.shared == "none"
    assert config.router == mo.RouterConfig(8, 2)
    assert not mo.MoeConfig.from_hf(QWEN3 | {"norm_topk_prob": False}).router.renormalize


def test_sources(tmp_path):
    """A dict, a path, a folder, an object, or the text model of something larger."""
    want = mo.MoeConfig.from_hf(QWEN3)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert mo.MoeConfig.from_hf(tmp_path / "config.json") == want
    assert mo.MoeConfig.from_hf(str(tmp_path)) == want

    class Object:
        def to_dict(self):
            return QWEN3

    assert mo.MoeConfig.from_hf(Object()) == want
    outer = {"model_type": "some_vision_model", "text_config": QWEN3, "hidden_size": 3}
    assert mo.MoeConfig.from_hf(outer) == want
    with pytest.raises(FileNotFoundError):
        mo.MoeConfig.from_hf(tmp_path / "absent.json")
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(mo.FormatError, match=r"config\.json"):
        mo.MoeConfig.from_hf(tmp_path)
    with pytest.raises(mo.DTypeError, match="config"):
        mo.MoeConfig.from_hf(3)


def test_deepseek_v3():
    config = mo.MoeConfig.from_hf(DEEPSEEK_V3, 3)
    router = config.router
    assert (router.score, router.num_groups, router.groups_used) == ("sigmoid", 4, 2)
    assert (router.group_reduce, router.group_mask) == ("top2_sum", "minus_infinity")
    assert (router.guard, router.scale) == ("add_eps", 2.5)
    assert router.guard_eps == pytest.approx(1e-20)
    assert (config.shared, config.shared_intermediate_size) == ("plain", 48)
    assert mo.MoeConfig.from_hf(DEEPSEEK_V3, 6).num_experts == 16  # drafts further tokens
    assert mo.MoeConfig.from_hf(DEEPSEEK_V3 | {"n_shared_experts": None}, 3).shared == "none"


def test_deepseek_v2_groups():
    """The best expert of a group counts, where llama.cpp adds the best two."""
    v2 = DEEPSEEK_V3 | {
        "model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False,
        "topk_method": "group_limited_greedy",
    }  # fmt: skip
    router = mo.MoeConfig.from_hf(v2, 4).router
    assert (router.num_groups, router.group_reduce, router.group_mask) == (4, "max", "zero")
    assert (router.score, router.renormalize, router.guard) == ("softmax", False, "none")
    assert mo.MoeConfig.from_hf(v2 | {"topk_method": "greedy"}, 4).router.num_groups == 1
    with pytest.raises(mo.FormatError, match="norm_topk_prob"):
        mo.MoeConfig.from_hf(v2 | {"norm_topk_prob": True}, 4)


def test_gpt_oss():
    config = mo.MoeConfig.from_hf(GPT_OSS | {"swiglu_limit": 5.0})
    assert config.router.score == "softmax_selected" and not config.router.renormalize
    assert config.activation == mo.Activation("swiglu_oai", limit=5.0, alpha=1.702)


def test_llama4():
    text = {
        "model_type": "llama4_text", "hidden_size": 64, "intermediate_size": 24,
        "intermediate_size_mlp": 100, "num_local_experts": 4, "num_experts_per_tok": 1,
        "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "hidden_act": "silu",
    }  # fmt: skip
    config = mo.MoeConfig.from_hf({"model_type": "llama4", "text_config": text}, 1)
    assert (config.router.select_on, config.router.weight_on) == ("logits", "input")
    assert (config.shared, config.shared_intermediate_size) == ("plain", 24)
    with pytest.raises(mo.ShapeError, match="dense"):
        mo.MoeConfig.from_hf(text, 2)
    assert mo.MoeConfig.from_hf(text | {"moe_layers": [2]}, 2).num_experts == 4


def test_deepseek_v4():
    hashed, scored = mo.MoeConfig.from_hf(V4, 2), mo.MoeConfig.from_hf(V4, 3)
    assert (hashed.router.select_on, hashed.vocab_size) == ("given", 100)
    assert (scored.router.select_on, scored.vocab_size) == ("scores", 0)
    assert scored.router.score == "sqrt_softplus"
    assert scored.activation == mo.Activation("swiglu_clamp_input", limit=10.0)
    by_type = V4 | {"mlp_layer_types": ["moe", "hash_moe"] * 3}
    assert mo.MoeConfig.from_hf(by_type, 1).router.select_on == "given"
    with pytest.raises(mo.FormatError, match="mlp_layer_types"):
        mo.MoeConfig.from_hf(V4 | {"mlp_layer_types": ["other"] * 6}, 1)


def test_identity_experts():
    config = mo.MoeConfig.from_hf(
        {"model_type": "longcat_flash", "hidden_size": 64, "n_routed_experts": 8, "moe_topk": 3,
         "expert_ffn_hidden_size": 24, "zero_expert_num": 4, "routed_scaling_factor": 6.0}
    )  # fmt: skip
    assert (config.num_experts, config.router.num_experts) == (8, 12)
    assert config.router.identity_experts == 4


def test_latent_experts():
    config = {
        "model_type": "nemotron_h", "hidden_size": 64, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 40, "mlp_hidden_act": "relu2",
        "hybrid_override_pattern": "ME*E", "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    found = mo.MoeConfig.from_hf(config, 1)
    assert (found.latent_size, found.shared_intermediate_size) == (16, 40)
    assert found.activation == mo.Activation("relu_squared")
    with pytest.raises(mo.ShapeError, match="dense"):
        mo.MoeConfig.from_hf(config, 2)


DENSE = {
    "step": (QWEN3 | {"decoder_sparse_step": 2}, 0, 1),
    "only": (QWEN3 | {"mlp_only_layers": [2]}, 2, 1),
    "first": (DEEPSEEK_V3, 2, 3),
    "frequency": (DEEPSEEK_V3 | {"moe_layer_freq": 2}, 3, 4),
    "types": (
        DEEPSEEK_V3 | {"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "dense"] * 3},
        3,
        2,
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_layers(case):
    config, dense, sparse = DENSE[case]
    assert mo.MoeConfig.from_hf(config, sparse).layer == sparse
    with pytest.raises(mo.ShapeError, match=f"layer {dense}"):
        mo.MoeConfig.from_hf(config, dense)


BAD = {
    "no model_type": ({"hidden_size": 3}, mo.FormatError, "model_type"),
    "unknown model_type": (
        {"model_type": "bert"},
        mo.UnsupportedError,
        "that are known, got 'bert'",
    ),
    "without experts": (QWEN3 | {"num_experts": 0}, mo.ShapeError, "experts"),
    "SparseMixer": ({"model_type": "phimoe"}, mo.UnsupportedError, "SparseMixer"),
    "no hidden_size": ({**QWEN3, "hidden_size": None}, mo.FormatError, "hidden_size"),
    "text": (QWEN3 | {"hidden_size": "64"}, mo.FormatError, "hidden_size.*'64'"),
    "true": (QWEN3 | {"num_experts_per_tok": True}, mo.FormatError, "num_experts_per_tok"),
    "negative": (QWEN3 | {"moe_intermediate_size": -1}, mo.FormatError, "moe_intermediate_size"),
    "huge": (QWEN3 | {"hidden_size": 1 << 40}, mo.FormatError, "hidden_size"),
    "top_k": (QWEN3 | {"num_experts_per_tok": 9}, mo.FormatError, "top_k"),
    "flag": (QWEN3 | {"norm_topk_prob": 1}, mo.FormatError, "norm_topk_prob"),
    "activation": (QWEN3 | {"hidden_act": "mish"}, mo.UnsupportedError, "hidden_act.*mish"),
    "gelu": (QWEN3 | {"hidden_act": "gelu"}, mo.UnsupportedError, "hidden_act"),
    "layer": (QWEN3 | {"num_hidden_layers": 0}, mo.FormatError, "num_hidden_layers"),
    "lists": (QWEN3 | {"mlp_only_layers": "1"}, mo.FormatError, "mlp_only_layers"),
    "scores": (V4 | {"scoring_func": "tanh"}, mo.FormatError, "scoring_func.*tanh"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case):
    config, error, match = BAD[case]
    with pytest.raises(error, match=match):
        mo.MoeConfig.from_hf(config)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scoring_func": "softmax"}, "scoring_func.*softmax"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 5}, "n_group"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor"),
    ],
)
def test_bad_deepseek(change, match):
    with pytest.raises(mo.FormatError, match=match):
        mo.MoeConfig.from_hf(DEEPSEEK_V3 | change, 3)


#: A field that is absent means what transformers makes of it for the type, which is never one
#: default for all; `tests/parity/test_defaults.py` compares them all with the classes.
ABSENT = {
    "scale of deepseek_v3": (DEEPSEEK_V3, "routed_scaling_factor", lambda c: c.router.scale, 2.5),
    "scale of glm4_moe": (
        DEEPSEEK_V3 | {"model_type": "glm4_moe"},
        "routed_scaling_factor",
        lambda c: c.router.scale,
        1.0,
    ),
    "norm of dots1": (
        DEEPSEEK_V3 | {"model_type": "dots1"},
        "norm_topk_prob",
        lambda c: c.router.renormalize,
        False,
    ),
    "norm of mellum": (
        QWEN3 | {"model_type": "mellum"},
        "norm_topk_prob",
        lambda c: c.router.renormalize,
        True,
    ),
    "shared of deepseek_v3": (
        DEEPSEEK_V3,
        "n_shared_experts",
        lambda c: c.shared_intermediate_size,
        24,
    ),
    "dense of deepseek_v3": (DEEPSEEK_V3, "first_k_dense_replace", lambda c: c.layer, 3),
    "top_k of qwen3_moe": (QWEN3, "num_experts_per_tok", lambda c: c.top_k, 8),
}


@pytest.mark.parametrize("case", ABSENT)
def test_absent_fields(case):
    config, field, read, want = ABSENT[case]
    without = {name: value for name, value in config.items() if name != field}
    assert read(mo.MoeConfig.from_hf(without, 3)) == want


NO_MEANING = {
    "no default": (DEEPSEEK_V3 | {"model_type": "dots1"}, "n_shared_experts"),
    "remote code": (DEEPSEEK_V3 | {"model_type": "kimi_k2"}, "routed_scaling_factor"),
}


@pytest.mark.parametrize("case", NO_MEANING)
def test_absence_without_meaning(case):
    config, field = NO_MEANING[case]
    without = {name: value for name, value in config.items() if name != field}
    with pytest.raises(mo.FormatError, match=f"{field}.*none"):
        mo.MoeConfig.from_hf(without, 3)


def test_null_is_no_default():
    """Null is a value of few fields; transformers fills in nothing for it."""
    with pytest.raises(mo.FormatError, match=r"routed_scaling_factor.*null"):
        mo.MoeConfig.from_hf(DEEPSEEK_V3 | {"routed_scaling_factor": None}, 3)
    mimo = DEEPSEEK_V3 | {"model_type": "mimo_v2_flash", "routed_scaling_factor": None}
    assert mo.MoeConfig.from_hf(mimo, 3).router.scale == 1.0


def test_gemma4_without_experts():
    """An absent enable_moe_block is a model without experts."""
    with pytest.raises(mo.FormatError, match="enable_moe_block"):
        mo.MoeConfig.from_hf({"model_type": "gemma4_text", "num_experts": 8, "top_k_experts": 2})


def test_names_that_disagree():
    with pytest.raises(mo.FormatError, match=r"num_local_experts.*8 as num_experts says.*16"):
        mo.MoeConfig.from_hf(QWEN3 | {"num_local_experts": 16})


#: What Python's own checks of a value would end in is an error of the configuration.
ESCAPES = {
    "a number above all floats": QWEN3 | {"rms_norm_eps": 10**400},
    "an integer too long to print": QWEN3 | {"hidden_size": 10**5000},
    "not a number": DEEPSEEK_V3 | {"routed_scaling_factor": float("nan")},
    "infinite": DEEPSEEK_V3 | {"routed_scaling_factor": float("inf")},
    "a list by layer": QWEN3 | {"num_hidden_layers": [1, 2]},
    "a text model that is none": QWEN3 | {"text_config": "x"},
    "a text model in a list": QWEN3 | {"language_config": [QWEN3]},
    "a model_type in a list": {"model_type": ["qwen3_moe"]},
    "an activation in a list": QWEN3 | {"hidden_act": {"a": 1}},
    "layer types of numbers": DEEPSEEK_V3 | {"model_type": "hy_v3", "mlp_layer_types": [1, 2]},
    "too many experts": {
        "model_type": "longcat_flash", "hidden_size": 32, "expert_ffn_hidden_size": 64,
        "n_routed_experts": 8, "moe_topk": 2, "zero_expert_num": 2**31 - 1, "num_layers": 9,
    },
    "shared experts beyond all": DEEPSEEK_V3 | {
        "n_shared_experts": 2**31 - 1, "moe_intermediate_size": 2**31 - 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("layer", [5, -5])
@pytest.mark.parametrize("case", ESCAPES)
def test_whatever_escapes_is_an_error(case, layer):
    with pytest.raises((mo.FormatError, mo.ShapeError)):
        mo.MoeConfig.from_hf(ESCAPES[case], layer)


@pytest.mark.parametrize("case", ESCAPES)
def test_whatever_escapes_is_wrong_in_the_file(case):
    """At a layer that has experts, where nothing else is wrong."""
    config = ESCAPES[case]
    with pytest.raises(mo.FormatError):
        mo.MoeConfig.from_hf(config, config.get("first_k_dense_replace", 0))


@pytest.mark.parametrize("layer", [-1, 4, 1 << 20])
def test_layers_outside(layer):
    with pytest.raises(mo.ShapeError, match="0 to 3"):
        mo.MoeConfig.from_hf(QWEN3, layer)


def test_table_is_in_order():
    """One row for each model type, each with a source; what is missing is said."""
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))
    assert all(family.source for family in FAMILIES)
    rows = {row["model types"]: row for row in family_table()}
    assert len(rows) == len(FAMILIES)
    v2 = rows["deepseek_v2"]
    assert (v2["selection"], v2["renormalize"], v2["shared"]) == ("groups by max", "no", "plain")
    assert rows["lfm2_moe"]["renormalize"] == "key, +1e-06"
    assert rows["phimoe"]["missing"] == "the SparseMixer router"

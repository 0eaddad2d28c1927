"""How Hugging Face configurations state their MoE layers: one row per family.

Sources are files of transformers 5.23 under ``models/``, read for their formulas. A row differs
from the GGUF preset of the same model where transformers and llama.cpp differ: the guard of the
renormalisation, and the groups of DeepSeek-V2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Use = Literal["none", "optional", "required"]
REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """A field of the configuration under the first of ``names`` that is there and not null."""

    names: tuple[str, ...]
    default: Any = REQUIRED


def key(*names: str, default: Any = REQUIRED) -> Key:
    """A key with its aliases; without a default it must be there."""
    return Key(names, default)


_EXPERTS = key("num_experts", "num_local_experts")
_TOP_K = key("num_experts_per_tok")
_WIDTH = key("moe_intermediate_size")
_ACTIVATION = key("hidden_act", default="silu")


@dataclass(frozen=True)
class Shared:
    """Shared experts: their width is ``width`` times ``count``; none where either is 0."""

    kind: Literal["plain", "sigmoid_gated"]
    width: Key
    count: Key | int = 1


@dataclass(frozen=True)
class Family:
    """Model types whose configurations read alike. A ``Key`` is looked up, all else is as it is."""

    model_types: tuple[str, ...]
    source: str

    experts: Key = _EXPERTS
    top_k: Key = _TOP_K
    width: Key = _WIDTH
    #: Which layers have experts, by a rule of ``layers``.
    layers: str = "all"

    score: str | Key = "softmax"
    select_on: str = "scores"
    renormalize: bool | Key = True
    guard: tuple[str, float | Key] = ("none", 0.0)
    scale: float | Key = 1.0
    #: num_groups and groups_used; with group_reduce and group_mask.
    groups: tuple[Key, Key] | None = None
    group_reduce: str = "top2_sum"
    group_mask: str = "minus_infinity"
    weight_on: str = "output"
    identity_experts: int | Key = 0
    router_bias: Use = "none"
    selection_bias: Use = "none"

    #: Kind of an Activation, or the key of a name that transformers knows.
    activation: str | Key = _ACTIVATION
    gated: bool = True
    limit: Key | None = None
    alpha: Key | None = None
    shared: Shared | None = None
    shared_activation: str = ""  # kind, where it differs
    latent: Key | None = None

    #: Tensors of the layer: the norm of what the experts read; the scale of the router's own norm,
    #: times 1/sqrt(H); factors on the outputs of experts.
    input_norm: str = ""
    router_norm: str = ""
    output_scale: str = ""

    #: Values that the formula above is written for; an absent key is one of them.
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    #: Gate and up rows alternate where one tensor holds both for all experts.
    interleaved: bool = False
    #: What is missing here, where the family cannot be computed.
    missing: str = ""


def _model(name: str) -> str:
    return f"models/{name}/modeling_{name}.py"


_NORM_TOPK = key("norm_topk_prob", default=True)
_SCALE = key("routed_scaling_factor", default=1.0)
_SHARED_GATED = Shared("sigmoid_gated", key("shared_expert_intermediate_size"))

_QWEN = Family(
    ("qwen3_moe", "qwen3_moe_text", "mellum"),
    _model("qwen3_moe"),
    layers="qwen",
    renormalize=key("norm_topk_prob", default=False),
)
# DeepSeek-V3's router, which many models share.
_DEEPSEEK = Family(
    ("deepseek_v3", "kimi_k2"),
    _model("deepseek_v3"),
    experts=key("n_routed_experts", "num_local_experts", "num_experts"),
    layers="after_dense",
    score="sigmoid",
    renormalize=_NORM_TOPK,
    guard=("add_eps", 1e-20),
    scale=_SCALE,
    groups=(key("n_group", default=1), key("topk_group", default=1)),
    selection_bias="required",
    shared=Shared("plain", key("moe_intermediate_size"), key("n_shared_experts", default=0)),
    expects={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
)
_SPARSE = replace(_DEEPSEEK, layers="mlp_layer_types")

FAMILIES = (
    Family(
        ("mixtral", "minimax", "minimax_text_01"),
        _model("mixtral"),
        experts=key("num_local_experts", "num_experts"),
        width=key("intermediate_size"),
    ),
    Family(
        ("olmoe", "flex_olmo"),
        _model("olmoe"),
        width=key("intermediate_size"),
        renormalize=key("norm_topk_prob", default=False),
    ),
    _QWEN,
    replace(
        _QWEN,
        model_types=("qwen2_moe",),
        source=_model("qwen2_moe"),
        shared=_SHARED_GATED,
    ),
    replace(
        _QWEN,
        model_types=("qwen3_next", "qwen4_exp", "qwen4_exp_text"),
        source=_model("qwen3_next"),
        renormalize=_NORM_TOPK,
        shared=_SHARED_GATED,
    ),
    replace(
        _QWEN,
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        source=_model("qwen3_5_moe"),
        layers="all",
        renormalize=True,
        shared=_SHARED_GATED,
    ),
    replace(
        _QWEN,
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        source=_model("qwen3_vl_moe"),
        renormalize=True,
    ),
    Family(
        ("deepseek_v2",),
        _model("deepseek_v2"),
        experts=key("n_routed_experts", "num_experts"),
        layers="after_dense",
        renormalize=False,
        scale=_SCALE,
        groups=(key("n_group", default=1), key("topk_group", default=1)),
        group_reduce="max",
        group_mask="zero",
        shared=Shared("plain", key("moe_intermediate_size"), key("n_shared_experts", default=0)),
        expects={
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
        },
    ),
    _DEEPSEEK,
    replace(
        _DEEPSEEK,
        model_types=("glm4_moe", "glm4v_moe", "glm4v_moe_text", "dots1", "solar_open"),
        source=_model("glm4_moe"),
    ),
    replace(
        _SPARSE,
        model_types=("deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        source=_model("glm_moe_dsa"),
    ),
    replace(
        _SPARSE,
        model_types=("glm5_next", "glm5_next_text"),
        source=_model("glm5_next"),
        activation="swiglu_clamp_input",
        limit=key("swiglu_limit", default=10.0),
    ),
    replace(
        _SPARSE,
        model_types=("hy_v4",),
        source=_model("hy_v4"),
        activation="swiglu_clamp_input",
        limit=key("swiglu_limit", default=10.0),
        shared_activation="swiglu",
    ),
    replace(
        _SPARSE,
        model_types=("dots3_note", "dots3_note_text"),
        source=_model("dots3_note"),
        shared=Shared(
            "plain",
            key("shared_experts_intermediate_size"),
            key("n_shared_experts", default=0),
        ),
    ),
    replace(
        _DEEPSEEK,
        model_types=("mistral4",),
        source=_model("mistral4"),
        score="softmax",
        group_mask="zero",
        selection_bias="none",
        expects={},
    ),
    replace(
        _SPARSE,
        model_types=("exaone_moe",),
        source=_model("exaone_moe"),
        shared=Shared("plain", key("moe_intermediate_size"), key("num_shared_experts", default=0)),
    ),
    replace(
        _SPARSE,
        model_types=("mimo_v2_flash",),
        source=_model("mimo_v2_flash"),
        shared=None,
    ),
    replace(
        _SPARSE,
        model_types=("kimi_linear", "bailing_hybrid"),
        source=_model("kimi_linear"),
        experts=key("num_local_experts", "num_experts"),
        top_k=key("num_experts_per_tok", "num_experts_per_token"),
        renormalize=key("norm_topk_prob", "moe_renormalize", default=True),
        groups=(
            key("n_group", "num_expert_group", default=1),
            key("topk_group", default=1),
        ),
        shared=Shared(
            "plain",
            key("moe_intermediate_size"),
            key("n_shared_experts", "num_shared_experts", default=0),
        ),
        expects={"moe_router_activation_func": ("sigmoid",)},
    ),
    Family(
        ("gpt_oss",),
        _model("gpt_oss"),
        experts=key("num_local_experts", "num_experts"),
        top_k=key("num_experts_per_tok", "experts_per_token"),
        width=key("intermediate_size"),
        score="softmax_selected",
        renormalize=False,
        router_bias="required",
        activation="swiglu_oai",
        limit=key("swiglu_limit", default=7.0),
        alpha=key("swiglu_alpha", default=1.702),
        expects={"hidden_act": ("silu",)},
        interleaved=True,
    ),
    Family(
        ("llama4", "llama4_text"),
        _model("llama4"),
        experts=key("num_local_experts"),
        width=key("intermediate_size"),
        layers="llama4",
        score="sigmoid",
        select_on="logits",
        renormalize=False,
        weight_on="input",
        shared=Shared("plain", key("intermediate_size")),
    ),
    Family(
        ("minimax_m2",),
        _model("minimax_m2"),
        experts=key("num_local_experts", "num_experts"),
        width=key("intermediate_size"),
        score="sigmoid",
        selection_bias="required",
        expects={
            "scoring_func": ("sigmoid",),
            "use_routing_bias": (True,),
            "shared_intermediate_size": (0,),
        },
    ),
    Family(
        ("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        _model("granitemoe"),
        experts=key("num_local_experts"),
        width=key("intermediate_size"),
        score="softmax_selected",
        renormalize=False,
        shared=Shared("plain", key("shared_intermediate_size", default=0)),
    ),
    Family(
        ("ernie4_5_moe",),
        _model("ernie4_5_moe"),
        experts=key("moe_num_experts", "num_experts"),
        top_k=key("moe_k", "num_experts_per_tok"),
        layers="ernie",
        guard=("clamp_min", key("moe_norm_min", default=1e-12)),
        selection_bias="required",
        shared=Shared(
            "plain", key("moe_intermediate_size"), key("moe_num_shared_experts", default=2)
        ),
    ),
    Family(
        ("hunyuan_v1_moe",),
        _model("hunyuan_v1_moe"),
        experts=key("num_experts"),
        top_k=key("moe_topk", "num_experts_per_tok"),
        width=key("moe_intermediate_size", "intermediate_size"),
        shared=Shared("plain", key("intermediate_size"), key("num_shared_expert", default=1)),
    ),
    Family(
        ("lfm2_moe",),
        _model("lfm2_moe"),
        layers="after_dense",
        score="sigmoid",
        renormalize=_NORM_TOPK,
        guard=("add_eps", 1e-6),
        scale=_SCALE,
        selection_bias="optional",
        activation="swiglu",
    ),
    Family(
        ("afmoe",),
        _model("afmoe"),
        layers="after_dense",
        score="sigmoid",
        guard=("add_eps", 1e-20),
        scale=key("route_scale", default=1.0),
        selection_bias="required",
        shared=Shared("plain", key("moe_intermediate_size"), key("num_shared_experts", default=2)),
        expects={"score_func": ("sigmoid",), "route_norm": (True,)},
    ),
    Family(
        ("hy_v3",),
        _model("hy_v3"),
        layers="mlp_layer_types",
        score="sigmoid",
        guard=("add_eps", 1e-20),
        scale=key("router_scaling_factor", default=2.826),
        selection_bias="required",
        shared=Shared("plain", key("moe_intermediate_size"), key("num_shared_experts", default=1)),
    ),
    Family(
        ("laguna",),
        _model("laguna"),
        layers="mlp_layer_types",
        score="sigmoid",
        scale=key("moe_routed_scaling_factor", default=1.0),
        selection_bias="required",
        shared=Shared("plain", key("shared_expert_intermediate_size")),
        expects={
            "moe_router_logit_softcapping": (0, 0.0),
            "moe_apply_router_weight_on_input": (False,),
        },
    ),
    Family(
        ("jamba",),
        _model("jamba"),
        width=key("intermediate_size"),
        layers="jamba",
        renormalize=False,
    ),
    Family(
        ("nemotron_h",),
        _model("nemotron_h"),
        experts=key("n_routed_experts", "num_local_experts"),
        layers="nemotron_h",
        score="sigmoid",
        renormalize=_NORM_TOPK,
        guard=("add_eps", 1e-20),
        scale=_SCALE,
        groups=(key("n_group", default=1), key("topk_group", default=1)),
        selection_bias="required",
        activation=key("mlp_hidden_act", default="relu2"),
        gated=False,
        shared=Shared("plain", key("moe_shared_expert_intermediate_size")),
        latent=key("moe_latent_size", default=0),
        expects={"mlp_bias": (False,)},
    ),
    Family(
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        _model("minimax_m3_vl"),
        experts=key("num_local_experts", "num_experts"),
        width=key("intermediate_size"),
        layers="mlp_layer_types",
        score="sigmoid",
        scale=_SCALE,
        selection_bias="required",
        activation="swiglu_oai",
        limit=key("swiglu_limit", default=7.0),
        alpha=key("swiglu_alpha", default=1.702),
        shared=Shared("plain", key("shared_intermediate_size")),
    ),
    Family(
        ("deepseek_v4",),
        _model("deepseek_v4"),
        experts=key("n_routed_experts", "num_local_experts"),
        layers="deepseek_v4",
        score=key("scoring_func", default="sqrtsoftplus"),
        guard=("add_eps", 1e-20),
        scale=_SCALE,
        selection_bias="required",
        activation="swiglu_clamp_input",
        limit=key("swiglu_limit"),
        shared=Shared("plain", key("moe_intermediate_size")),
        expects={"hidden_act": ("silu",), "norm_topk_prob": (True,), "mlp_bias": (False,)},
    ),
    Family(
        ("longcat_flash",),
        _model("longcat_flash"),
        experts=key("n_routed_experts", "num_local_experts"),
        top_k=key("moe_topk", "num_experts_per_tok"),
        width=key("expert_ffn_hidden_size", "moe_intermediate_size"),
        renormalize=False,
        scale=_SCALE,
        identity_experts=key("zero_expert_num", default=0),
        selection_bias="required",
        expects={"router_bias": (False,), "zero_expert_type": ("identity",)},
    ),
    Family(
        ("gemma4", "gemma4_text"),
        _model("gemma4"),
        top_k=key("top_k_experts"),
        activation=key("hidden_activation", default="gelu_pytorch_tanh"),
        input_norm="pre_feedforward_layernorm_2.weight",
        router_norm="router.scale",
        output_scale="router.per_expert_scale",
        expects={"enable_moe_block": (True,)},
    ),
    Family(("phimoe",), _model("phimoe"), missing="the SparseMixer router"),
    Family(("cohere2_moe",), _model("cohere2_moe"), missing="averaging with the shared experts"),
    Family(("dbrx",), _model("dbrx"), missing="flat expert tensors"),
    Family(("jetmoe",), _model("jetmoe"), missing="experts in the attention"),
    Family(("zaya",), _model("zaya"), missing="the MLP router"),
    Family(("grovemoe",), "remote code", missing="experts in two groups (adjugate experts)"),
)


def family_table() -> list[dict[str, str]]:
    """The rows in words, with the keys of ``architecture_table``; 'key' is for the configuration
    to decide.
    """
    rows = []
    for family in FAMILIES:
        guard, epsilon = family.guard
        by_key = "key" if isinstance(epsilon, Key) else f"{epsilon:g}"
        norm = "yes" if family.renormalize else "no"
        norm = "key" if isinstance(family.renormalize, Key) else norm
        if norm != "no" and guard != "none":
            norm += f", {'+' if guard == 'add_eps' else 'at least '}{by_key}"
        selection = [family.select_on] if family.select_on != "scores" else []
        selection += [f"{family.selection_bias} bias"] if family.selection_bias != "none" else []
        selection += [f"groups by {family.group_reduce}"] if family.groups is not None else []
        shared = family.shared
        rows.append(
            {
                "model types": ", ".join(family.model_types),
                "source": family.source,
                "score": _word(family.score),
                "selection": ", ".join(selection),
                "renormalize": norm,
                "scale": "" if family.scale == 1.0 else "key",
                "activation": _word(family.activation),
                "shared": "" if shared is None else shared.kind,
                "missing": family.missing,
            }
        )
    return rows


def _word(value: str | Key) -> str:
    return "key" if isinstance(value, Key) else value

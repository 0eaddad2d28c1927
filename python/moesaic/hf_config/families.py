"""How Hugging Face configurations state their MoE layers: one row per family.

What a model is stands in one table for GGUF and Hugging Face (``cpp/src/model/model_table.hpp``); a
row here says which fields of ``config.json`` hold its values. Fields were read in transformers
5.24, in the file that ``source`` names; what a field means that is absent stands by model type in
``defaults``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moesaic import _core

REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """A field of the configuration, under any of its names.

    An absent field means what ``defaults`` says for the model type. ``default`` is for fields that
    the type does not have in transformers, ``null`` for those where null is a value.
    """

    names: tuple[str, ...]
    default: Any = REQUIRED
    null: Any = REQUIRED


def key(*names: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Key:
    """A key with its aliases."""
    return Key(names, default, null)


_EXPERTS = key("num_experts", "num_local_experts")
_TOP_K = key("num_experts_per_tok")
_WIDTH = key("moe_intermediate_size")
_ACTIVATION = key("hidden_act")


@dataclass(frozen=True)
class Shared:
    """Shared experts: their width is ``width`` times ``count``; none where either is 0."""

    width: Key
    count: Key | int = 1


@dataclass(frozen=True)
class Family:
    """Model types whose configurations read alike.

    A ``Key`` is looked up; None leaves the value to the model.
    """

    model_types: tuple[str, ...]
    source: str
    #: Row of the table of models.
    model: str

    experts: Key = _EXPERTS
    top_k: Key = _TOP_K
    width: Key = _WIDTH
    #: Which layers have experts, by a rule of ``layers``.
    layers: str = "all"

    score: Key | None = None
    renormalize: Key | None = None
    guard_eps: Key | None = None
    scale: Key | None = None
    #: num_groups and groups_used.
    groups: tuple[Key, Key] | None = None
    identity_experts: Key | None = None

    #: What the key of the score says, in our words.
    scores: Mapping[str, str] = field(
        default_factory=lambda: {
            "softmax": "softmax",
            "sigmoid": "sigmoid",
            "sqrtsoftplus": "sqrt_softplus",
        }
    )
    #: How routed and shared experts come together: 'average' or 'sum'.
    combination: Key | None = None

    #: The key of a name that transformers knows.
    activation: Key | None = _ACTIVATION
    limit: Key | None = None
    alpha: Key | None = None
    shared: Shared | None = None
    latent: Key | None = None

    #: Tensors of the layer: the norm of what the experts read; the scale of the router's own norm,
    #: times 1/sqrt(H); factors on the outputs of experts.
    input_norm: str = ""
    router_norm: str = ""
    output_scale: str = ""

    #: Values that the model is written for; an absent key is one of them, unless ``defaults`` says
    #: another.
    expects: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    #: Gate and up rows alternate where one tensor holds both for all experts.
    interleaved: bool = False
    #: What is missing here, where the family cannot be computed.
    missing: str = ""
    #: Whether the caller says what the model is, of which there is no row.
    given: bool = False
    #: The key that says whether a selection bias counts, where a model has both kinds of layers.
    has_bias: Key | None = None
    #: Whether that key says no.
    unbiased: bool = False

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the model is, by the words of RouterConfig and MoeConfig."""
        if self.given:
            return {"router_bias": "optional", "selection_bias": "optional"}
        facts = _core.model_facts(self.model)
        return facts | {"selection_bias": "ignored"} if self.unbiased else facts


def _source(name: str) -> str:
    return f"models/{name}/modeling_{name}.py"


_NORM_TOPK = key("norm_topk_prob")
_SCALE = key("routed_scaling_factor")
_GROUPS = (key("n_group"), key("topk_group"))
_SHARED_GATED = Shared(key("shared_expert_intermediate_size"))

_QWEN = Family(
    ("qwen3_moe", "qwen3_moe_text", "mellum", "qwen3_omni_moe_text"),
    _source("qwen3_moe"),
    "qwen3_moe",
    layers="qwen",
    renormalize=_NORM_TOPK,
)
# DeepSeek-V3's fields, which many models share.
_DEEPSEEK = Family(
    ("deepseek_v3", "kimi_k2"),
    _source("deepseek_v3"),
    "deepseek_v3",
    experts=key("n_routed_experts", "num_local_experts"),
    layers="after_dense",
    renormalize=_NORM_TOPK,
    scale=_SCALE,
    groups=_GROUPS,
    shared=Shared(key("moe_intermediate_size"), key("n_shared_experts", null=0)),
    expects={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
)
_GRANITE = Family(
    ("granitemoe",),
    _source("granitemoe"),
    "granitemoe",
    experts=key("num_local_experts"),
    width=key("intermediate_size"),
    expects={"shared_intermediate_size": (0,)},
)
_SPARSE = replace(_DEEPSEEK, layers="mlp_layer_types")

FAMILIES = (
    Family(
        ("mixtral", "minimax", "minimax_text_01"),
        _source("mixtral"),
        "mixtral",
        experts=key("num_local_experts", "num_experts"),
        width=key("intermediate_size"),
        expects={"shared_intermediate_size": (0,)},
    ),
    Family(
        ("olmoe", "flex_olmo"),
        _source("olmoe"),
        "olmoe",
        width=key("intermediate_size"),
        renormalize=_NORM_TOPK,
    ),
    _QWEN,
    replace(
        _QWEN,
        model_types=("qwen2_moe", "qwen3_omni_moe_talker_text"),
        source=_source("qwen2_moe"),
        model="qwen2_moe",
        shared=_SHARED_GATED,
    ),
    replace(
        _QWEN,
        model_types=("qwen3_next",),
        source=_source("qwen3_next"),
        model="qwen3_next",
        shared=_SHARED_GATED,
    ),
    replace(
        _QWEN,
        model_types=("qwen4_exp", "qwen4_exp_text"),
        source=_source("qwen4_exp"),
        model="qwen3_next",
        layers="all",
        shared=_SHARED_GATED,
    ),
    replace(
        _QWEN,
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        source=_source("qwen3_5_moe"),
        model="qwen3_next",
        layers="all",
        renormalize=None,
        shared=_SHARED_GATED,
    ),
    replace(
        _QWEN,
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        source=_source("qwen3_vl_moe"),
        renormalize=None,
    ),
    replace(
        _DEEPSEEK,
        model_types=("deepseek_v2",),
        source=_source("deepseek_v2"),
        model="deepseek_v2",
        experts=key("n_routed_experts", "num_experts"),
        renormalize=None,
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
        source=_source("glm4_moe"),
    ),
    replace(
        _SPARSE,
        model_types=("glm4_moe_lite",),
        source=_source("glm4_moe_lite"),
    ),
    replace(
        _SPARSE,
        model_types=("deepseek_v32", "glm_moe_dsa"),
        source=_source("glm_moe_dsa"),
        experts=key("n_routed_experts", "num_local_experts", "num_experts"),
    ),
    replace(
        _SPARSE,
        model_types=("glm5_next", "glm5_next_text"),
        source=_source("glm5_next"),
        model="glm5_next",
        activation=None,
        limit=key("swiglu_limit"),
    ),
    replace(
        _SPARSE,
        model_types=("hy_v4",),
        source=_source("hy_v4"),
        model="hy_v4",
        activation=None,
        limit=key("swiglu_limit"),
    ),
    replace(
        _SPARSE,
        model_types=("dots3_note", "dots3_note_text"),
        source=_source("dots3_note"),
        shared=Shared(
            key("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"),
            key("n_shared_experts"),
        ),
    ),
    replace(
        _DEEPSEEK,
        model_types=("mistral4",),
        source=_source("mistral4"),
        model="mistral4",
        expects={},
    ),
    replace(
        _SPARSE,
        model_types=("exaone_moe",),
        source=_source("exaone_moe"),
        experts=key("num_experts"),
        shared=Shared(key("moe_intermediate_size"), key("num_shared_experts")),
    ),
    replace(
        _SPARSE,
        model_types=("mimo_v2_flash",),
        source=_source("mimo_v2_flash"),
        model="mimo_v2_flash",
        scale=key("routed_scaling_factor", null=1.0),
        shared=None,
    ),
    replace(
        _SPARSE,
        model_types=("kimi_linear", "bailing_hybrid"),
        source=_source("kimi_linear"),
        experts=key("num_local_experts", "num_experts"),
        top_k=key("num_experts_per_tok", "num_experts_per_token"),
        renormalize=key("norm_topk_prob", "moe_renormalize"),
        groups=(key("n_group", "num_expert_group"), key("topk_group")),
        shared=Shared(
            key("moe_intermediate_size"), key("n_shared_experts", "num_shared_experts", null=0)
        ),
        expects={"moe_router_activation_func": ("sigmoid",)},
    ),
    Family(
        ("gpt_oss",),
        _source("gpt_oss"),
        "gpt_oss",
        experts=key("num_local_experts", "num_experts"),
        top_k=key("num_experts_per_tok", "experts_per_token"),
        width=key("intermediate_size"),
        activation=None,
        limit=key("swiglu_limit"),
        alpha=key("swiglu_alpha"),
        expects={"hidden_act": ("silu",)},
        interleaved=True,
    ),
    Family(
        ("llama4", "llama4_text"),
        _source("llama4"),
        "llama4",
        experts=key("num_local_experts"),
        width=key("intermediate_size"),
        layers="llama4",
        shared=Shared(key("intermediate_size")),
    ),
    Family(
        ("minimax_m2",),
        _source("minimax_m2"),
        "minimax_m2",
        experts=key("num_local_experts", "num_experts"),
        width=key("intermediate_size"),
        expects={
            "scoring_func": ("sigmoid",),
            "use_routing_bias": (True,),
            "shared_intermediate_size": (0,),
        },
    ),
    _GRANITE,
    replace(
        _GRANITE,
        model_types=("granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
        source=_source("granitemoeshared"),
        shared=Shared(key("shared_intermediate_size")),
        expects={},
    ),
    Family(
        ("ernie4_5_moe",),
        _source("ernie4_5_moe"),
        "ernie4_5_moe",
        experts=key("moe_num_experts", "num_experts"),
        top_k=key("moe_k", "num_experts_per_tok"),
        layers="ernie",
        guard_eps=key("moe_norm_min"),
        shared=Shared(key("moe_intermediate_size"), key("moe_num_shared_experts")),
    ),
    Family(
        ("hunyuan_v1_moe",),
        _source("hunyuan_v1_moe"),
        "hunyuan_v1_moe",
        experts=key("num_experts"),
        top_k=key("moe_topk", "num_experts_per_tok"),
        width=key("moe_intermediate_size", "intermediate_size"),
        shared=Shared(key("intermediate_size"), key("num_shared_expert", default=1)),
    ),
    Family(
        ("lfm2_moe",),
        _source("lfm2_moe"),
        "lfm2_moe",
        layers="after_dense",
        renormalize=_NORM_TOPK,
        scale=_SCALE,
        activation=None,
        has_bias=key("use_expert_bias"),
    ),
    Family(
        ("afmoe",),
        _source("afmoe"),
        "deepseek_v3",
        layers="after_dense",
        scale=key("route_scale"),
        shared=Shared(key("moe_intermediate_size"), key("num_shared_experts")),
        expects={
            "score_func": ("sigmoid",),
            "route_norm": (True,),
            "n_group": (1,),
            "topk_group": (1,),
        },
    ),
    Family(
        ("hy_v3",),
        _source("hy_v3"),
        "deepseek_v3",
        layers="mlp_layer_types",
        scale=key("router_scaling_factor"),
        shared=Shared(key("moe_intermediate_size"), key("num_shared_experts")),
    ),
    Family(
        ("laguna",),
        _source("laguna"),
        "laguna",
        layers="mlp_layer_types",
        scale=key("moe_routed_scaling_factor"),
        shared=Shared(key("shared_expert_intermediate_size")),
        expects={
            "moe_router_logit_softcapping": (0, 0.0),
            "moe_apply_router_weight_on_input": (False,),
        },
    ),
    Family(
        ("jamba",),
        _source("jamba"),
        "olmoe",
        width=key("intermediate_size"),
        layers="jamba",
    ),
    Family(
        ("nemotron_h",),
        _source("nemotron_h"),
        "nemotron_h",
        experts=key("n_routed_experts", "num_local_experts"),
        layers="nemotron_h",
        renormalize=_NORM_TOPK,
        scale=_SCALE,
        groups=_GROUPS,
        activation=key("mlp_hidden_act"),
        shared=Shared(key("moe_shared_expert_intermediate_size")),
        latent=key("moe_latent_size", null=0),
        expects={"mlp_bias": (False,)},
    ),
    Family(
        ("minimax_m3_vl", "minimax_m3_vl_text"),
        _source("minimax_m3_vl"),
        "minimax_m3_vl",
        experts=key("num_local_experts", "num_experts"),
        width=key("intermediate_size"),
        layers="mlp_layer_types",
        scale=_SCALE,
        activation=None,
        limit=key("swiglu_limit"),
        alpha=key("swiglu_alpha"),
        shared=Shared(key("shared_intermediate_size")),
    ),
    Family(
        ("deepseek_v4",),
        _source("deepseek_v4"),
        "deepseek_v4",
        experts=key("n_routed_experts", "num_local_experts"),
        layers="deepseek_v4",
        score=key("scoring_func"),
        scale=_SCALE,
        activation=None,
        limit=key("swiglu_limit"),
        shared=Shared(key("moe_intermediate_size")),
        expects={"hidden_act": ("silu",), "norm_topk_prob": (True,), "mlp_bias": (False,)},
    ),
    Family(
        ("longcat_flash",),
        _source("longcat_flash"),
        "longcat_flash",
        experts=key("n_routed_experts", "num_local_experts"),
        top_k=key("moe_topk", "num_experts_per_tok"),
        width=key("expert_ffn_hidden_size", "moe_intermediate_size"),
        scale=_SCALE,
        identity_experts=key("zero_expert_num", null=0),
        expects={"router_bias": (False,), "zero_expert_type": ("identity",)},
    ),
    Family(
        ("gemma4", "gemma4_text"),
        _source("gemma4"),
        "gemma4",
        top_k=key("top_k_experts"),
        activation=key("hidden_activation"),
        input_norm="pre_feedforward_layernorm_2.weight",
        router_norm="router.scale",
        output_scale="router.per_expert_scale",
        expects={"enable_moe_block": (True,)},
    ),
    Family(
        ("cohere2_moe",),
        _source("cohere2_moe"),
        "cohere2_moe",
        width=key("intermediate_size"),
        layers="mlp_layer_types",
        score=key("expert_selection_fn"),
        scores={"softmax": "softmax_selected", "sigmoid": "sigmoid"},
        renormalize=_NORM_TOPK,
        shared=Shared(key("intermediate_size"), key("num_shared_experts")),
        combination=key("shared_expert_combination_strategy"),
    ),
    Family(("phimoe",), _source("phimoe"), "phimoe", missing="the SparseMixer router"),
    Family(("dbrx",), _source("dbrx"), "dbrx", missing="flat expert tensors"),
    Family(("jetmoe",), _source("jetmoe"), "", missing="experts in the attention"),
    Family(("zaya",), _source("zaya"), "", missing="the MLP router"),
    Family(
        ("grovemoe",),
        "remote code",
        "grovemoe",
        missing="experts in two groups (adjugate experts)",
    ),
)


def family_table() -> list[dict[str, str]]:
    """The rows in words, with the keys of ``architecture_table``; 'key' is for the configuration
    to decide.
    """
    rows = []
    for family in FAMILIES:
        facts = family.facts if family.model else dict.fromkeys(_SAID, "")
        norm = "yes" if facts["renormalize"] else "no"
        norm = norm if family.renormalize is None else "key"
        if norm != "no" and facts["guard"] not in ("none", ""):
            by_key = f"{facts['guard_eps']:.0e}" if family.guard_eps is None else "key"
            norm += f", {'+' if facts['guard'] == 'add_eps' else 'at least '}{by_key}"
        selection = [facts["select_on"]] if facts["select_on"] != "scores" else []
        bias = facts["selection_bias"]
        selection += [f"{bias} bias"] if bias not in ("ignored", "") else []
        if family.groups is not None:
            selection += [f"groups by {facts['group_reduce']}"]
        activation = "key" if family.activation is not None else facts["activation"]
        rows.append(
            {
                "model types": ", ".join(family.model_types),
                "source": family.source,
                "score": facts["score"] if family.score is None else "key",
                "selection": ", ".join(selection),
                "renormalize": norm,
                "scale": "" if family.scale is None else "key",
                "activation": activation,
                "shared": "" if family.shared is None else facts["shared"],
                "missing": family.missing,
            }
        )
    return rows


#: Facts that the table shows; empty for a model that has no row.
_SAID = ("score", "select_on", "selection_bias", "renormalize", "guard", "activation")

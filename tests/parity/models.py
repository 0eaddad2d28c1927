"""Small models of transformers, one or two per MoE family."""

from dataclasses import dataclass
from typing import Any

HIDDEN, WIDTH, EXPERTS, TOP_K = 32, 24, 8, 3
_COMMON = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": WIDTH}
_LOCAL = {
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "intermediate_size": WIDTH,
}
_ROUTED = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
_LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


@dataclass(frozen=True)
class Model:
    """One configuration; ``block`` is the name of the MoE module in layer ``layer``."""

    name: str
    config: str
    changes: dict[str, Any]
    block: str = "mlp"
    layer: int = 1
    without: tuple[str, ...] = ()
    hashed: bool = False  # routed by token ids
    arrays: bool = True  # can be built from parts: experts without biases
    whole: str = ""  # class of the model, where AutoModelForCausalLM knows none
    saved: bool = True  # the saved tensors are those of real checkpoints
    loudness: float = 1.0  # of x; louder ones reach the clamps

    def make_whole(self) -> Any:
        """The model with the weights that transformers gives it."""
        import transformers

        config = self.make_config()
        if self.whole:
            return getattr(transformers, self.whole)(config)
        return transformers.AutoModelForCausalLM.from_config(config)

    def make_config(self) -> Any:
        import transformers  # not where the list alone is wanted

        values = {**_COMMON, **self.changes}
        for name in self.without:
            del values[name]
        return getattr(transformers, self.config)(**values)


MODELS = [
    Model("qwen3_moe", "Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": True}),
    Model("qwen3_moe plain", "Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": False}),
    Model(
        "qwen3_next",
        "Qwen3NextConfig",
        {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 20},
    ),
    Model(
        "qwen3_5_moe",
        "Qwen3_5MoeTextConfig",
        {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 20},
    ),
    Model("qwen2_moe", "Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 20}),
    Model("mixtral", "MixtralConfig", _LOCAL),
    Model(
        "olmoe",
        "OlmoeConfig",
        {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": WIDTH},
    ),
    Model("deepseek_v2", "DeepseekV2Config", {**_ROUTED, **_MLA, "topk_method": "greedy"}),
    Model(
        "deepseek_v2 groups",
        "DeepseekV2Config",
        {**_ROUTED, **_MLA, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    Model(
        "deepseek_v3",
        "DeepseekV3Config",
        {**_ROUTED, **_MLA, "head_dim": 8, "n_group": 4, "topk_group": 2},
    ),
    Model("glm4_moe", "Glm4MoeConfig", _ROUTED),
    Model("gpt_oss", "GptOssConfig", _LOCAL, arrays=False, loudness=4.0),
    Model(
        "llama4",
        "Llama4TextConfig",
        {**_LOCAL, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
        block="feed_forward",
    ),
    Model(
        "llama4 top 2",
        "Llama4TextConfig",
        {**_LOCAL, "num_experts_per_tok": 2},
        block="feed_forward",
    ),
    Model("minimax_m2", "MiniMaxM2Config", _LOCAL),
    Model("granitemoe", "GraniteMoeConfig", _LOCAL, block="block_sparse_moe"),
    Model(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": WIDTH,
            "moe_num_shared_experts": 2,
        },
    ),
    Model(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        {"num_experts": EXPERTS, "moe_topk": TOP_K, "intermediate_size": WIDTH},
    ),
    Model("dots1", "Dots1Config", {**_ROUTED, "norm_topk_prob": True}),
    Model(
        "lfm2_moe",
        "Lfm2MoeConfig",
        {
            **_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
        block="feed_forward",
    ),
    Model(
        "lfm2_moe scaled",
        "Lfm2MoeConfig",
        {
            **_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "routed_scaling_factor": 1.3,
        },
        block="feed_forward",
    ),
    Model(
        "afmoe",
        "AfmoeConfig",
        {
            **_EXPERTS,
            "num_shared_experts": 1,
            "route_scale": 2.0,
            "layer_types": ["full_attention"] * 3,
        },
    ),
    Model(
        "exaone_moe",
        "ExaoneMoeConfig",
        {
            **_EXPERTS,
            "num_shared_experts": 1,
            "layer_types": ["full_attention"] * 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    Model(
        "glm4_moe_lite",
        "Glm4MoeLiteConfig",
        {**_ROUTED, **_MLA, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        without=("first_k_dense_replace",),
    ),
    Model(
        "hy_v3",
        "HYV3Config",
        {**_EXPERTS, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    Model(
        "laguna",
        "LagunaConfig",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 20,
            "moe_routed_scaling_factor": 2.5,
            "layer_types": ["full_attention"] * 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    Model(
        "jamba",
        "JambaConfig",
        {
            **_LOCAL,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        block="feed_forward",
        without=("head_dim",),
    ),
    Model(
        "mimo_v2_flash",
        "MiMoV2FlashConfig",
        {**_ROUTED, "routed_scaling_factor": 1.0, "num_key_value_heads": 1, "v_head_dim": 16},
    ),
    Model("solar_open", "SolarOpenConfig", _ROUTED),
    Model("mellum", "MellumConfig", _EXPERTS),
    Model(
        "flex_olmo",
        "FlexOlmoConfig",
        {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "intermediate_size": WIDTH},
    ),
    Model(
        "granitemoeshared",
        "GraniteMoeSharedConfig",
        {**_LOCAL, "shared_intermediate_size": 20},
        block="block_sparse_moe",
    ),
    Model(
        "deepseek_v32",
        "DeepseekV32Config",
        {
            **_ROUTED,
            **_MLA,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 8,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    Model(
        "glm_moe_dsa",
        "GlmMoeDsaConfig",
        {**_ROUTED, **_MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    ),
    Model(
        "kimi_linear",
        "KimiLinearConfig",
        {
            **_ROUTED,
            **_MLA,
            "num_local_experts": EXPERTS,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    Model("qwen4_exp", "Qwen4ExpTextConfig", {**_EXPERTS, "shared_expert_intermediate_size": 20}),
    Model(
        "minimax_m3",
        "MiniMaxM3VLTextConfig",
        {
            **_LOCAL,
            "shared_intermediate_size": 20,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        loudness=4.0,
    ),
    Model(
        "deepseek_v4",
        "DeepseekV4Config",
        {**_ROUTED, "mlp_layer_types": ["moe"] * 3, "swiglu_limit": 2.0},
        loudness=2.0,
    ),
    Model(
        "deepseek_v4 hash",
        "DeepseekV4Config",
        {**_ROUTED, "mlp_layer_types": ["hash_moe"] * 3, "swiglu_limit": 2.0},
        hashed=True,
        arrays=False,
    ),
    Model(
        "nemotron_h",
        "NemotronHConfig",
        {
            **_ROUTED,
            "moe_shared_expert_intermediate_size": 20,
            "layers_block_type": ["mamba", "moe", "moe"],
            "mlp_hidden_act": "relu2",
        },
        block="mixer",
    ),
    Model(
        "nemotron_h latent",
        "NemotronHConfig",
        {
            **_ROUTED,
            "moe_latent_size": 16,
            "moe_shared_expert_intermediate_size": 20,
            "layers_block_type": ["mamba", "moe", "moe"],
            "mlp_hidden_act": "relu2",
        },
        block="mixer",
    ),
    Model(
        "longcat_flash",
        "LongcatFlashConfig",
        {
            **_MLA,
            "head_dim": 8,
            "n_routed_experts": EXPERTS,
            "moe_topk": TOP_K,
            "expert_ffn_hidden_size": WIDTH,
            "zero_expert_num": 3,
            "ffn_hidden_size": 40,
            "routed_scaling_factor": 1.4,
        },
        layer=0,
        saved=False,
    ),
    Model(
        "gemma4",
        "Gemma4TextConfig",
        {
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": WIDTH,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["full_attention"] * 3,
            "num_kv_shared_layers": 0,
        },
        block="",
        arrays=False,
    ),
    Model(
        "glm5_next",
        "Glm5NextTextConfig",
        {
            **_ROUTED,
            **_MLA,
            "qk_rope_head_dim": 0,
            "swiglu_limit": 1.0,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention"] * 3,
        },
        whole="Glm5NextTextModel",
        loudness=2.0,
        without=("first_k_dense_replace",),
    ),
    Model(
        "hy_v4",
        "HYV4Config",
        {**_ROUTED, "swiglu_limit": 1.0, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        loudness=2.0,
        without=("first_k_dense_replace",),
    ),
    Model(
        "dots3_note",
        "Dots3NoteTextConfig",
        {
            **_ROUTED,
            "shared_experts_intermediate_size": 20,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        without=("first_k_dense_replace",),
    ),
    Model(
        "mistral4",
        "Mistral4Config",
        {**_ROUTED, **_MLA, "n_group": 4, "topk_group": 2},
        whole="Mistral4ForCausalLM",
    ),
    Model("qwen3_vl_moe", "Qwen3VLMoeTextConfig", _EXPERTS, whole="Qwen3VLMoeTextModel"),
    Model(
        "granitemoe_swa",
        "GraniteMoeSWAConfig",
        {**_LOCAL, "shared_intermediate_size": 20},
        block="block_sparse_moe",
    ),
    Model("minimax", "MiniMaxConfig", {**_LOCAL, "layer_types": ["full_attention"] * 3}),
    Model(
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        {
            **_LOCAL,
            "shared_intermediate_size": 20,
            "layer_types": ["attention"] * 3,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
        },
        block="block_sparse_moe",
    ),
    Model(
        "qwen3_omni_moe",
        "Qwen3OmniMoeTextConfig",
        {**_EXPERTS, "norm_topk_prob": True},
        whole="Qwen3OmniMoeThinkerTextModel",
    ),
    Model(
        "glm4v_moe",
        "Glm4vMoeTextConfig",
        {
            **_ROUTED,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "mrope_section": [2, 3, 3],
            },
        },
        whole="Glm4vMoeTextModel",
    ),
    Model(
        "glm4_moe groups",
        "Glm4MoeConfig",
        {**_ROUTED, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    ),
    Model(
        "qwen2_moe renormalised",
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 20, "norm_topk_prob": True},
    ),
    Model(
        "olmoe renormalised",
        "OlmoeConfig",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "intermediate_size": WIDTH,
            "norm_topk_prob": True,
        },
    ),
    Model(
        "cohere2_moe",
        "Cohere2MoeConfig",
        {**_LOCAL, "num_experts": EXPERTS, "num_shared_experts": 2},
        without=("num_local_experts",),
    ),
    Model(
        "cohere2_moe sigmoid sum",
        "Cohere2MoeConfig",
        {
            **_LOCAL,
            "num_experts": EXPERTS,
            "num_shared_experts": 1,
            "expert_selection_fn": "sigmoid",
            "shared_expert_combination_strategy": "sum",
        },
        without=("num_local_experts",),
    ),
    Model(
        "cohere2_moe sigmoid average",
        "Cohere2MoeConfig",
        {
            **_LOCAL,
            "num_experts": EXPERTS,
            "num_shared_experts": 1,
            "expert_selection_fn": "sigmoid",
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "prefix_dense_intermediate_size": 40,
        },
        without=("num_local_experts",),
    ),
    Model(
        "bailing_hybrid",
        "BailingHybridConfig",
        {
            **_EXPERTS,
            **_MLA,
            "num_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
]

#: Model -> architecture. DeepSeek-V2 with groups is missing: llama.cpp scores a group by its best
#: two experts, transformers by the best one. So is Dots3 with shared experts of a width of their
#: own, which a file counts in widths of an expert.
ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe": "qwen35moe",
    "qwen2_moe": "qwen2moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "llama4": "llama4",
    "minimax_m2": "minimax-m2",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "dots1": "dots1",
    "lfm2_moe": "lfm2moe",
    "afmoe": "afmoe",
    "exaone_moe": "exaone-moe",
    "jamba": "jamba",
    "mellum": "mellum",
    "minimax": "minimax-01",
    "granitemoehybrid": "granitehybrid",
    "granitemoe_swa": "granite_swa",
    "glm4v_moe": "glm4moe",
    "glm4_moe groups": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "glm5_next": "glm5-next",
    "hy_v4": "hy_v4",
    "solar_open": "glm4moe",
    "qwen3_vl_moe": "qwen3vlmoe",
    "qwen4_exp": "qwen4exp",
    "laguna": "laguna",
    "mistral4": "mistral4",
    "deepseek_v4": "deepseek4",
    "lfm2_moe scaled": "lfm2moe",
    "cohere2_moe": "cohere2moe",
    "cohere2_moe sigmoid average": "cohere2moe",
    "mimo_v2_flash": "mimo2",
    "kimi_linear": "kimi-linear",
    "minimax_m3": "minimax-m3",
    "hy_v3": "hy_v3",
    "deepseek_v32": "deepseek32",
    "nemotron_h": "nemotron_h_moe",
    "nemotron_h latent": "nemotron_h_moe",
}

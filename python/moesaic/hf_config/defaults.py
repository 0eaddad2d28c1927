"""What a field means that config.json lacks: the default of each model type in transformers 5.24.

transformers fills an absent field from the type's configuration class, and classes of one family
differ: 2.446 and 1.0 are both a ``routed_scaling_factor`` that no file states. Fields stand under
the first name that ``families`` reads. Missing here is what has no default in transformers, and
every field of types that transformers does not define; such a field must be there.

``first_k_dense_replace`` also says what the classes make of an absent ``mlp_layer_types``.
"""

from collections.abc import Mapping
from typing import Any


def defaults_of(model_type: object) -> Mapping[str, Any]:
    """The defaults of a model type, or of the text model inside of it."""
    if not isinstance(model_type, str):
        return {}
    return DEFAULTS.get(model_type) or DEFAULTS.get(f"{model_type}_text") or {}


DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 14336, "hidden_act": "silu",
    },
    "minimax": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 14336, "hidden_act": "silu",
    },
    "olmoe": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "intermediate_size": 2048, "norm_topk_prob": False, "hidden_act": "silu",
    },
    "flex_olmo": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_experts": 7, "num_experts_per_tok": 5,
        "intermediate_size": 11008, "norm_topk_prob": False, "hidden_act": "silu",
    },
    "qwen3_moe": {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
        "hidden_act": "silu", "decoder_sparse_step": 1,
    },
    "mellum": {
        "hidden_size": 2304, "num_hidden_layers": 28, "num_experts": 64, "num_experts_per_tok": 8,
        "moe_intermediate_size": 896, "norm_topk_prob": True, "hidden_act": "silu",
        "decoder_sparse_step": 1,
    },
    "qwen3_omni_moe_text": {
        "hidden_size": 2048, "num_hidden_layers": 28, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "hidden_act": "silu",
        "decoder_sparse_step": 1,
    },
    "qwen3_omni_moe_talker_text": {
        "hidden_size": 1024, "num_hidden_layers": 20, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 384, "norm_topk_prob": False, "hidden_act": "silu",
        "decoder_sparse_step": 1,
    },
    "qwen2_moe": {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "hidden_act": "silu",
        "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1,
    },
    "qwen3_next": {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512, "norm_topk_prob": True,
        "hidden_act": "silu", "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1,
    },
    "qwen4_exp_text": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512, "norm_topk_prob": True,
        "hidden_act": "silu", "shared_expert_intermediate_size": 512,
    },
    "qwen3_5_moe_text": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 512, "hidden_act": "silu",
        "shared_expert_intermediate_size": 512,
    },
    "qwen3_vl_moe_text": {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "hidden_act": "silu", "decoder_sparse_step": 1,
    },
    "deepseek_v2": {
        "hidden_size": 4096, "num_hidden_layers": 32, "n_routed_experts": 64,
        "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "hidden_act": "silu",
        "n_shared_experts": 2, "first_k_dense_replace": 0, "topk_method": "greedy",
    },
    "deepseek_v3": {
        "hidden_size": 7168, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
        "hidden_act": "silu", "n_shared_experts": 1, "first_k_dense_replace": 3,
    },
    "glm4_moe": {
        "hidden_size": 4096, "num_hidden_layers": 46, "num_nextn_predict_layers": 1,
        "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "hidden_act": "silu", "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "glm4v_moe_text": {
        "hidden_size": 4096, "num_hidden_layers": 46, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "dots1": {
        "hidden_size": 4608, "num_hidden_layers": 62, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "hidden_act": "silu", "first_k_dense_replace": 0,
    },
    "solar_open": {
        "hidden_size": 4096, "num_hidden_layers": 48, "n_routed_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1280, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "n_shared_experts": 1, "first_k_dense_replace": 0,
    },
    "deepseek_v32": {
        "hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "hidden_act": "silu",
        "n_shared_experts": 1, "first_k_dense_replace": 3,
    },
    "glm4_moe_lite": {
        "hidden_size": 2048, "num_hidden_layers": 47, "n_routed_experts": 64,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1536, "norm_topk_prob": True,
        "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "glm_moe_dsa": {
        "hidden_size": 6144, "num_hidden_layers": 78, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "n_shared_experts": 1, "first_k_dense_replace": 3,
    },
    "glm5_next_text": {
        "hidden_size": 4096, "num_hidden_layers": 45, "n_routed_experts": 288,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "swiglu_limit": 10.0,
        "n_shared_experts": 1, "first_k_dense_replace": 3,
    },
    "hy_v4": {
        "hidden_size": 2816, "num_hidden_layers": 34, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "routed_scaling_factor": 2.827, "n_group": 1, "topk_group": 1, "swiglu_limit": 10.0,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "hidden_size": 5120, "num_hidden_layers": 46, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "shared_experts_intermediate_size": 1536, "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "mistral4": {
        "hidden_size": 4096, "num_hidden_layers": 36, "n_routed_experts": 128,
        "num_experts_per_tok": 4, "moe_intermediate_size": 2048, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "n_shared_experts": 1, "first_k_dense_replace": 0,
    },
    "exaone_moe": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_experts": 64,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1024, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "num_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "mimo_v2_flash": {
        "hidden_size": 4096, "num_hidden_layers": 48, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "first_k_dense_replace": 1,
    },
    "kimi_linear": {
        "hidden_size": 2304, "num_hidden_layers": 27, "num_local_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1024, "norm_topk_prob": True,
        "routed_scaling_factor": 2.446, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "bailing_hybrid": {
        "hidden_size": 2560, "num_hidden_layers": 42, "num_nextn_predict_layers": 1,
        "num_local_experts": 512, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
        "hidden_act": "silu", "n_shared_experts": 1, "first_k_dense_replace": 2,
    },
    "gpt_oss": {
        "hidden_size": 2880, "num_hidden_layers": 36, "num_local_experts": 128,
        "num_experts_per_tok": 4, "intermediate_size": 2880, "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
    },
    "llama4_text": {
        "hidden_size": 5120, "num_hidden_layers": 48, "num_local_experts": 16,
        "num_experts_per_tok": 1, "intermediate_size": 8192, "hidden_act": "silu",
        "interleave_moe_layer_step": 1,
    },
    "cohere2_moe": {
        "hidden_size": 8192, "num_hidden_layers": 40, "num_experts": 8, "num_experts_per_tok": 2,
        "intermediate_size": 22528, "norm_topk_prob": True, "hidden_act": "silu",
        "expert_selection_fn": "softmax", "num_shared_experts": 0,
        "shared_expert_combination_strategy": "average", "first_k_dense_replace": 0,
    },
    "minimax_m2": {
        "hidden_size": 3072, "num_hidden_layers": 62, "num_local_experts": 256,
        "num_experts_per_tok": 8, "intermediate_size": 1536, "hidden_act": "silu",
    },
    "granitemoe": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 11008, "hidden_act": "silu",
    },
    "granitemoeshared": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 11008, "hidden_act": "silu",
        "shared_intermediate_size": 0,
    },
    "granitemoehybrid": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 11008, "hidden_act": "silu",
        "shared_intermediate_size": 1024,
    },
    "granitemoe_swa": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 11008, "hidden_act": "silu",
        "shared_intermediate_size": 0,
    },
    "ernie4_5_moe": {
        "hidden_size": 2560, "num_hidden_layers": 28, "moe_num_experts": 64, "moe_k": 6,
        "moe_intermediate_size": 1536, "moe_norm_min": 1e-12, "hidden_act": "silu",
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
    "hunyuan_v1_moe": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_experts": 1, "moe_topk": 1,
        "intermediate_size": 11008, "hidden_act": "silu",
    },
    "lfm2_moe": {
        "hidden_size": 2048, "num_hidden_layers": 32, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1792, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
        "num_dense_layers": 2, "use_expert_bias": True,
    },
    "afmoe": {
        "hidden_size": 2048, "num_hidden_layers": 32, "num_experts": 64, "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408, "route_scale": 1.0, "hidden_act": "silu",
        "num_shared_experts": 2, "num_dense_layers": 1,
    },
    "hy_v3": {
        "hidden_size": 4096, "num_hidden_layers": 80, "num_experts": 192,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "router_scaling_factor": 2.826,
        "hidden_act": "silu", "num_shared_experts": 1, "first_k_dense_replace": 1,
    },
    "laguna": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 512, "moe_routed_scaling_factor": 1.0,
        "hidden_act": "silu", "shared_expert_intermediate_size": 512, "first_k_dense_replace": 1,
    },
    "jamba": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_experts": 16, "num_experts_per_tok": 2,
        "intermediate_size": 14336, "hidden_act": "silu", "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "nemotron_h": {
        "hidden_size": 4096, "num_nextn_predict_layers": 0, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 7688, "norm_topk_prob": True,
        "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "mlp_hidden_act": "relu2",
        "moe_shared_expert_intermediate_size": 7688, "moe_latent_size": None,
    },
    "minimax_m3_vl_text": {
        "hidden_size": 6144, "num_hidden_layers": 60, "num_local_experts": 128,
        "num_experts_per_tok": 4, "intermediate_size": 3072, "routed_scaling_factor": 2.0,
        "swiglu_limit": 7.0, "swiglu_alpha": 1.702, "shared_intermediate_size": 3072,
        "first_k_dense_replace": 0,
    },
    "deepseek_v4": {
        "hidden_size": 4096, "num_hidden_layers": 43, "num_nextn_predict_layers": 1,
        "n_routed_experts": 256, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
        "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
        "vocab_size": 129280, "num_hash_layers": 3,
    },
    "longcat_flash": {
        "hidden_size": 6144, "num_layers": 28, "n_routed_experts": 512, "moe_topk": 12,
        "expert_ffn_hidden_size": 2048, "routed_scaling_factor": 6.0, "zero_expert_num": 256,
        "hidden_act": "silu",
    },
    "gemma4_text": {
        "hidden_size": 2304, "num_hidden_layers": 30, "hidden_activation": "gelu_pytorch_tanh",
        "enable_moe_block": False, "rms_norm_eps": 1e-06,
    },
}  # fmt: skip

"""Names of the tensors of an MoE layer in checkpoints of Hugging Face, by model type.

As the published checkpoints have them, one tensor for each matrix; the sources are the modules of
transformers that ``hf_config.families`` names.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Naming:
    """Names behind ``model.layers.N.``, and what stands for gate, up and down."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate.weight"
    selection_bias: str = ""
    bias_shape: tuple[int, ...] = (-1,)
    shared: str = ""
    shared_gate: str = ""

    def expert(self, expert: int, role: str) -> str:
        return f"{self.block}.experts.{expert}.{getattr(self, role)}.weight"

    def shared_expert(self, role: str) -> str:
        return f"{self.block}.{self.shared}.{getattr(self, role)}.weight"


_QWEN = Naming()
_MIXTRAL = Naming("block_sparse_moe", "w1", "w3", "w2")
_GATED = replace(_QWEN, shared="shared_expert", shared_gate="shared_expert_gate.weight")
_SHARED = replace(_QWEN, shared="shared_experts")
_DEEPSEEK = replace(_SHARED, selection_bias="gate.e_score_correction_bias")

NAMINGS = {
    "mixtral": _MIXTRAL,
    "minimax_m2": replace(_MIXTRAL, selection_bias="e_score_correction_bias"),
    "olmoe": _QWEN,
    "flex_olmo": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen2_moe": _GATED,
    "qwen3_next": _GATED,
    "deepseek_v2": _SHARED,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "dots1": _DEEPSEEK,
    "mimo_v2_flash": _DEEPSEEK,
    "ernie4_5_moe": replace(
        _SHARED, selection_bias="moe_statics.e_score_correction_bias", bias_shape=(1, -1)
    ),
    "hunyuan_v1_moe": replace(_QWEN, router="gate.wg.weight", shared="shared_mlp"),
    "jamba": Naming("feed_forward", router="router.weight"),
    "lfm2_moe": Naming("feed_forward", "w1", "w3", "w2", selection_bias="expert_bias"),
}

"""Conversions and their sources, for the tests of what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from files import bf16_bits, write_checkpoint, write_small
from hf_experts import per_expert
from values import expert_weights, normal

import moesaic as mo
from moesaic.saving.convert import Types, planned, write_plan

E, H, I, K = 3, 64, 96, 2
LAYERS = (1, 2)


def convert(source, target, types: Types, *, other=None, layers=None, architecture=None, **options):
    with planned(source, types, layers, other, architecture) as plan:
        write_plan(plan, Path(target), **options)
    return target


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def encoded(values: np.ndarray, type: str) -> np.ndarray:
    return mo.testing.quantize(np.ascontiguousarray(values, np.float32), type)


def expert_bytes(file: mo.GgufFile, name: str) -> np.ndarray:
    return np.array(file.tensors[name].data)


def small_source(path: Path) -> Path:
    """Two layers of 8 experts in Q8_0, with shared experts."""
    write_small(
        path, layers=2, gate_type="Q8_0", down_type="F16", intermediate=256, arch="qwen2moe",
        shared_intermediate=64,
    )  # fmt: skip
    return path


def checkpoint(folder: Path, extra: dict | None = None, **fields) -> Path:
    """Layers 1 and 2 of a model whose layer 0 is dense, with shared experts and attention."""
    tensors = {
        "model.embed_tokens.weight": normal(8, H), "lm_head.weight": normal(8, H),
        "model.norm.weight": bf16_bits(normal(H)), **(extra or {}),
    }  # fmt: skip
    for layer in LAYERS:
        block = f"model.layers.{layer}.mlp"
        matrices = expert_weights(E, H, I, seed=layer)
        tensors |= per_expert(*matrices, base=f"{block}.experts")
        shared = expert_weights(1, H, I, seed=10 + layer)
        for name, matrix in zip(("gate_proj", "up_proj", "down_proj"), shared, strict=True):
            tensors[f"{block}.shared_expert.{name}.weight"] = matrix[0].astype(np.float16)
        tensors[f"{block}.gate.weight"] = normal(E, H, seed=layer)
        tensors[f"{block}.shared_expert_gate.weight"] = normal(1, H, seed=layer)
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = normal(H, H)
    config = {
        "model_type": "qwen2_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
        "num_experts_per_tok": K, "num_hidden_layers": 3, "mlp_only_layers": [0],
        "decoder_sparse_step": 1, "shared_expert_intermediate_size": I, "norm_topk_prob": False,
        **fields,
    }  # fmt: skip
    return write_checkpoint(folder, tensors, config, {"model.norm.weight": "BF16"})

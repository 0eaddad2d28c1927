"""Small files for tests, written on the spot."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from values import expert_weights, normal

import moesaic as mo


@dataclass(frozen=True)
class Small:
    """A small GGUF file and its weights as decoded."""

    path: Path
    weights: list[mo.testing.MoeWeights]
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


def write_small(path: Path, **changes) -> Small:
    sizes = {"num_experts": 8, "top_k": 3, "hidden": 256, "intermediate": 512, **changes}
    weights = mo.testing.write_moe_gguf(path, **sizes)
    names = ("num_experts", "top_k", "hidden", "intermediate")
    return Small(path, weights, **{n: sizes[n] for n in names})


def write_safetensors(path: Path, tensors: dict, types: dict | None = None) -> Path:
    """One file; ``types`` names the dtypes of tensors for which numpy has no name.

    Those are written under the name of the integer of their size, and their header is changed.
    """
    writer = pytest.importorskip("safetensors.numpy")
    writer.save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path)
    if types:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, dtype in types.items():
            header[name]["dtype"] = dtype
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def write_checkpoint(folder: Path, tensors: dict, config: dict, types: dict | None = None) -> Path:
    """A folder as Hugging Face has it: config.json and one file of tensors."""
    write_safetensors(folder / "model.safetensors", tensors, types)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_small_checkpoint(folder: Path) -> Path:
    """One layer of Qwen3 MoE: 8 experts [32, 64], of which each token gets 2."""
    gate, up, down = expert_weights(8, 64, 32)
    tensors = {"model.layers.0.mlp.gate.weight": normal(8, 64)}
    for e in range(8):
        stem = f"model.layers.0.mlp.experts.{e}"
        tensors |= {
            f"{stem}.gate_proj.weight": gate[e], f"{stem}.up_proj.weight": up[e],
            f"{stem}.down_proj.weight": down[e],
        }  # fmt: skip
    config = {
        "model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    }  # fmt: skip
    return write_checkpoint(folder, tensors, config)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """The upper halves of f32 values: BF16 by dropping bits, for type "BF16" of a file."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

"""Small files for tests, written on the spot."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

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


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """The upper halves of f32 values: BF16 by dropping bits, for type "BF16" of a file."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

"""Element types and small model files, for tests, demo and bench."""

from __future__ import annotations  # numpy.random is not worth its import time here

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._arguments import checked
from moesaic._core import dequantize, quantize

__all__ = ["MoeWeights", "dequantize", "quant_types", "quantize", "write_moe_gguf"]


def quant_types() -> dict[str, dict[str, Any]]:
    """Return facts of every known element type, by name.

    Returns
    -------
    dict of dict
        id (ggml's number), block_elems, block_bytes, bits_per_weight, decodes, encodes,
        takes_weights (of an importance matrix) and gguf (whether ggml has it, and so its files).
    """
    return _core.quant_types()


@dataclass(frozen=True)
class MoeWeights:
    """One layer of a file by ``write_moe_gguf``: what its quantised bytes decode to, in f32.

    Parameters
    ----------
    router : f32 array [E, H]
        Router.
    gate, up : f32 array [E, I, H]
        Routed experts.
    down : f32 array [E, H, I]
        Routed experts.
    shared_gate, shared_up : f32 array [S, H], optional
        Shared experts, with an intermediate size of S.
    shared_down : f32 array [H, S], optional
        Shared experts.
    shared_router : f32 array [H], optional
        Weight of the sigmoid that scales the shared experts.
    """

    router: npt.NDArray[np.float32]
    gate: npt.NDArray[np.float32]
    up: npt.NDArray[np.float32]
    down: npt.NDArray[np.float32]
    shared_gate: npt.NDArray[np.float32] | None = None
    shared_up: npt.NDArray[np.float32] | None = None
    shared_down: npt.NDArray[np.float32] | None = None
    shared_router: npt.NDArray[np.float32] | None = None


def _random(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    """Values that keep a row's dot product with a unit-variance x near 1."""
    return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)


@checked
def write_moe_gguf(
    path: str | PathLike[str],
    *,
    num_experts: int = 8,
    top_k: int = 2,
    hidden: int = 256,
    intermediate: int = 256,
    layers: int = 1,
    gate_type: str = "Q4_K",
    up_type: str | None = None,
    down_type: str = "Q6_K",
    fused_gate_up: bool = False,
    shared_intermediate: int = 0,
    arch: str = "qwen3moe",
    seed: int = 0,
) -> list[MoeWeights]:
    """Write a GGUF file with the MoE tensors of a small model and random weights.

    Parameters
    ----------
    path : str or path-like
        The file, which is overwritten.
    num_experts : int
        E.
    top_k : int
        Experts per token.
    hidden : int
        H.
    intermediate : int
        I.
    layers : int
        Blocks, each with experts.
    gate_type : str
        Element type of the gate, as ggml spells it.
    up_type : str, optional
        Element type of the up matrices. None: that of the gate.
    down_type : str
        Element type of the down matrices.
    fused_gate_up : bool
        Whether gate and up are one tensor, which has one type.
    shared_intermediate : int
        I of shared experts with a sigmoid gate, as qwen2moe has them; 0: none.
    arch : str
        Architecture string of the file.
    seed : int
        Seed of the random weights.

    Returns
    -------
    list of MoeWeights
        The weights of each layer, as the bytes of the file decode.

    Raises
    ------
    ConfigError, UnsupportedError, ShapeError
        As ``quantize``; also two types for a fused tensor.
    OSError
        The file cannot be written.
    """
    import gguf

    up_type = up_type or gate_type
    if fused_gate_up and up_type != gate_type:
        raise _core.make_error(
            _core.ConfigError,
            "write_moe_gguf",
            "up_type",
            f"{gate_type}, as gate_type",
            up_type,
            "a fused tensor has one type",
        )
    facts = quant_types()
    for name, quant in (("gate_type", gate_type), ("up_type", up_type), ("down_type", down_type)):
        if quant in facts and not facts[quant]["gguf"]:
            raise _core.make_error(
                _core.ConfigError, "write_moe_gguf", name, "a type that GGUF has", quant
            )
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_expert_feed_forward_length(intermediate)
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(top_k)
    if shared_intermediate:
        writer.add_expert_shared_feed_forward_length(shared_intermediate)

    def add(name: str, values: npt.NDArray[np.float32], quant: str) -> npt.NDArray[np.float32]:
        data = quantize(values, quant)
        # gguf takes any bytes for any number of a type, unless they are uint8.
        number = _core.quant_types()[quant]["id"]
        writer.add_tensor(name, data.view(np.int8), values.shape, raw_dtype=number)
        return dequantize(data, quant, values.shape)

    weights = []
    for layer in range(layers):
        block = f"blk.{layer}."
        router = add(block + "ffn_gate_inp.weight", _random(rng, num_experts, hidden) * 2, "F32")
        gate = _random(rng, num_experts, intermediate, hidden)
        up = _random(rng, num_experts, intermediate, hidden)
        if fused_gate_up:
            both = np.concatenate([gate, up], axis=1)
            both = add(block + "ffn_gate_up_exps.weight", both, gate_type)
            gate, up = np.split(both, 2, axis=1)
        else:
            gate = add(block + "ffn_gate_exps.weight", gate, gate_type)
            up = add(block + "ffn_up_exps.weight", up, up_type)
        down = _random(rng, num_experts, hidden, intermediate)
        down = add(block + "ffn_down_exps.weight", down, down_type)
        if not shared_intermediate:
            weights.append(MoeWeights(router, gate, up, down))
            continue
        shared = [
            add(block + f"ffn_{role}_shexp.weight", _random(rng, *shape), "F32")
            for role, shape in (
                ("gate", (shared_intermediate, hidden)),
                ("up", (shared_intermediate, hidden)),
                ("down", (hidden, shared_intermediate)),
            )
        ]
        shared_router = add(block + "ffn_gate_inp_shexp.weight", _random(rng, hidden), "F32")
        shared_gate, shared_up, shared_down = shared
        weights.append(
            MoeWeights(router, gate, up, down, shared_gate, shared_up, shared_down, shared_router)
        )

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights

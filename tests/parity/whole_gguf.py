"""Whole models as GGUF files, written as the converter of llama.cpp writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from test_gguf import GATING

import moesaic as mo
from moesaic.transformers.gguf_names import ARCHITECTURES, names_of
from moesaic.transformers.layouts import experts_of, layer_of, weights_of


def undone(key: str, values: torch.Tensor, config: Any, arch: str) -> torch.Tensor:
    """What the writer does to a tensor, stated as it is done there."""
    if arch == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
        return halves.swapaxes(1, 2).reshape(values.shape)
    if arch != "qwen35moe":
        return values
    if key.endswith("norm.weight") and "linear_attn" not in key:
        return values + 1
    if "linear_attn" not in key or key.endswith("norm.weight"):
        return values
    keys, per = (
        config.linear_num_key_heads,
        config.linear_num_value_heads // config.linear_num_key_heads,
    )
    width = config.linear_value_head_dim

    def tiled(part: torch.Tensor, size: int) -> torch.Tensor:
        """Heads by keys -> heads beside those of other keys."""
        return part.reshape(keys, per, size, *part.shape[1:]).swapaxes(0, 1).reshape(part.shape)

    if key.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        values = values.squeeze(1) if "conv1d" in key else values
        before = 2 * config.linear_key_head_dim * keys
        return torch.cat([values[:before], tiled(values[before:], width)])
    if key.endswith("in_proj_z.weight"):
        return tiled(values, width)
    if key.endswith("out_proj.weight"):
        return tiled(values.T, width).T
    return tiled(-values.exp() if key.endswith("A_log") else values, 1)


def write(
    path: Path,
    arch: str,
    model: Any,
    quants: dict[str, str] | None = None,
    *,
    drafts: int = 0,
    more: tuple[str, ...] = (),
    keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """``quants`` has types by ends of the names in the file; other tensors are f32.

    ``drafts`` blocks behind the last predict further tokens; ``more`` are names of other tensors;
    ``keys`` adds metadata.
    """
    config = model.config.get_text_config()
    writer = gguf.GGUFWriter(path, arch)
    layer = mo.MoeConfig.from_hf(config, layer_of(experts_of(model, "write")[0][0]))
    for key, value in {
        "block_count": config.num_hidden_layers + drafts,
        "nextn_predict_layers": drafts,
        "embedding_length": layer.hidden_size,
        "feed_forward_length": layer.intermediate_size,
        "expert_feed_forward_length": layer.intermediate_size,
        "expert_count": layer.num_experts,
        "expert_used_count": layer.top_k,
        "expert_gating_func": GATING[layer.router.score],
        "leading_dense_block_count": layer_of(experts_of(model, "write")[0][0]),
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": getattr(config, "head_dim", None) or 16,
        "attention.value_length": getattr(config, "head_dim", None) or 16,
        "vocab_size": config.vocab_size,
    }.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_bool(f"{arch}.expert_weights_norm", layer.router.renormalize)
    writer.add_float32(f"{arch}.expert_weights_scale", layer.router.scale)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    theta = getattr(config, "rope_parameters", {}).get("rope_theta", 10000.0)
    writer.add_float32(f"{arch}.rope.freq_base", theta)
    keys(writer)

    def add(name: str, values: torch.Tensor) -> None:
        data = np.ascontiguousarray(values.detach().float().numpy())
        quant = next((q for end, q in (quants or {}).items() if name.endswith(end)), None)
        if quant is None:
            writer.add_tensor(name, data)
        else:
            kind = gguf.GGMLQuantizationType[quant]
            writer.add_tensor(name, mo.quantize(data, quant), raw_dtype=kind)

    name_of = names_of(arch, ARCHITECTURES[arch], config.num_hidden_layers)
    for key, values in model.state_dict().items():
        if ".experts." in key or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue
        add(name_of(key), undone(key, values.float(), config, arch).squeeze())
    for name, module in experts_of(model, "write"):
        weights, block = weights_of(module), f"blk.{layer_of(name)}.ffn_"
        for role in ("gate", "up", "down"):
            add(f"{block}{role}_exps.weight", getattr(weights, role))
        for role, values in weights.biases.items():
            add(f"{block}{role}_exps.bias", values)
    for name in (
        *more,
        *(f"blk.{config.num_hidden_layers + i}.nextn.eh_proj.weight" for i in range(drafts)),
    ):
        add(name, torch.zeros(32, 64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""Where a GGUF file keeps the tensors of a model of transformers, and what its writer did to them.

Names are those of the ``gguf`` package's map. An architecture is here when what the converter of
llama.cpp (convert_hf_to_gguf) does to its tensors is known; others are refused, since a tensor by
the right name may still be permuted, shifted or scaled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moesaic import _core
from moesaic._errors import error_of

#: Tensors that say nothing beyond the configuration.
IGNORED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.input_scale")
#: Experts, which are opened by layer.
EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale)")


@dataclass(frozen=True)
class Change:
    """What turns a tensor of the file into one of the model, in this order."""

    rows: torch.Tensor | None = None  # row i of the model is row rows[i] of the file
    columns: torch.Tensor | None = None
    values: Callable[[torch.Tensor], torch.Tensor] | None = None

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            tensor = tensor[self.rows]
        if self.columns is not None:
            tensor = tensor[:, self.columns]
        return tensor if self.values is None else self.values(tensor)


@dataclass(frozen=True)
class Architecture:
    """A row of the table: an architecture of GGUF and the models that it stands for."""

    model_types: tuple[str, ...]
    #: Ends of the model's keys, and how the file ends them after ``blk.N.``.
    names: Mapping[str, str] = field(default_factory=dict)
    #: What was done to the tensor of a key, of a model with this configuration.
    change: Callable[[str, Any], Change | None] = lambda key, config: None


def _halves_of_heads(key: str, config: Any) -> Change | None:
    """Llama: rows of a head interleaved for its rotary embedding, not one half after the other."""
    if not re.search(r"\.(q|k)_proj\.(weight|bias)$", key):
        return None
    queries = ".q_proj." in key
    heads = config.num_attention_heads if queries else config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = torch.arange(heads * width).reshape(heads, width // 2, 2)
    return Change(rows=rows.transpose(1, 2).reshape(-1))


def _by_value_head(config: Any, width: int) -> torch.Tensor:
    """Qwen3.5: value heads lie beside those of other keys in the file, by keys in the model."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    tiled = torch.arange(values * width).reshape(values // keys, keys, width)
    return tiled.transpose(0, 1).reshape(-1)


def _minus_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor - 1


def _log_negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch.log(-tensor)


def _qwen35(key: str, config: Any) -> Change | None:
    name = key.removesuffix(".weight").rpartition(".")[2]
    if name.endswith("norm"):
        # Norms of the model count from zero, but for the one inside of the linear attention.
        return None if ".linear_attn." in key else Change(values=_minus_one)
    if ".linear_attn." not in key:
        return None
    width = config.linear_value_head_dim
    if name in ("in_proj_qkv", "conv1d"):  # only the values of query, key and value
        before = 2 * config.linear_key_head_dim * config.linear_num_key_heads
        values = before + _by_value_head(config, width)
        return Change(rows=torch.cat([torch.arange(before), values]))
    if name == "in_proj_z":
        return Change(rows=_by_value_head(config, width))
    if name == "out_proj":
        return Change(columns=_by_value_head(config, width))
    return Change(rows=_by_value_head(config, 1), values=_log_negated if name == "A_log" else None)


_SELECTION_BIAS = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen3moe": Architecture(("qwen3_moe",)),
    "qwen2moe": Architecture(("qwen2_moe",)),
    "olmoe": Architecture(("olmoe",)),
    "gpt-oss": Architecture(("gpt_oss",), {"self_attn.sinks": "attn_sinks.weight"}),
    "llama": Architecture(("mixtral",), change=_halves_of_heads),
    "glm4moe": Architecture(("glm4_moe",), _SELECTION_BIAS),
    "dots1": Architecture(("dots1",), _SELECTION_BIAS),
    "qwen35moe": Architecture(
        ("qwen3_5_moe_text",),
        {"linear_attn.dt_bias": "ssm_dt.bias", "linear_attn.A_log": "ssm_a"},
        _qwen35,
    ),
}


def architecture_of(file: _core.GgufFile, model_type: str) -> tuple[str, Architecture]:
    """The row of a file. Raises UnsupportedError without one, or for another model type."""
    name = str(file.metadata.get("general.architecture"))
    row = ARCHITECTURES.get(name)
    if row is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise error_of(
            _core.UnsupportedError, "from_gguf", "architecture", f"one of {known}", name,
            "from_pretrained with MoesaicConfig(experts=...) takes the experts of any that opens",
        )  # fmt: skip
    if model_type not in row.model_types:
        raise error_of(
            _core.UnsupportedError,
            "from_gguf",
            "model_type",
            f"{' or '.join(row.model_types)} for a file of {name}",
            model_type,
        )
    return name, row


def names_of(architecture: str, row: Architecture, layers: int) -> Callable[[str], str | None]:
    """What gives the name in the file for a key of the model's state_dict."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, layers)

    def name_of(key: str) -> str | None:
        for end, name in row.names.items():
            found = re.fullmatch(rf"model\.layers\.(\d+)\.{re.escape(end)}", key)
            if found:
                return f"blk.{found[1]}.{name}"
        return known.get_name(key, try_suffixes=(".weight", ".bias"))

    return name_of

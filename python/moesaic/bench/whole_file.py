"""A GGUF file of a whole model with random weights, for the bench of whole models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import moesaic as mo

if TYPE_CHECKING:
    import gguf


#: Of the shape as it is.
NAME = "Qwen3-30B-A3B's shape"


@dataclass(frozen=True)
class WholeShape:
    """A model of Qwen3 MoE's architecture, of fewer layers and words than people run."""

    layers: int = 4
    hidden: int = 2048
    intermediate: int = 768
    num_experts: int = 128
    top_k: int = 8
    heads: int = 32
    key_heads: int = 4
    head_width: int = 128
    words: int = 16384
    context: int = 2048
    gate_up_type: str = "Q4_K"
    down_type: str = "Q6_K"
    matrix_type: str = "Q4_K"

    def config(self) -> Any:
        """What transformers makes a model of."""
        import transformers

        return transformers.Qwen3MoeConfig(
            vocab_size=self.words,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            moe_intermediate_size=self.intermediate,
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_width,
            max_position_embeddings=self.context,
            rope_theta=_THETA,
            rms_norm_eps=_EPS,
            tie_word_embeddings=False,
        )


_THETA, _EPS = 1e6, 1e-6


def write_whole_gguf(path: Path, shape: WholeShape) -> None:
    """Write the file. Experts are drawn in pairs that repeat, which changes no time."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3moe")
    _write_facts(writer, shape)
    rng = np.random.default_rng(0)

    def encoded(quant: str, *sizes: int) -> npt.NDArray[Any]:
        values = rng.standard_normal(sizes, np.float32)
        return mo.quantize(values * np.float32(sizes[-1] ** -0.5), quant)

    def matrix(name: str, quant: str, *sizes: int) -> None:
        data = encoded(quant, *sizes)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[quant])

    def experts(name: str, quant: str, *sizes: int) -> None:
        data = np.tile(encoded(quant, 2, *sizes), (shape.num_experts // 2, 1, 1))
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[quant])

    def ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    queries, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    inner, hidden = shape.intermediate, shape.hidden
    matrix("token_embd", shape.matrix_type, shape.words, hidden)
    matrix("output", shape.matrix_type, shape.words, hidden)
    ones("output_norm", hidden)
    for i in range(shape.layers):
        block = f"blk.{i}"
        matrix(f"{block}.attn_q", shape.matrix_type, queries, hidden)
        matrix(f"{block}.attn_k", shape.matrix_type, keys, hidden)
        matrix(f"{block}.attn_v", shape.matrix_type, keys, hidden)
        matrix(f"{block}.attn_output", shape.matrix_type, hidden, queries)
        for name, size in (("q", shape.head_width), ("k", shape.head_width)):
            ones(f"{block}.attn_{name}_norm", size)
        ones(f"{block}.attn_norm", hidden)
        ones(f"{block}.ffn_norm", hidden)
        router = rng.standard_normal((shape.num_experts, hidden), np.float32)
        writer.add_tensor(f"{block}.ffn_gate_inp.weight", router * np.float32(0.02))
        experts(f"{block}.ffn_gate_exps", shape.gate_up_type, inner, hidden)
        experts(f"{block}.ffn_up_exps", shape.gate_up_type, inner, hidden)
        experts(f"{block}.ffn_down_exps", shape.down_type, hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_facts(writer: gguf.GGUFWriter, shape: WholeShape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(3 * shape.hidden)
    writer.add_expert_feed_forward_length(shape.intermediate)
    writer.add_expert_count(shape.num_experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(_EPS)
    writer.add_rope_freq_base(_THETA)
    _write_words(writer, shape.words)


def _write_words(writer: gguf.GGUFWriter, count: int) -> None:
    """A tokenizer of GPT-2's kind: llama.cpp opens no model without words."""
    # Each byte has a letter; those that print, their own, and the others behind all of them.
    prints = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in prints] + [chr(256 + i) for i in range(256 - len(prints))]
    more = [f"word{i}" for i in range(count)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*(letters + more)[: count - 2], "ab", "<|endoftext|>"])
    writer.add_token_types([1] * (count - 1) + [3])  # the last controls
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(count - 1)

"""A whole model from one GGUF file. Does nothing without torch and transformers.

Run with a file of yours (Qwen3 MoE, Qwen2 MoE, Mixtral, gpt-oss and others), or without one to
write a small one first.
"""

import sys
import tempfile
import time
from pathlib import Path

try:
    import torch
    import transformers
except ImportError:
    print("torch is not installed, or transformers: nothing to show")
    sys.exit(0)

import gguf

import moesaic as mo
import moesaic.transformers as mt

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


def write_small(path: Path) -> None:
    """A Qwen3 MoE model with random weights, all of its matrices encoded."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in {
        "block_count": 2,
        "context_length": 1024,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "expert_feed_forward_length": 256,
        "expert_count": 16,
        "expert_used_count": 4,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "vocab_size": 512,
    }.items():
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("qwen3moe.rope.freq_base", 10000.0)

    def add(name: str | None, tensor: torch.Tensor) -> None:
        assert name is not None
        values = tensor.detach().numpy()
        if values.ndim == 1 or "ffn_gate_inp" in name:  # norms and routers
            writer.add_tensor(name, values)
            return
        quant = "Q6_K" if "down" in name else "Q4_K"
        data = mo.quantize(values, quant)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[quant])

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    for key, tensor in model.state_dict().items():
        if ".experts." not in key:
            add(names.get_name(key, try_suffixes=(".weight",)), tensor)
    for i, layer in enumerate(model.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        for role, weights in (("gate", gate), ("up", up), ("down", layer.mlp.experts.down_proj)):
            add(f"blk.{i}.ffn_{role}_exps.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def milliseconds_per_token(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return 1e3 * (time.perf_counter() - start) / tokens


def main(path: Path) -> None:
    # Every matrix stays as the file has it; or all but the experts are decoded, and run in torch.
    model = mt.from_gguf(path)
    decoded = mt.from_gguf(path, dense=torch.bfloat16)
    print(model.model.layers[0])

    prompt = torch.randint(3, model.config.vocab_size, (1, 16))
    for name, one in (("kept", model), ("decoded", decoded)):
        print(f"{name}: {milliseconds_per_token(one, prompt, 16):.1f} ms per token")
    with torch.no_grad():
        got, want = (one(prompt).logits.float() for one in (model, decoded))
    print(f"logits differ by {(got - want).norm() / want.norm():.3f}")
    print("pairs by layer:", mt.usage(model).counts.sum(axis=1).tolist())


def start_twice(path: Path) -> None:
    """The first start keeps the weights as kernels read them, the next ones map them."""
    for name in ("first", "second"):
        model = mt.from_gguf(path, weight_cache=True)
        report = model.model.layers[0].mlp.experts.stack.report
        print(f"{name} start: experts {report.roles[0].decision} in {1e3 * report.seconds:.1f} ms")
    kept = sum(file.stat().st_size for file in Path(f"{path}.panels").iterdir())
    print(f"kept beside the file: {kept / 2**20:.1f} MiB")


if len(sys.argv) > 1:
    main(Path(sys.argv[1]))
else:
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.gguf"
        write_small(small)
        main(small)
        start_twice(small)

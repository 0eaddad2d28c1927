"""A model of transformers whose experts run here. Does nothing without torch and transformers.

Run with the folder of a checkpoint, or without one to make a small model first.
"""

import sys
import tempfile
import time

try:
    import torch
    import transformers
except ImportError:
    print("torch is not installed, or transformers: nothing to show")
    sys.exit(0)

import moesaic.transformers as mt

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


def make_small(folder: str) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def seconds_per_token(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return (time.perf_counter() - start) / tokens


def main(folder: str) -> None:
    # The experts go from the files into their types here, without a stop in torch.
    config = mt.MoesaicConfig(gate_up="Q4_K", down="Q6_K")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )
    experts = [m for m in model.modules() if hasattr(m, "stack")]
    print(f"{len(experts)} layers of experts, {sum(m.nbytes for m in experts) / 2**20:.1f} MiB")
    print(experts[0])

    prompt = torch.randint(3, model.config.vocab_size, (1, 16))
    print(f"{1e3 * seconds_per_token(model, prompt, 32):.1f} ms per token")
    profile = mt.usage(model)
    for layer, spread in zip(profile.layer_indices, profile.effective_experts(), strict=True):
        print(f"layer {layer}: as many as {spread:.1f} experts, used evenly")

    # The model as torch runs it, for comparison.
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        got, want = (m(prompt).logits.float() for m in (model, plain))
    print(f"logits differ by {(got - want).norm() / want.norm():.3f}, as the encoding does")


def start_twice(folder: str) -> None:
    """The first start keeps what the experts were encoded in, the next ones map it."""
    for name in ("first", "second"):
        start = time.perf_counter()
        model = mt.from_pretrained(folder, gate_up="Q4_K", down="Q6_K", weight_cache=True)
        seconds = time.perf_counter() - start
        report = model.model.layers[0].mlp.experts.stack.report
        print(f"{name} start: experts {report.roles[0].decision}, {1e3 * seconds:.0f} ms in all")


if len(sys.argv) > 1:
    main(sys.argv[1])
else:
    with tempfile.TemporaryDirectory() as made:
        make_small(made)
        main(made)
        start_twice(made)

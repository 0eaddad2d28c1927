"""A whole model of transformers, its experts here or in torch: time per token, prompt, memory.

`python tests/bench/whole_model.py` writes whole_models/<date>.json; readme_tables.py shows the last
one. It needs the extra `transformers` and 12 GiB of memory. Weights are random and repeat: neither
changes the time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import moesaic as mo
from moesaic.torch import Experts, Linear

RESULTS = Path(__file__).parent / "whole_models"
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 16384,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
}
TYPES = {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"}
MATRICES = "Q4_K"
PROMPT = 512
MIB = 1 << 20


def make_model(layers: int) -> Any:
    """In bf16, made without drawing gigabytes of random numbers."""
    config = transformers.Qwen3MoeConfig(**SHAPE, num_hidden_layers=layers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3MoeConfig(**{**SHAPE, "num_experts": 8}, num_hidden_layers=layers),
        dtype=torch.bfloat16,
    )
    state = fresh.state_dict()
    for name, values in state.items():
        experts = ".experts." in name or name.endswith("mlp.gate.weight")
        if values.ndim > 1:
            values = torch.randn_like(values) * values.shape[-1] ** -0.5
        times = SHAPE["num_experts"] // 8 if experts else 1
        state[name] = values.repeat(times, *[1] * (values.ndim - 1))
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = fresh.model.rotary_emb  # its buffers are in no state_dict
    # Alike rows would route alike.
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = torch.randn_like(layer.mlp.gate.weight) * 0.02
    return model.eval()


def with_experts_here(model: Any, layers: int, matrices: bool) -> Any:
    """The same model over encoded experts, and encoded matrices where asked for."""
    with torch.device("meta"):
        other = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    rng = np.random.default_rng(0)

    def encoded(role: str) -> tuple[Any, str]:
        inner, hidden = SHAPE["moe_intermediate_size"], SHAPE["hidden_size"]
        shape = (hidden, inner) if role == "down" else (inner, hidden)
        some = rng.standard_normal((2, *shape), np.float32) * np.float32(shape[1] ** -0.5)
        return np.tile(mo.quantize(some, TYPES[role]), (SHAPE["num_experts"] // 2, 1, 1)), TYPES[
            role
        ]

    for layer in other.model.layers:
        stack = mo.ExpertStack.from_encoded(*(encoded(role) for role in ("gate", "up", "down")))
        layer.mlp.experts = Experts(stack)
    wanted = {k: v for k, v in model.state_dict().items() if ".experts." not in k}
    missing = other.load_state_dict(wanted, strict=False, assign=True).missing_keys
    assert all(key.endswith("_extra_state") for key in missing), missing
    other.model.rotary_emb = model.model.rotary_emb
    if matrices:
        for name, module in list(other.named_modules()):
            if type(module) is torch.nn.Linear:
                other.set_submodule(name, Linear.from_linear(module, MATRICES))
    return other.eval()


def nbytes(model: Any) -> int:
    torch_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return torch_bytes + sum(m.nbytes for m in model.modules() if isinstance(m, Experts | Linear))


class Engine:
    """A model, and the implementation of its experts where those are torch's."""

    def __init__(self, name: str, model: Any, implementation: str | None = None) -> None:
        self.name, self.model, self.implementation = name, model, implementation
        self.decode_ms: list[float] = []
        self.prefill_ms: list[float] = []

    def use(self) -> None:
        if self.implementation is not None:
            self.model.set_experts_implementation(self.implementation)

    @torch.inference_mode()
    def prefill(self) -> Any:
        self.use()
        ids = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT))
        start = time.perf_counter()
        cache = self.model(ids, logits_to_keep=1).past_key_values
        self.prefill_ms.append(1e3 * (time.perf_counter() - start))
        return cache

    @torch.inference_mode()
    def decode(self, cache: Any, tokens: int) -> None:
        self.use()
        for _ in range(tokens):
            ids = torch.randint(0, SHAPE["vocab_size"], (1, 1))
            start = time.perf_counter()
            self.model(ids, past_key_values=cache)
            self.decode_ms.append(1e3 * (time.perf_counter() - start))

    def result(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "decode_ms": quartiles(self.decode_ms),
            "prefill_ms": quartiles(self.prefill_ms),
            "mib": nbytes(self.model) / MIB,
        }


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper one."""
    return [float(q) for q in np.percentile(values, (25, 50, 75))]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ")[1]
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    plain = make_model(args.layers)
    engines = [
        Engine("torch bf16, eager", plain, "eager"),
        Engine("torch bf16, grouped_mm", plain, "grouped_mm"),
        Engine("experts here", with_experts_here(plain, args.layers, False)),
        Engine("experts and matrices here", with_experts_here(plain, args.layers, True)),
    ]
    load = []
    caches: list[Callable[[], Any]] = [engine.prefill() for engine in engines]
    for engine, cache in zip(engines, caches, strict=True):
        engine.decode(cache, 2)
        engine.decode_ms.clear()
        engine.prefill_ms.clear()
    for round_ in range(args.rounds):  # another engine is first in each
        turn = round_ % len(engines)
        for engine in engines[turn:] + engines[:turn]:
            engine.decode(engine.prefill(), args.tokens)
        load.append(os.getloadavg()[0])
    result = {
        "date": f"{datetime.date.today()}",
        "machine": processor(),
        "isa": mo.backends()[0].detail,
        "threads": args.threads,
        "load": float(np.median(load)),
        "layers": args.layers,
        "prompt": PROMPT,
        "types": {**TYPES, "matrices": MATRICES},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "engines": [engine.result() for engine in engines],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

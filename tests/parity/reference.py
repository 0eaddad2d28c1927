"""A block of transformers with random weights, what it computed, and how clear its choice was."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from models import Model

torch.set_num_threads(1)  # the modules are small
TOKENS = 48
MARGIN = 1e-4  # of the selection, as in f32 logits differ by 1e-6


@dataclass(frozen=True)
class Reference:
    """What one MoE block made of ``x``; only tokens whose choice of experts is clear are kept."""

    model: Any  # the whole causal model
    config: Any
    layer: torch.nn.Module
    block: torch.nn.Module
    x: np.ndarray
    tokens: np.ndarray
    y: np.ndarray
    logits: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def randomise(module: torch.nn.Module, router: torch.nn.Module, seed: int) -> None:
    """Rows that keep variance, logits that spread, biases that count."""
    generator = torch.Generator().manual_seed(seed)
    routed = {id(p) for p in router.parameters()}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            tensor.copy_(torch.randint(0, 8, tensor.shape, generator=generator))
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if "bias" in name:
            tensor.copy_(values * 0.2)
        elif tensor.ndim < 2:  # norms and scales
            tensor.copy_(values * 0.2 + 1)
        elif id(tensor) in routed:
            tensor.copy_(values * 2 / tensor.shape[-1] ** 0.5)
        else:
            tensor.copy_(values * tensor.shape[-1] ** -0.5)


def router_of(block: torch.nn.Module) -> torch.nn.Module:
    return block.gate if hasattr(block, "gate") else block.router


def routing_of(
    router: torch.nn.Module, outputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, E], ids and weights [T, k] of what the router returned."""
    if type(router).__name__.startswith("Llama4"):  # (scores [T, E], logits)
        ids = outputs[1].topk(router.top_k, dim=-1).indices
        return outputs[1], ids, outputs[0].gather(1, ids)
    logits, weights, ids = outputs
    if type(router).__name__.startswith("Gemma4"):
        # Probabilities, whose logarithms are logits as well; factors of experts in the weights.
        return logits.log(), ids, weights / router.per_expert_scale[ids]
    return logits, ids, weights


def scale_of(block: torch.nn.Module) -> float:
    """What a block multiplies the sum of its experts by, which here is in the weights."""
    averaged = getattr(block, "shared_expert_combination_strategy", "sum") == "average"
    if averaged and block.num_shared_experts > 0:
        return 0.5
    return float(getattr(block, "routed_scaling_factor", 1.0))


def run(
    layer: torch.nn.Module, block: torch.nn.Module, x: torch.Tensor, tokens: torch.Tensor | None
) -> torch.Tensor:
    """The output of the block, with the shared expert that Granite keeps outside."""
    if block is layer:  # Gemma 4 has no module for it
        _, weights, ids = layer.router(x[0])
        return layer.experts(layer.pre_feedforward_layernorm_2(x[0]), ids, weights)
    y = block(x.clone()) if tokens is None else block(x.clone(), tokens)
    y = y[0] if isinstance(y, tuple) else y
    shared = getattr(layer, "shared_mlp", None)
    return y if shared is None else y + shared(x)


@torch.no_grad()
def make_reference(model: Model, seed: int = 0) -> Reference:
    torch.manual_seed(seed)
    whole = model.make_whole().float().eval()
    config = whole.config
    layer = getattr(whole, "model", whole).layers[model.layer]
    block = layer.get_submodule(model.block)
    router = router_of(block)
    randomise(layer, router, seed)
    # The eager loop is the definition; the others are its fast forms.
    whole.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn((1, TOKENS, config.hidden_size), generator=generator) * model.loudness
    tokens = torch.randint(0, config.vocab_size, (1, TOKENS), generator=generator)
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = router.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    y = run(layer, block, x, tokens if model.hashed else None)
    hook.remove()
    logits, ids, weights = routing_of(router, seen[0])
    weights = weights.float() * scale_of(block)
    order = ids.argsort(dim=-1)
    return Reference(
        whole,
        config,
        layer,
        block,
        x[0].numpy(),
        tokens[0].numpy().astype(np.int32),
        y.reshape(TOKENS, -1).numpy(),
        logits.double().numpy(),
        ids.gather(1, order).numpy().astype(np.int32),
        weights.gather(1, order).numpy(),
    )


def margins(logits: np.ndarray, router: Any) -> np.ndarray:
    """How far the last chosen expert (or group) is above the first that is not, per token."""
    score = {
        "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
        "softmax_selected": lambda z: z,
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    }[router.score]
    choice = logits if router.select_on == "logits" else score(logits)
    if router.selection_bias:
        choice = choice + np.asarray(router.selection_bias)
    least = np.full(len(choice), np.inf)

    def cut(values: np.ndarray, count: int) -> np.ndarray:
        ordered = -np.sort(-values, axis=-1)
        if count == values.shape[-1]:
            return np.full(len(values), np.inf)
        return ordered[:, count - 1] - ordered[:, count]

    if router.num_groups > 1:
        groups = choice.reshape(len(choice), router.num_groups, -1)
        best = -np.sort(-groups, axis=-1)
        value = best[..., :2].sum(-1) if router.group_reduce == "top2_sum" else best[..., 0]
        least = np.minimum(least, cut(value, router.groups_used))
        chosen = np.argsort(-value, axis=-1)[:, : router.groups_used]
        kept = np.zeros(value.shape, bool)
        np.put_along_axis(kept, chosen, True, axis=-1)
        choice = np.where(kept[..., None], groups, -np.inf).reshape(choice.shape)
    return np.minimum(least, cut(choice, router.top_k))

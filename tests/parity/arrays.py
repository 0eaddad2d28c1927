"""The weights of a MoE block of transformers as arrays, whatever that version keeps them in."""

from typing import Any

import numpy as np
import torch
from models import Model
from reference import Reference, router_of

import moesaic as mo

Array = np.ndarray[Any, Any]


def array(tensor: torch.Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def experts_of(reference: Reference) -> dict[str, Array]:
    """gate, up [E, I, H] and down [E, H, I], with their biases where there are some."""
    experts = reference.block.experts
    if isinstance(experts, torch.nn.ModuleList):  # one module per expert, before version 5
        names = ("gate_proj", "up_proj", "down_proj")
        if not hasattr(experts[0], names[0]):
            names = ("w1", "w3", "w2")
        return {
            role: np.stack([array(getattr(e, name).weight) for e in experts])
            for role, name in zip(("gate", "up", "down"), names, strict=True)
        }
    if not hasattr(experts, "gate_up_proj"):  # ungated
        return {"up": array(experts.up_proj), "down": array(experts.down_proj)}
    both, down = array(experts.gate_up_proj), array(experts.down_proj)
    both = both[: len(down)]  # LongCat keeps rows for experts that have no weights
    if both.shape[2] != reference.config.hidden_size:
        both, down = both.transpose(0, 2, 1), down.transpose(0, 2, 1)
    biases = {}
    half = down.shape[2]
    parts = (slice(0, half), slice(half, None))
    if reference.config.model_type == "gpt_oss":
        parts = (slice(0, None, 2), slice(1, None, 2))
        bias = array(experts.gate_up_proj_bias)
        biases = {
            "gate bias": bias[:, parts[0]],
            "up bias": bias[:, parts[1]],
            "down bias": array(experts.down_proj_bias),
        }
    found = {"gate": both[:, parts[0]], "up": both[:, parts[1]], "down": down, **biases}
    return {name: np.ascontiguousarray(values) for name, values in found.items()}


def shared_of(reference: Reference) -> dict[str, Array]:
    """gate, up, down of the shared experts and their gate; empty without them."""
    block, places = reference.block, ("shared_experts", "shared_expert", "shared_mlp")
    module = next((getattr(block, name) for name in places if hasattr(block, name)), None)
    module = module if module is not None else getattr(reference.layer, "shared_mlp", None)
    if module is None:
        return {}
    if hasattr(module, "input_linear"):
        gate, up = np.split(array(module.input_linear.weight), 2)
        return {"gate": gate, "up": up, "down": array(module.output_linear.weight)}
    if hasattr(module, "gate_up_proj"):
        gate, up = np.split(array(module.gate_up_proj.weight), 2)
        return {"gate": gate, "up": up, "down": array(module.down_proj.weight)}
    found = {
        role: array(getattr(module, f"{role}_proj").weight)
        for role in ("gate", "up", "down")
        if hasattr(module, f"{role}_proj")
    }
    if hasattr(block, "shared_expert_gate"):
        found["router"] = array(block.shared_expert_gate.weight)[0]
    return found


def router_weight_of(reference: Reference) -> Array:
    router = router_of(reference.block)
    for name in ("weight", "wg.weight", "gate.weight", "classifier.weight"):
        if name in dict(router.named_parameters()):
            return array(router.get_parameter(name))
    raise AssertionError(f"no weight in {router}")


def router_biases_of(reference: Reference) -> dict[str, list[float]]:
    """router_bias and selection_bias, by what RouterConfig calls them."""
    found: dict[str, list[float]] = {}
    names = {"bias": "router_bias", "e_score_correction_bias": "selection_bias",
             "expert_bias": "selection_bias"}  # fmt: skip
    tensors = (*reference.block.named_parameters(), *reference.block.named_buffers())
    for name, tensor in tensors:
        kind = names.get(name.rpartition(".")[2])
        if kind is not None and not name.startswith(("experts.", "shared")):
            found[kind] = array(tensor).reshape(-1).tolist()
    return found


def latent_of(reference: Reference) -> tuple[Array, Array] | None:
    """The projections into a narrower space for the experts, and back."""
    down = getattr(reference.block, "fc1_latent_proj", None)
    if not isinstance(down, torch.nn.Linear):
        return None
    return array(down.weight), array(reference.block.fc2_latent_proj.weight)


def layer_of(model: Model, reference: Reference) -> mo.MoeLayer:
    """The block as a layer, made of its configuration and its arrays."""
    config = mo.MoeConfig.from_hf(reference.config, model.layer)
    config = config.replace(router=config.router.replace(**router_biases_of(reference)))
    experts, shared = experts_of(reference), shared_of(reference)
    stack = mo.ExpertStack.from_dense_stacks(experts.get("gate"), experts["up"], experts["down"])
    assert (config.shared != "none") == bool(shared)
    parts: dict[str, Any] = {"latent": latent_of(reference)}
    if shared:
        roles = (shared.get(role) for role in ("gate", "up", "down"))
        parts["shared"] = mo.ExpertStack.from_dense_stacks(
            *(None if weights is None else weights[None] for weights in roles)
        )
        parts["shared_gate"] = shared.get("router")
    return mo.MoeLayer(stack, config, router_weight_of(reference), **parts)

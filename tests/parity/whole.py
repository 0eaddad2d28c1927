"""Whole models with random weights, and what they say."""

from typing import Any

import torch
from models import Model
from reference import randomise

PROMPT = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(2))


def make_model(case: Model, seed: int = 1) -> Any:
    """In f32, with biases and routers that count."""
    torch.manual_seed(seed)
    model = case.make_whole().float().eval()
    with torch.no_grad():
        for layer in getattr(model, "model", model).layers:
            randomise(layer, torch.nn.Module(), seed)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor = PROMPT) -> torch.Tensor:
    """Of a model with a head; else the last hidden states."""
    out = model(ids, use_cache=False)
    values: torch.Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return values.float()


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())

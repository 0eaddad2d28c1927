"""Experts that get other arguments than most, over the same weights."""

from __future__ import annotations

import torch
from torch import nn

from moesaic.torch.experts import Experts


class SortedExperts(Experts):
    """Experts of Llama 4, whose rows come expert by expert, each scaled by its weight already.

    A token that an expert was not chosen for comes as a row of zeros, which costs nothing here.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Run expert e on rows e * T to (e + 1) * T.

        Parameters
        ----------
        hidden_states : tensor [E * T, H]
            f32, f16 or bf16.

        Returns
        -------
        tensor [E * T, H]
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = rows.shape[0] // self.num_experts
        expert = torch.arange(self.num_experts, device=rows.device).repeat_interleave(tokens)
        ids = torch.where((rows != 0).any(-1), expert, -1)[:, None]
        return super().forward(rows, ids, rows.new_ones(ids.shape))


class ExpertsWithIdentity(Experts):
    """Experts of LongCat: an id beyond the experts gives the token itself."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts, as ``Experts.forward``; ids from E on are identities."""
        identity = top_k_index >= self.num_experts
        y = super().forward(hidden_states, top_k_index.masked_fill(identity, -1), top_k_weights)
        kept = top_k_weights.masked_fill(~identity, 0).sum(-1, keepdim=True)
        return y + hidden_states * kept.to(y.dtype)


_SPECIAL: dict[str, type[Experts]] = {
    "Llama4TextExperts": SortedExperts,
    "LongcatFlashExperts": ExpertsWithIdentity,
}


def class_for(module: nn.Module) -> type[Experts]:
    """The class that takes the place of an experts module."""
    return _SPECIAL.get(type(module).__name__, Experts)

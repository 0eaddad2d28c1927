"""How often each expert of a model was used."""

from __future__ import annotations

import numpy as np
from torch import nn

from moesaic import _core
from moesaic._arguments import checked
from moesaic._errors import error_of
from moesaic.offload import ExpertProfile
from moesaic.torch.experts import Experts
from moesaic.transformers.implementation import kept_experts
from moesaic.transformers.layouts import layer_of


@checked
def usage(model: nn.Module) -> ExpertProfile:
    """Return how often each expert of each layer was used so far.

    Parameters
    ----------
    model : torch.nn.Module
        A model whose experts run here.

    Returns
    -------
    ExpertProfile
        Counts by layer, which can be saved, plotted, and given to pools of a store. The number of a
        layer is the first one in the name of its module.

    Raises
    ------
    UnsupportedError
        A model without experts that run here.

    Examples
    --------
    >>> import torch, transformers
    >>> import moesaic.transformers as mt
    >>> config = transformers.Qwen3MoeConfig(
    ...     vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_experts=4,
    ...     num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, head_dim=16)
    >>> model = mt.convert(transformers.AutoModelForCausalLM.from_config(config))
    >>> _ = model(torch.tensor([[1, 2, 3]]))
    >>> mt.usage(model).counts.sum()
    np.int64(6)
    """
    found = []
    for name, module in model.named_modules():
        experts = module if isinstance(module, Experts) else kept_experts(module)
        if experts is not None:
            found.append((layer_of(name), experts.counts))
    if not found:
        raise error_of(
            _core.UnsupportedError,
            "usage",
            type(model).__name__,
            "a model whose experts run on moesaic",
            "none of them does",
            "see moesaic.transformers.convert and register; those count from their first call on",
        )
    most = max(len(counts) for _, counts in found)
    padded = [np.pad(counts, (0, most - len(counts))) for _, counts in found]
    return ExpertProfile.from_counts(np.stack(padded), [layer for layer, _ in found])

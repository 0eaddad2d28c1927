"""Mixture-of-experts layers and quantised matrices as modules of torch.

Importing this subpackage imports torch; ``import moesaic`` does not. Weights stay as they are
encoded and are frozen: gradients go through them to the inputs, never into them. The modules have
no parameters, so that ``to``, ``half`` and optimisers pass them by.

======================  ===============================================================
``experts``             Experts: the experts of a layer, routed by the model
``block``               MoeBlock: a whole layer, its router and shared experts too
``linear``              Linear: one matrix outside of any expert
``embedding``           Embedding: rows of a table that stays encoded
``ops``                 the operators of torch behind them, ``torch.ops.moesaic``
``gradients``           what flows back through frozen experts
``layer_gradients``     and through a whole layer, its frozen router included
``frozen``              weights by the numbers that operators know them by
``arrays``              tensors as arrays that the core reads, and its thread count
``state``               what a state_dict keeps of weights
======================  ===============================================================
"""

import moesaic.torch.ops  # noqa: F401 - registers the operators
from moesaic.torch.block import MoeBlock
from moesaic.torch.embedding import Embedding
from moesaic.torch.experts import Experts
from moesaic.torch.linear import Linear

__all__ = ["Embedding", "Experts", "Linear", "MoeBlock"]

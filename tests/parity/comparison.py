"""What it means that a layer of ours and a block of transformers agree."""

from typing import Any

import numpy as np
from oracle import rel_l2
from reference import MARGIN, Reference, margins

import moesaic as mo


def compare(layer: mo.MoeLayer, reference: Reference, **call: Any) -> None:
    """Ids exactly where the choice is clear, weights and outputs within f32 rounding; all tokens
    at once and one alone. ``call`` has further arguments with one row per token.
    """
    router = layer.config.router
    clear = np.ones(len(reference.x), bool)
    if router.select_on != "given":
        clear = margins(reference.logits, router) > MARGIN
    assert clear.sum() > len(clear) // 2
    x, y = reference.x[clear], reference.y[clear]
    call = {name: values[clear] for name, values in call.items()}
    got, routing = layer(x, return_routing=True, precision="exact", **call)
    order = routing.topk_ids.argsort(axis=-1)
    ids = np.take_along_axis(routing.topk_ids, order, -1)
    np.testing.assert_array_equal(ids, reference.ids[clear])
    weights = np.take_along_axis(routing.topk_weights, order, -1)
    np.testing.assert_allclose(weights, reference.weights[clear], rtol=1e-5, atol=1e-7)
    assert rel_l2(got, y) < 1e-5
    one = {name: values[:1] for name, values in call.items()}
    assert rel_l2(layer(x[:1], precision="exact", **one), y[:1]) < 1e-5

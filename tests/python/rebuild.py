"""A layer taken apart by the public accessors, and made anew by the public constructors."""

import numpy as np

import moesaic as mo

ROLES = ("gate", "up", "down")


def rebuilt_stack(stack: mo.ExpertStack, layout: str = "auto") -> mo.ExpertStack:
    """The stack from copies of everything that it says of itself."""
    parts = {
        "biases": {role: np.array(values) for role, values in stack.biases.items()},
        "scales": {role: np.array(values) for role, values in stack.scales.items()},
    }
    if stack.kind == "marlin":
        again = mo.ExpertStack.from_marlin(stack.marlin("gate_up"), stack.marlin("down"), **parts)
    else:
        roles = [
            (stack.encoded(role), stack.quants[role]) if role in stack.quants else None
            for role in ROLES
        ]
        again = mo.ExpertStack.from_encoded(*roles, **parts, layout=layout)
    return again.with_deltas(stack.deltas)


def rebuilt(layer: mo.MoeLayer, layout: str = "auto") -> mo.MoeLayer:
    shared = layer.shared and mo.SharedExperts(
        rebuilt_stack(layer.shared.stack, layout), layer.shared.gate, scale=layer.shared.scale
    )
    return mo.MoeLayer(
        rebuilt_stack(layer.stack, layout),
        mo.MoeConfig.from_dict(layer.config.to_dict()),
        layer.router_weight,
        shared=shared,
        latent=layer.latent and rebuilt_stack(layer.latent, layout),
        token_experts=layer.token_experts,
        precision=layer.precision,
        **layer.norms,
    )


def inputs_of(layer: mo.MoeLayer, tokens: int, seed: int = 0) -> tuple[np.ndarray, dict]:
    """An x, and what else a call of this layer needs."""
    rng = np.random.default_rng(seed)
    c = layer.config
    x = rng.standard_normal((tokens, c.hidden_size), np.float32)
    more = {}
    if c.router_input == "separate":
        more["router_input"] = rng.standard_normal((tokens, c.hidden_size), np.float32)
    if c.vocab_size:
        more["token_ids"] = rng.integers(0, c.vocab_size, tokens).astype(np.int32)
    elif c.router.select_on == "given":
        ids = [rng.permutation(c.num_experts)[: c.top_k] for _ in range(tokens)]
        more["topk_ids"] = np.array(ids, np.int32)
    if layer.router_weight is None:
        more["router_logits"] = rng.standard_normal((tokens, c.router.num_experts), np.float32)
    return x, more


def assert_same_bits(layer: mo.MoeLayer, other: mo.MoeLayer) -> None:
    """Both layers give the same for one token, for a few, and for many."""
    for tokens in (1, 5, 48):
        x, more = inputs_of(layer, tokens)
        y, routing = layer(x, **more, return_routing=True)
        out = np.full_like(x, np.nan)
        _, again = other(x, **more, return_routing=True, out=out)
        np.testing.assert_array_equal(again.topk_ids, routing.topk_ids)
        np.testing.assert_array_equal(again.topk_weights, routing.topk_weights)
        np.testing.assert_array_equal(out, y)
        assert np.isfinite(y).all() and y.any()

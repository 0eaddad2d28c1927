"""The rarer parts of a layer on a GPU, beside the same layer on the host."""

import numpy as np
import pytest
from gpu import BOUNDS, DEVICE, MARKS, error, needs_gpu, on_host, torch

import moesaic as mo

pytestmark = MARKS

PARTS = ("norms", "latent", "identity", "input_weights", "table", "given")


def layers_with(kind, tokens):
    """One layer on the host and on the device, and what its calls bring besides x."""
    rng = np.random.default_rng(6)
    hidden, intermediate, experts, top_k, latent = 256, 320, 8, 3, 128

    def normal(*shape, scale=1.0):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    facts, arrays, call = {}, {}, {}
    router = mo.RouterConfig(experts, top_k)
    if kind == "norms":
        facts = {"input_norm": True, "router_input": "norm", "norm_eps": 1e-3}
        arrays = {n: 1 + normal(hidden, scale=0.2) for n in ("input_norm", "router_norm")}
    if kind == "latent":
        facts = {"latent_size": latent, "latent_norm": True}
        arrays = {
            "latent": (normal(latent, hidden, scale=0.06), normal(hidden, latent, scale=0.09)),
            "latent_norm": 1 + normal(latent, scale=0.2),
        }
    if kind == "identity":
        router = mo.RouterConfig(experts + 4, top_k, identity_experts=4)
    if kind == "input_weights":
        router = mo.RouterConfig(
            experts, top_k, score="sigmoid", renormalize=False, weight_on="input"
        )
    if kind in ("table", "given"):
        router = mo.RouterConfig(experts, top_k, score="sigmoid", select_on="given")
        table = np.stack([rng.permutation(experts)[:top_k] for _ in range(99)]).astype(np.int32)
        token_ids = rng.integers(0, 99, tokens).astype(np.int32)
        if kind == "table":
            facts, arrays = {"vocab_size": 99}, {"token_experts": table}
            call = {"token_ids": token_ids}
        else:
            call = {"topk_ids": table[token_ids]}
    width = latent if kind == "latent" else hidden
    shapes = [(experts, intermediate, width)] * 2 + [(experts, width, intermediate)]
    weights = [normal(*s, scale=s[2] ** -0.5) for s in shapes]
    router_weight = normal(router.num_experts, hidden, scale=0.1)
    config = mo.MoeConfig(hidden, intermediate, experts, top_k, router=router, **facts)
    layers = [
        mo.MoeLayer(
            mo.ExpertStack.from_dense_stacks(*weights, device=device),
            config,
            router_weight,
            **arrays,
        )
        for device in ("cpu", DEVICE)
    ]
    return *layers, call


def on_device(call):
    return {name: torch.from_numpy(ids).to(DEVICE) for name, ids in call.items()}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
def test_parts(kind, tokens):
    host, layer, call = layers_with(kind, tokens)
    x = torch.from_numpy(np.random.default_rng(tokens).standard_normal((tokens, 256), np.float32))
    y, routing = layer(x.to(DEVICE), return_routing=True, precision="exact", **on_device(call))
    # The device's own routing, as two experts can be as good as the same.
    chosen = mo.Routing(on_host(routing.topk_ids), on_host(routing.topk_weights))
    want = mo.moe_forward_cpu(x.numpy(), chosen, host)
    assert error(y, torch.from_numpy(want).to(DEVICE).double()) <= BOUNDS["f32"]
    mine = host(x.numpy(), return_routing=True, **call)[1]
    assert (chosen.topk_ids == mine.topk_ids).mean() > 0.99
    y = layer(x.to(DEVICE, torch.bfloat16), routing=routing)
    want = mo.moe_forward_cpu(x.bfloat16().float().numpy(), chosen, host)
    assert error(y, torch.from_numpy(want).to(DEVICE).double()) <= BOUNDS["bf16"]


@needs_gpu
@pytest.mark.parametrize("kind", PARTS)
def test_parts_are_captured_without_a_call_before(kind):
    _, layer, call = layers_with(kind, 7)
    x = torch.randn(7, 256, device=DEVICE)
    out = torch.empty_like(x)
    workspace = mo.Workspace.for_layer(layer, 7)
    arguments = {"out": out, "workspace": workspace} | on_device(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, **arguments)
    for _ in range(5):
        x.normal_()
        layer(x, **arguments)
        eager = out.clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)

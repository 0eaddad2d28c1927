"""What flows back through MoeBlock: beside autograd over the formulas, and beside transformers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from arrays import layer_of
from models import MODELS, Model
from reference import MARGIN, make_reference, margins, run
from torch.nn import functional

import moesaic as mo
from moesaic.torch import MoeBlock
from moesaic.torch.gradients import activate
from moesaic.torch.layer_gradients import layer_gradient

torch.set_num_threads(1)  # the modules are small
E, H, I, L, T, K, S = 6, 32, 24, 16, 12, 3, 20


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def matrix(*shape: int, seed: int) -> torch.Tensor:
    return random(*shape, seed=seed, scale=shape[-1] ** -0.5)


@dataclass
class Case:
    """A layer, and the same in torch."""

    router: dict[str, Any] = field(default_factory=dict)
    shared: str = "none"
    latent: bool = False
    input_norm: bool = False
    router_norm: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        width = L if self.latent else H
        extra = self.router.get("identity_experts", 0)
        self.dense = [
            matrix(E, *s, seed=i) for i, s in enumerate([(I, width), (I, width), (width, I)])
        ]
        self.weight = random(E + extra, H, seed=4) * 2 * H**-0.5
        self.beside = [matrix(1, *s, seed=5 + i) for i, s in enumerate([(S, H), (S, H), (H, S)])]
        self.gate = random(H, seed=8, scale=0.3)
        self.projections = matrix(L, H, seed=9), matrix(H, L, seed=10)
        self.norms = {
            name: random(size, seed=11 + i, scale=0.2) + 1
            for i, (name, size, there) in enumerate([
                ("latent_norm", L, self.latent), ("input_norm", H, self.input_norm),
                ("router_norm", H, self.router_norm),
            ])
            if there
        }  # fmt: skip
        router = mo.RouterConfig(E + extra, K, **self.router)
        self.config = mo.MoeConfig(
            H, I, E, K, router=router, shared=self.shared, norm_eps=0.1, shared_scale=self.scale,
            shared_intermediate_size=S if self.shared != "none" else 0,
            latent_size=L if self.latent else 0, latent_norm=self.latent,
            input_norm=self.input_norm, router_input="norm" if self.router_norm else "experts",
        )  # fmt: skip
        shared = {}
        if self.shared != "none":
            shared["shared"] = mo.ExpertStack.from_dense_stacks(*self.beside)
        if self.shared == "sigmoid_gated":
            shared["shared_gate"] = self.gate
        self.layer = mo.MoeLayer(
            mo.ExpertStack.from_dense_stacks(*self.dense), self.config, self.weight,
            latent=self.projections if self.latent else None, **shared, **self.norms,
        )  # fmt: skip
        self.x = random(T, H, seed=20)
        self.dy = random(T, H, seed=21)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The layer over tensors, for autograd, with the experts that the layer chose."""
        router, ids = self.config.router, self.layer.route(x.detach().float().numpy()).topk_ids
        ids = torch.tensor(ids, dtype=torch.int64)
        given = x
        x = self.normed("input_norm", given)
        of_router = self.normed("router_norm", given) if self.router_norm else x
        logits = of_router @ self.weight.to(x.dtype).T
        if router.router_bias:
            logits = logits + torch.tensor(router.router_bias, dtype=x.dtype)
        if router.score == "softmax_selected":
            weights = logits.gather(1, ids).softmax(-1)
        else:
            scores = {
                "softmax": lambda z: z.softmax(-1),
                "sigmoid": torch.sigmoid,
                "sqrt_softplus": lambda z: functional.softplus(z).sqrt(),
            }[router.score](logits)
            weights = scores.gather(1, ids)
        if router.renormalize:
            total = weights.sum(-1, keepdim=True)
            if router.guard == "add_eps":
                total = total + router.guard_eps
            elif router.guard == "clamp_min":
                total = total.clamp(min=router.guard_eps)
            weights = weights / total
        weights = weights * (router.scale or 1)
        into = x @ self.projections[0].to(x.dtype).T if self.latent else x
        out = torch.zeros_like(into)
        for slot in range(K):
            chosen, weight = ids[:, slot].clamp(max=E - 1), weights[:, slot, None]
            real = (ids[:, slot] < E).to(x.dtype)[:, None]
            on_input = router.weight_on == "input"
            y = self.ffn(self.dense, chosen, into * weight if on_input else into)
            out = out + real * (y if on_input else weight * y) + (1 - real) * weight * into
        if self.latent:
            out = self.normed("latent_norm", out) @ self.projections[1].to(x.dtype).T
        if self.shared == "none":
            return out
        y = self.scale * self.ffn(self.beside, torch.zeros(len(x), dtype=torch.int64), x)
        if self.shared == "sigmoid_gated":
            y = torch.sigmoid(x @ self.gate.to(x.dtype))[:, None] * y
        return out + y

    def normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.norms:
            return x
        factor = (x.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt()
        return x * factor * self.norms[name].to(x.dtype)

    def ffn(self, dense: Any, chosen: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (weights.to(x.dtype)[chosen] for weights in dense)
        product = lambda w, x: torch.einsum("trc,tc->tr", w, x)  # noqa: E731
        hidden = activate(self.config.activation, product(gate, x), product(up, x))
        return product(down, hidden)


BIAS = np.linspace(-0.5, 0.5, E).tolist()
CASES = {
    "plain": Case(),
    "as they are": Case({"renormalize": False, "scale": 2.5}),
    "of the selected": Case({"score": "softmax_selected", "router_bias": BIAS}),
    "sigmoid": Case({"score": "sigmoid", "guard": "add_eps", "guard_eps": 0.3, "scale": 1.7}),
    "clamped sum": Case({"score": "sigmoid", "guard": "clamp_min", "guard_eps": 1.9}),
    "softplus": Case({"score": "sqrt_softplus", "selection_bias": BIAS}),
    "groups": Case({"num_groups": 3, "groups_used": 2}),
    "on the input": Case({"score": "sigmoid", "renormalize": False, "weight_on": "input"}),
    "identity": Case({"identity_experts": 2}),
    "shared": Case(shared="plain", scale=0.5),
    "shared with a gate": Case(shared="sigmoid_gated"),
    "latent": Case(latent=True, shared="plain"),
    "norms": Case(input_norm=True, router_norm=True, shared="sigmoid_gated"),
    "one norm": Case(input_norm=True),
}


def rel(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", CASES)
def test_beside_autograd_in_f64(name):
    """The formulas, free of the rounding of the forward."""
    case = CASES[name]
    x = case.x.double().requires_grad_()
    y = case.reference(x)
    with mo.tuning(precision="exact"):
        assert rel(MoeBlock(case.layer)(case.x), y.float()) < 1e-5  # it is the same layer
    y.backward(case.dy.double())
    got = layer_gradient(case.dy.double(), x.detach(), case.layer)
    # Scales of shared experts are f32 factors.
    assert rel(got, x.grad) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_through_the_module(name):
    case = CASES[name]
    x = case.x.clone().requires_grad_()
    MoeBlock(case.layer)(x.view(3, 4, H)).backward(case.dy.view(3, 4, H))
    got = x.grad.clone()
    x.grad = None
    case.reference(x).backward(case.dy)
    assert rel(got, x.grad) < 1e-5


@pytest.mark.parametrize("name", ["plain", "sigmoid", "shared with a gate"])
def test_gradcheck(name):
    """Differences of an f32 forward: a step of 1e-2 leaves 1e-3 to rounding and curvature."""
    case = CASES[name]
    logits = (case.x @ case.weight.T).double().numpy()
    clear = torch.from_numpy(margins(logits, case.config.router) > 0.03)
    assert clear.sum() >= 2  # where a step changes no choice
    x = case.x[clear][:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(MoeBlock(case.layer), (x,), eps=1e-2, atol=2e-2, rtol=2e-2)


def test_halves():
    case = CASES["shared with a gate"]
    x = case.x.bfloat16().requires_grad_()
    MoeBlock(case.layer)(x).backward(case.dy.bfloat16())
    assert x.grad.dtype == torch.bfloat16
    want = layer_gradient(case.dy.bfloat16().float(), x.detach().float(), case.layer)
    assert rel(x.grad.float(), want) < 1e-2


def test_compiled():
    case = CASES["plain"]
    block = MoeBlock(case.layer)
    x = case.x.clone().requires_grad_()
    block(x).backward(case.dy)
    want = x.grad.clone()
    x.grad = None
    torch.compile(block, backend="aot_eager", fullgraph=True)(x).backward(case.dy)
    assert torch.equal(x.grad, want)
    op = torch.ops.moesaic.moe_layer_backward.default
    torch.library.opcheck(op, (case.dy, case.x, block._weights.number))


def differentiable(model: Model) -> bool:
    return model.arrays and not model.hashed


@pytest.mark.parametrize(
    "model", [model for model in MODELS if differentiable(model)], ids=lambda model: model.name
)
def test_beside_transformers(model: Model):
    """The gradient of the block's input there, where the choice of experts is clear."""
    reference = make_reference(model, seed=5)
    layer = layer_of(model, reference)
    if layer.config.router_input == "separate":
        pytest.skip("reads a second input")
    clear = margins(reference.logits, layer.config.router) > MARGIN
    x = torch.tensor(reference.x[clear])
    theirs = x.clone().requires_grad_()
    run(reference.layer, reference.block, theirs[None], None).sum().backward()
    ours = x.clone().requires_grad_()
    with mo.tuning(precision="exact"):
        MoeBlock(layer)(ours).sum().backward()
    assert rel(ours.grad, theirs.grad) < 1e-4

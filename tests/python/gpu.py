"""Models, inputs and f64 answers for tests on a real GPU, by torch on the same device.

``pytest -m gpu`` needs torch and a build with a CUDA plug-in; without them the modules that import
this one are skipped, with the reason. ``TEST_DEVICE=cpu`` runs what does not need a GPU on the CPU
backend, to test the tests themselves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
from int4 import Checkpoint

import moesaic as mo

torch = pytest.importorskip("torch")

DEVICE = os.environ.get("TEST_DEVICE", "cuda:0")
ON_GPU = DEVICE != "cpu"


def _why_not() -> str:
    if not ON_GPU:
        return ""
    for backend in mo.backends():
        if backend.available and DEVICE in backend.devices:
            return "" if torch.cuda.is_available() else "torch sees no GPU"
    reasons = [b.reason for b in mo.backends() if b.name == DEVICE.split(":")[0]]
    return f"{DEVICE}: {'; '.join(reasons)}"


if reason := _why_not():
    pytest.skip(reason, allow_module_level=True)
#: The mark of every test module on top of this one.
MARKS = [pytest.mark.gpu, pytest.mark.usefixtures("exact_on_the_cpu", "gpu_survives")]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="the CPU has no streams and graphs")

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
SMALL_TYPES = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "IQ4_NL",
    "MXFP4",
    "NVFP4",
    "F16",
    "BF16",
    "F32",
)
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
#: |y - f64| / |f64|: 16-bit rounds x's type twice, exact f32 keeps 16 bits.
BOUNDS = {"f32": 1e-4, "f16": 5e-3, "bf16": 5e-3}
TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 127, 128, 257, 1024)


@dataclass
class Model:
    """A stack on the device, and its weights as f64 tensors there."""

    stack: mo.ExpertStack
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    hidden: int


def _encoded(rng, quant, experts, rows, cols):
    values = rng.standard_normal((experts, rows, cols), np.float32) * np.float32(cols**-0.5)
    data = mo.testing.quantize(values, quant)
    decoded = mo.testing.dequantize(data, quant, values.shape)
    return (data, quant, values.shape), torch.from_numpy(decoded).to(DEVICE, torch.float64)


def make(experts=8, hidden=256, intermediate=512, gate_up="Q4_K", down="Q6_K", seed=0) -> Model:
    rng = np.random.default_rng(seed)
    roles = [
        _encoded(rng, quant, experts, rows, cols)
        for quant, rows, cols in (
            (gate_up, intermediate, hidden),
            (gate_up, intermediate, hidden),
            (down, hidden, intermediate),
        )
    ]
    stack = mo.ExpertStack.from_encoded(*(r[0] for r in roles), device=DEVICE)
    return Model(stack, *(r[1] for r in roles), hidden)


def make_int4(experts, hidden, intermediate, group, asymmetric, act_order) -> Model:
    halves = [
        Checkpoint(
            experts,
            k,
            n,
            group,
            zeros=asymmetric,
            order="shared" if act_order else None,
            seed=seed,
        )
        for seed, (k, n) in enumerate(((hidden, 2 * intermediate), (intermediate, hidden)))
    ]
    gate_up, down = (
        torch.from_numpy(c.weights.transpose(0, 2, 1).copy()).to(DEVICE) for c in halves
    )
    stack = mo.ExpertStack.from_marlin(*(c.stack() for c in halves), device=DEVICE)
    return Model(stack, gate_up[:, :intermediate], gate_up[:, intermediate:], down, hidden)


def inputs(model, tokens, top_k, dtype="bf16", routing="uniform", seed=1):
    """x on the device, host ids and weights."""
    rng = np.random.default_rng(seed + tokens)
    experts = model.gate.shape[0]
    x = torch.from_numpy(rng.standard_normal((tokens, model.hidden), dtype=np.float32))
    keys = rng.random((tokens, experts))
    if routing == "zipf":
        keys *= 1 + np.arange(experts)
    if routing == "one":
        keys[:, -1] = -1
    if routing == "empty":
        keys[:, experts // 2 :] += 2
    ids = np.argsort(keys, axis=1)[:, :top_k].astype(np.int32)
    if routing == "skipped":
        ids[rng.random(ids.shape) < 0.3] = -1
    weights = rng.random((tokens, top_k), dtype=np.float32) + 0.1
    return x.to(DEVICE, DTYPES[dtype]), ids, weights


def routing_of(ids, weights) -> mo.Routing:
    """On the device, as an engine would have it."""
    if not ON_GPU:
        return mo.Routing(ids, weights)
    return mo.Routing(torch.from_numpy(ids).to(DEVICE), torch.from_numpy(weights).to(DEVICE))


def expected(model, x, ids, weights) -> torch.Tensor:
    """The definition in f64; ids outside the experts are skipped."""
    x = x.double()
    y = torch.zeros_like(x)
    for e in range(model.gate.shape[0]):
        token, slot = np.nonzero(ids == e)
        if len(token) == 0:
            continue
        rows = torch.from_numpy(token).to(DEVICE)
        g, u = x[rows] @ model.gate[e].T, x[rows] @ model.up[e].T
        out = (torch.nn.functional.silu(g) * u) @ model.down[e].T
        y.index_add_(
            0, rows, out * torch.from_numpy(weights[token, slot]).to(DEVICE).double()[:, None]
        )
    return y


def error(y, want) -> float:
    """The relative error of all values together; NaN counts as infinite."""
    difference = float(
        torch.linalg.norm(y.double() - want) / torch.linalg.norm(want).clamp(min=1e-30)
    )
    return float("inf") if np.isnan(difference) else difference


def on_host(array) -> np.ndarray:
    return array.cpu().numpy() if hasattr(array, "cpu") else array


def forward(model, x, ids, weights, **arguments):
    out = torch.full_like(x, float("nan"))
    precision = "exact" if x.dtype == torch.float32 else None
    return mo.moe_forward(
        x,
        None,
        model.stack,
        routing=routing_of(ids, weights),
        out=out,
        precision=precision,
        **arguments,
    )


def check(model, tokens, top_k, dtype="bf16", routing="uniform", **arguments):
    x, ids, weights = inputs(model, tokens, top_k, dtype, routing)
    y = forward(model, x, ids, weights, **arguments)
    found = error(y, expected(model, x, ids, weights))
    assert found <= BOUNDS[dtype], f"{tokens} tokens: {found:.2e}"


def make_marlin(experts, k, n, group=64):
    """GPTQ experts with zero points and group orders of their own: host stack, f64 [E, N, K]."""
    rng = np.random.default_rng(k + n)
    codes = rng.integers(0, 2**32, (experts, k // 8, n), dtype=np.uint32).view(np.int32)
    zeros = rng.integers(0, 2**32, (experts, k // group, n // 8), dtype=np.uint32).view(np.int32)
    scales = (rng.random((experts, k // group, n)) * 0.02 + 0.01).astype(np.float16)
    order = np.stack([rng.permutation(np.arange(k) // group) for _ in range(experts)])
    host = mo.MarlinExpertStack.from_gptq(
        codes, scales, zeros, g_idx=order.astype(np.int32), group_size=group
    )
    values = np.stack([host.dequantize(e) for e in range(experts)])
    return host, torch.from_numpy(values).to(DEVICE, torch.float64)

"""Weights for the bench: a few encoded experts, repeated until a layer is full.

Every expert has its own memory, so caches see the real traffic; only the values repeat, which keeps
encoding and the f64 answer affordable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .. import testing
from .shapes import BenchShape

DISTINCT_EXPERTS = 4
INT4_GROUP = 128
#: Where a block's f16 scale stands, of types that only a search can encode.
SCALE_AT = {
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), 0),
    "IQ1_M": 48,
    "TQ1_0": 52,
    "TQ2_0": 64,
    **dict.fromkeys(("Q1_0", "Q2_0"), 0),
}


@dataclass(frozen=True)
class BenchWeight:
    """One role of one layer, as a GGUF tensor holds it; INT4 as a GPTQ checkpoint does."""

    quant: str
    ggml_id: int  # -1: ggml has no such type
    shape: tuple[int, int, int]  # experts, rows, cols
    data: np.ndarray  # uint8, all experts
    values: np.ndarray  # f32 [DISTINCT_EXPERTS, rows, cols], decoded
    scales: np.ndarray | None = None  # INT4: f16 [experts, groups, rows]; data is then the qweight

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


@dataclass(frozen=True)
class BenchLayer:
    """The three roles of one layer; expert e holds the values of expert e % DISTINCT_EXPERTS."""

    shape: BenchShape
    gate: BenchWeight
    up: BenchWeight
    down: BenchWeight

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert, all roles."""
        return (self.gate.nbytes + self.up.nbytes + self.down.nbytes) / self.shape.num_experts


def _int4_role(rng: np.random.Generator, experts: int, rows: int, cols: int) -> BenchWeight:
    """Symmetric groups along K, rounded to nearest."""
    distinct = min(DISTINCT_EXPERTS, experts)
    values = rng.standard_normal((distinct, cols, rows), dtype=np.float32) / np.float32(
        np.sqrt(cols)
    )
    first = np.arange(0, cols, INT4_GROUP)
    group = np.arange(cols) // INT4_GROUP
    scales = (np.maximum.reduceat(np.abs(values), first, axis=1) / 7).astype(np.float16)
    wide = scales.astype(np.float32)[:, group]
    codes = np.clip(np.rint(values / wide), -8, 7)
    nibbles = (codes + 8).astype(np.uint32).reshape(distinct, cols // 8, 8, rows)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    qweight = np.bitwise_or.reduce(nibbles << shifts, axis=2)
    which = np.arange(experts) % distinct
    return BenchWeight(
        "INT4",
        -1,
        (experts, rows, cols),
        qweight.view(np.int32)[which].view(np.uint8).reshape(-1),
        np.ascontiguousarray((codes * wide).transpose(0, 2, 1)),
        scales[which],
    )


def _random_codes(rng: np.random.Generator, quant: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Random blocks whose weights have about the deviation 1 / sqrt(cols)."""
    facts = testing.quant_types()[quant]
    size, at = facts["block_bytes"], SCALE_AT[quant]
    blocks = shape[-1] // facts["block_elems"]
    raw = rng.integers(0, 256, (*shape[:-1], blocks, size), dtype=np.uint8)

    def set_scale(data: np.ndarray, value: float) -> None:
        bits = int(np.float16(value).view(np.uint16))
        if quant == "IQ1_M":  # a nibble on top of each of four words
            for n in range(4):
                byte = data[..., at + 2 * n + 1]
                byte[...] = byte & 15 | (bits >> 4 * n & 15) << 4
        else:
            data[..., at : at + 2] = np.array([bits], np.uint16).view(np.uint8)

    sample = raw[:1, :1].copy()
    set_scale(sample, 1.0)
    unit = testing.dequantize(sample.reshape(-1), quant, (1, shape[-1])).std()
    set_scale(raw, float(1 / (unit * np.sqrt(shape[-1]))))
    return raw.reshape(shape[0], -1)


def _role(rng: np.random.Generator, quant: str, experts: int, rows: int, cols: int) -> BenchWeight:
    if quant == "INT4":
        return _int4_role(rng, experts, rows, cols)
    distinct = min(DISTINCT_EXPERTS, experts)
    dense = (distinct, rows, cols)
    if quant in SCALE_AT:
        encoded = _random_codes(rng, quant, dense)
    else:
        values = rng.standard_normal(dense, dtype=np.float32) / np.float32(np.sqrt(cols))
        encoded = testing.quantize(values, quant).view(np.uint8).reshape(distinct, -1)
    decoded = testing.dequantize(encoded, quant, dense)
    data = np.empty((experts, encoded.shape[1]), np.uint8)
    for expert in range(experts):
        data[expert] = encoded[expert % distinct]
    facts = testing.quant_types()[quant]
    ggml_id = facts["id"] if facts["gguf"] else -1
    return BenchWeight(quant, ggml_id, (experts, rows, cols), data.reshape(-1), decoded)


def make_layers(shape: BenchShape, count: int, seed: int = 1) -> list[BenchLayer]:
    """``count`` layers in memory of their own, so that rotating over them defeats the caches."""
    rng = np.random.default_rng(seed)
    first = BenchLayer(
        shape,
        _role(rng, shape.gate_up_type, shape.num_experts, shape.intermediate, shape.hidden),
        _role(rng, shape.gate_up_type, shape.num_experts, shape.intermediate, shape.hidden),
        _role(rng, shape.down_type, shape.num_experts, shape.hidden, shape.intermediate),
    )
    layers = [first]
    for _ in range(count - 1):
        copies = [replace(w, data=w.data.copy()) for w in (first.gate, first.up, first.down)]
        layers.append(BenchLayer(shape, *copies))
    return layers


def answer_f64(
    layer: BenchLayer, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, tokens: int = 16
) -> np.ndarray:
    """The layer in f64 on the decoded weights, for the first ``tokens`` rows of x."""
    x = x[:tokens].astype(np.float64)
    out = np.zeros_like(x)
    distinct = layer.gate.values.shape[0]
    template = ids[:tokens] % distinct
    for expert in range(distinct):
        gate, up, down = (
            w.values[expert].astype(np.float64) for w in (layer.gate, layer.up, layer.down)
        )
        g, u = x @ gate.T, x @ up.T
        y = (g / (1.0 + np.exp(-g)) * u) @ down.T
        share = np.where(template == expert, weights[:tokens].astype(np.float64), 0.0).sum(axis=1)
        out += share[:, None] * y
    return out

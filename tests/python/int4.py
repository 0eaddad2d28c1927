"""INT4 group weights: random checkpoints in every format, and the values that they mean."""

import numpy as np
from oracle import moe_f64

import moesaic as mo

IN_ORDER = range(8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of nibble i


def pack(values, axis, order=IN_ORDER):
    """8 four-bit values along `axis` to a word; value order[i] in nibble i."""
    values = np.moveaxis(np.asarray(values, np.uint32), axis, -1)
    pad = -values.shape[-1] % 8
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, pad)])
    groups = values.reshape(*values.shape[:-1], -1, 8)
    words = sum(groups[..., k] << np.uint32(4 * i) for i, k in enumerate(order))
    return np.ascontiguousarray(np.moveaxis(words, -1, axis), np.uint32).view(np.int32)


class Checkpoint:
    """Random GPTQ tensors ``[E, K, N]`` and their values, ``weights``."""

    def __init__(
        self,
        E,
        K,
        N,
        group_size,
        *,
        form="gptq",
        zeros=True,
        order=None,
        seed=0,
        scale_type=np.float16,
    ):
        rng = np.random.default_rng(seed)
        self.E, self.K, self.N, self.form = E, K, N, form
        self.group_size = group_size
        size = K if group_size == -1 else group_size
        groups = -(-K // size)
        self.codes = rng.integers(0, 16, (E, K, N))
        low = 1 if form == "gptq" else 0
        self.zeros = (
            rng.integers(low, low + 16, (E, groups, N)) if zeros else np.full((E, groups, N), 8)
        )
        self.scales = ((0.2 + rng.random((E, groups, N))) / (8 * np.sqrt(K))).astype(scale_type)
        plain = np.arange(K, dtype=np.int32) // size
        if order is None:
            self.g_idx, columns = None, np.broadcast_to(plain, (E, K))
        elif order == "shared":
            self.g_idx = rng.permutation(plain)
            columns = np.broadcast_to(self.g_idx, (E, K))
        elif order == "per_expert":
            self.g_idx = columns = np.stack([rng.permutation(plain) for _ in range(E)])
        else:
            self.g_idx = columns = rng.integers(0, groups, (E, K)).astype(np.int32)
        experts = np.arange(E)[:, None]
        self.weights = (self.codes - self.zeros[experts, columns]) * self.scales.astype(np.float64)[
            experts, columns
        ]  # [E, K, N]
        nibbles = AWQ_ORDER if form == "awq" else range(8)
        self.qweight = pack(self.codes, 2, nibbles) if form == "awq" else pack(self.codes, 1)
        self.qzeros = pack(self.zeros - (1 if form == "gptq" else 0), 2, nibbles)
        self.stored_scales = self.scales
        if form == "pack_quantized":
            self.qweight = pack(self.codes.transpose(0, 2, 1), 2)
            self.qzeros = pack(self.zeros.transpose(0, 2, 1), 1)
            self.stored_scales = np.ascontiguousarray(self.scales.transpose(0, 2, 1))

    def stack(self):
        return mo.MarlinExpertStack.from_gptq(
            self.qweight, self.stored_scales, self.qzeros, self.g_idx, self.group_size, self.form
        )


def layer_f64(gate_up: "Checkpoint", down: "Checkpoint", routing, x) -> np.ndarray:
    """The layer of two checkpoints in f64."""
    gate, up = np.split(gate_up.weights.transpose(0, 2, 1), 2, axis=1)
    down_weights = down.weights.transpose(0, 2, 1)
    return moe_f64(x, routing.topk_ids, routing.topk_weights, gate, up, down_weights)

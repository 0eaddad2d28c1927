"""INT4 group experts: GPTQ and AWQ tensors, GPU layouts, phases, layers."""

import numpy as np
import pytest

mo = pytest.importorskip("moesaic")

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
    """Random GPTQ tensors and what they mean."""

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


def rel(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


CASES = [
    {"E": 3, "K": 128, "N": 48, "group_size": 32},
    {"E": 2, "K": 256, "N": 64, "group_size": 128, "zeros": False},
    {"E": 2, "K": 256, "N": 64, "group_size": 64, "order": "shared"},
    {"E": 3, "K": 256, "N": 40, "group_size": 32, "order": "per_expert"},
    {"E": 3, "K": 104, "N": 24, "group_size": 32, "order": "random"},
    {"E": 2, "K": 96, "N": 16, "group_size": -1, "form": "gptq_v2", "scale_type": np.float32},
    {"E": 2, "K": 128, "N": 32, "group_size": 64, "form": "awq"},
    {"E": 2, "K": 96, "N": 20, "group_size": 32, "form": "pack_quantized", "order": "shared"},
]


@pytest.fixture(params=CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def checkpoint(request):
    return Checkpoint(**request.param)


def test_sizes_and_values(checkpoint):
    c, m = checkpoint, checkpoint.stack()
    assert (m.num_experts, m.k, m.n_per_expert) == (c.E, c.K, c.N)
    assert m.group_size == (c.K if c.group_size == -1 else c.group_size)
    assert m.act_order == (c.g_idx is not None)
    assert m.zero_workspace() is None
    for e in range(c.E):
        w = m.dequantize(e)
        assert w.shape == (c.N, c.K)
        np.testing.assert_allclose(w, c.weights[e].T, rtol=2e-7, atol=0)
        parts = m.unpack(e)
        np.testing.assert_array_equal(parts["codes"], c.codes[e])


def test_phases_agree_with_float64(checkpoint):
    c, m = checkpoint, checkpoint.stack()
    rng = np.random.default_rng(1)
    x = rng.standard_normal((12, c.K)).astype(np.float32)
    dispatches = [(1, 0, 7, 5), (0, 9, 0, 3)]
    want = np.concatenate([x[9:12] @ c.weights[0], np.zeros((4, c.N)), x[0:5] @ c.weights[1]])
    assert rel(m.gemm_phase_batched(x, dispatches, precision="exact"), want) < 1e-4
    assert rel(m.gemm_phase_batched(x, np.array(dispatches), precision="fast"), want) < 2e-2

    out = np.full((12, c.N), np.nan, np.float32)
    assert m.gemm_phase_batched(x, dispatches, out=out, precision="exact") is out
    assert np.isnan(out[3:7]).all()
    assert rel(out[7:], want[7:]) < 1e-4

    ids = np.array([[0, 1], [-1, 1], [1, 0], [-1, -1], [0, -1]], np.int32)
    routing = mo.Routing(ids, np.ones((5, 2), np.float32))
    pairs = np.zeros((10, c.N))
    for p, e in enumerate(ids.ravel()):
        if e >= 0:
            pairs[p] = x[p // 2] @ c.weights[e]
    for block in (4, 8, 16, 64):
        aligned = mo.align_block_size(routing, c.E, block)
        out = np.full((10, c.N), np.nan, np.float32)
        m.gemm_phase_vllm(x[:5], aligned, 2, out=out, precision="exact")
        assert rel(out, pairs) < 1e-4
        assert (out[[2, 6, 7, 9]] == 0).all()
        with pytest.raises(mo.ShapeError):
            m.gemm_phase_vllm(x[:5], aligned, 1)

    bias = rng.standard_normal(c.N).astype(np.float32)
    lin = m.make_expert_linear(1, bias=bias)
    assert (lin.in_features, lin.out_features) == (c.K, c.N)
    assert rel(lin(x, precision="exact"), x @ c.weights[1] + bias) < 1e-4


def test_expert_linear_offsets():
    c = Checkpoint(2, 64, 192, 32)
    m = c.stack()
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    y = m.make_expert_linear(1, 64, 64)(x, precision="exact")
    assert rel(y, x @ c.weights[1][:, 64:128]) < 1e-4
    for bad in ((0, 32, 64), (0, 0, 32), (0, 128, 128), (2, 0, 64), (0, 0, 0), (-1, 0, 64)):
        with pytest.raises(mo.ShapeError):
            m.make_expert_linear(*bad)
    with pytest.raises(mo.ShapeError):
        m.make_expert_linear(0, 0, 64, np.zeros(63, np.float32))


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_input_types(kind):
    c = Checkpoint(2, 64, 32, 32)
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(kind)
    y = c.stack().make_expert_linear(0)(x, precision="exact")
    assert y.dtype == np.float32
    assert rel(y, x.astype(np.float64) @ c.weights[0]) < 1e-4


def marlin_positions():
    """(k, n) of nibble i of word w of a 16 x 64 tile, derived from the kernel's fragments."""
    where = {}
    for lane in range(32):
        for warp in range(4):
            row, col = lane % 4 * 2, 16 * warp + lane // 4
            values = [(row + r, col + c) for c in (0, 8) for r in (0, 1, 8, 9)]
            for nibble, v in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                where[lane * 4 + warp, nibble] = values[v]
    return where


def test_marlin_layout():
    c = Checkpoint(1, 64, 128, 32, form="gptq_v2", order="shared")
    packed = c.stack().repack("marlin", 0)
    perm = np.argsort(c.g_idx, kind="stable")
    np.testing.assert_array_equal(packed["perm"], perm)
    codes = c.codes[0][perm]
    words = packed["qweight"]
    assert words.shape == (4, 256)
    for (word, nibble), (k, n) in marlin_positions().items():
        for tile_k in range(4):
            for slab in range(2):
                got = words[tile_k, slab * 128 + word] >> (4 * nibble) & 15
                assert got == codes[16 * tile_k + k, 64 * slab + n]
    # A thread uses scale and zero point 8 i + j of a slab for column i + 8 j.
    for column in range(128):
        slab, i, j = column // 64, column % 8, column % 64 // 8
        np.testing.assert_array_equal(
            packed["scales"][:, slab * 64 + 8 * i + j], c.scales[0][:, column]
        )
        nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(j)
        zeros = packed["qzeros"][:, slab * 8 + i] >> (4 * nibble) & 15
        np.testing.assert_array_equal(zeros, c.zeros[0][:, column])


def test_p4_layout():
    """The fragments of mma.m16n8k16, multiplied as the GPU would."""
    K, N, size = 256, 32, 128
    c = Checkpoint(1, K, N, size, zeros=False)
    packed = c.stack().repack("p4", 0, interleave_gate_up=True)
    assert packed["row_block_bytes"] == 2 * 1056
    blocks = packed["bytes"].reshape(2, 2, 1056)  # [row block][128 k]
    x = np.random.default_rng(3).standard_normal((K, 8))
    y = np.zeros((2, 16, 8))
    for block in range(2):
        for chunk in range(2):
            units = blocks[block, chunk, :1024].view(np.uint32).reshape(2, 32, 4)
            scales = blocks[block, chunk, 1024:].view(np.float16).reshape(8, 2)
            for unit in range(2):
                for s in range(4):
                    a = np.zeros((16, 16))
                    for lane in range(32):
                        g, t = divmod(lane, 4)
                        for r in range(4):
                            # Two bf16 at once: 128 + code in each half.
                            v = (int(units[unit, lane, s]) >> 4 * r & 0x000F000F) | 0x43004300
                            pair = (np.array([v & 0xFFFF, v >> 16], np.uint32) << 16).view(
                                np.float32
                            )
                            row, col = g + 8 * (r & 1), 2 * t + 8 * (r >> 1)
                            a[row, col : col + 2] = pair - 136
                    a *= scales.T.reshape(16, 1)  # rows g, then g + 8
                    first = 128 * chunk + 64 * unit + 16 * s
                    y[block] += a @ x[first : first + 16]
    want = c.weights[0].T @ x  # gate rows 0 .. 15, then up rows
    np.testing.assert_allclose(y[0, :8], want[0:8], rtol=1e-10)
    np.testing.assert_allclose(y[1, :8], want[8:16], rtol=1e-10)
    np.testing.assert_allclose(y[0, 8:], want[16:24], rtol=1e-10)
    np.testing.assert_allclose(y[1, 8:], want[24:32], rtol=1e-10)


def test_layouts_refuse_what_they_cannot_hold():
    m = Checkpoint(1, 40, 24, 32).stack()
    with pytest.raises(mo.UnsupportedError):
        m.repack("marlin", 0)
    with pytest.raises(mo.ConfigError):
        m.repack("gpu", 0)
    with pytest.raises(mo.UnsupportedError):
        Checkpoint(1, 96, 16, 48).stack().repack("p4", 0)
    with pytest.raises(mo.ShapeError):
        m.unpack(1)


def silu(v):
    return v / (1 + np.exp(-v))


def layer_f64(gate_up, down, x, ids, weights):
    y = np.zeros(x.shape)
    for t, slot in np.ndindex(ids.shape):
        e = ids[t, slot]
        if e < 0:
            continue
        gate, up = np.split(x[t].astype(np.float64) @ gate_up.weights[e], 2)
        y[t] += weights[t, slot] * ((silu(gate) * up) @ down.weights[e])
    return y


@pytest.mark.parametrize("order", [None, "shared", "per_expert", "random"])
@pytest.mark.parametrize("inter", [32, 24])
def test_layer(order, inter):
    H, E, T, k = 64, 6, 11, 3
    gate_up = Checkpoint(E, H, 2 * inter, 32, order=order, seed=1)
    down = Checkpoint(E, inter, H, -1, seed=2)
    m1, m2 = gate_up.stack(), down.stack()
    stack = mo.ExpertStack.from_marlin(gate_up=m1, down=m2)
    assert stack.kind == "marlin"
    assert stack.marlin("gate_up") is m1
    assert stack.marlin("up") is m1
    assert stack.marlin("down") is m2
    assert stack.quants == {"gate": "INT4", "up": "INT4", "down": "INT4"}
    rng = np.random.default_rng(3)
    x = rng.standard_normal((T, H)).astype(np.float32)
    ids = np.stack([rng.permutation(E)[:k] for _ in range(T)]).astype(np.int32)
    ids[2] = -1
    weights = rng.random((T, k)).astype(np.float32)
    routing = mo.Routing(ids, weights)
    want = layer_f64(gate_up, down, x, ids, weights)
    assert rel(mo.moe_forward_cpu(x, routing, stack), want) < 1e-5
    logits = rng.standard_normal((T, E)).astype(np.float32)
    reference = mo.moe_forward_cpu(x, mo.route(logits, top_k=k), stack)
    for precision, bound in (("exact", 1e-4), ("fast", 2e-2)):
        y = mo.moe_forward(x, logits, stack, top_k=k, precision=precision)
        assert rel(y, reference) < bound
        for gemm in ("bucketed", "aligned"):
            for row_space in ("token_pairs", "packed_rows"):
                for block in (None, 8, 48):
                    with mo.tuning(block_size=block):
                        again = mo.moe_forward_bucketed(
                            x,
                            logits,
                            stack,
                            top_k=k,
                            gemm=gemm,
                            row_space=row_space,
                            precision=precision,
                        )
                    np.testing.assert_array_equal(again, y)


def test_model_shape():
    """Qwen3-30B-A3B: 128 experts of which every fourth is the same."""
    H, inter, E, distinct = 2048, 768, 128, 4
    which = np.arange(E) % distinct
    halves = [
        Checkpoint(distinct, H, 2 * inter, 128, order="per_expert", seed=1),
        Checkpoint(distinct, inter, H, 128, seed=2),
    ]
    stacks = [
        mo.MarlinExpertStack.from_gptq(
            c.qweight[which],
            c.scales[which],
            c.qzeros[which],
            None if c.g_idx is None else c.g_idx[which],
            128,
        )
        for c in halves
    ]
    stack = mo.ExpertStack.from_marlin(*stacks)
    rng = np.random.default_rng(3)
    for T in (1, 6):
        x = rng.standard_normal((T, H)).astype(np.float32)
        ids = np.argsort(rng.random((T, E)), axis=1)[:, :8].astype(np.int32)
        weights = rng.random((T, 8)).astype(np.float32)
        routing = mo.Routing(ids, weights)
        want = layer_f64(*halves, x, ids % distinct, weights)
        first = mo.moe_forward(x, None, stack, routing=routing, precision="exact")
        assert rel(first, want) < 1e-4
        for gemm in ("bucketed", "aligned"):
            again = mo.moe_forward_bucketed(
                x, None, stack, routing=routing, gemm=gemm, precision="exact"
            )
            np.testing.assert_array_equal(again, first)
        assert rel(mo.moe_forward(x, None, stack, routing=routing), want) < 2e-3
        assert rel(mo.moe_forward(x, None, stack, routing=routing, precision="fast"), want) < 2e-2
        if T == 1:
            assert rel(mo.moe_forward_cpu(x, routing, stack), want) < 1e-5


def test_other_stacks_have_no_marlin():
    w = np.zeros((2, 8, 8), np.float32)
    stack = mo.ExpertStack.from_dense_stacks(w, w, w)
    assert stack.marlin("gate_up") is None
    assert stack.marlin("down") is None
    with pytest.raises(mo.ConfigError):
        stack.marlin("side")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"qweight": lambda c: c.qweight[0]}, "ShapeError"),
        ({"qweight": lambda c: c.qweight.astype(np.float32)}, "DTypeError"),
        ({"qweight": lambda c: np.asfortranarray(c.qweight)}, "ShapeError"),
        ({"scales": lambda c: c.scales[:, :1]}, "ShapeError"),
        ({"scales": lambda c: c.scales.astype(np.float64)}, "DTypeError"),
        ({"qzeros": lambda c: c.qzeros[:, :, :-1]}, "ShapeError"),
        ({"g_idx": lambda c: np.arange(63, dtype=np.int32)}, "ShapeError"),
        ({"g_idx": lambda c: np.full(64, 2, np.int32)}, "FormatError"),
        ({"g_idx": lambda c: np.full(64, -1, np.int32)}, "FormatError"),
        ({"group_size": lambda c: 0}, "ShapeError"),
        ({"group_size": lambda c: 64}, "ShapeError"),
        ({"checkpoint_format": lambda c: "gptq_v3"}, "ConfigError"),
    ],
)
def test_bad_tensors(change, error):
    c = Checkpoint(2, 64, 32, 32)
    arguments = {"qweight": c.qweight, "scales": c.scales, "qzeros": c.qzeros, "group_size": 32}
    mo.MarlinExpertStack.from_gptq(**arguments)
    arguments |= {name: make(c) for name, make in change.items()}
    with pytest.raises(getattr(mo, error)):
        mo.MarlinExpertStack.from_gptq(**arguments)


def test_bad_dispatches():
    m = Checkpoint(2, 64, 32, 32).stack()
    x = np.zeros((4, 64), np.float32)
    for bad in ((2, 0, 0, 1), (0, 4, 0, 1), (0, 0, 0, 5), (0, -1, 0, 1), (0, 0, 1 << 40, 1)):
        with pytest.raises(mo.ShapeError):
            m.gemm_phase_batched(x, [bad])
    with pytest.raises(mo.ShapeError):
        m.gemm_phase_batched(x, [(0, 0, 0, 2), (1, 2, 1, 1)])
    with pytest.raises(mo.ShapeError):
        m.gemm_phase_batched(x[:, :32], [(0, 0, 0, 1)])

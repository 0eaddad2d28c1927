"""The GPU layouts of INT4 group experts, read as their kernels would."""

import numpy as np
import pytest
from int4 import Checkpoint
from values import normal

import moesaic as mo


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
    x = normal(K, 8).astype(np.float64)
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

"""The scalar decoders and encoders against the `gguf` package."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
testing = pytest.importorskip("moesaic.testing")

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: E402

FLOATS = ("F32", "F16", "BF16")
BLOCKS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip

# Relative root mean square error on normal weights that the encoder must stay below. NVFP4 is
# tested on weights of a size for its narrow scales.
ENCODERS = {
    "F32": 0.0, "F16": 4e-4, "BF16": 3e-3, "Q8_0": 0.007,
    "Q4_0": 0.10, "Q4_1": 0.085, "Q5_0": 0.05, "Q5_1": 0.041,
    "Q2_K": 0.31, "Q3_K": 0.155, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02,
    "IQ4_NL": 0.09, "IQ4_XS": 0.09, "MXFP4": 0.14, "NVFP4": 0.11,
}  # fmt: skip

# Byte offsets of the f16 fields of a block.
F16_FIELDS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


def sizes(name):
    """(weights, bytes) of a block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def gguf_dequantize(raw, name, shape):
    with np.errstate(all="ignore"):
        rows = raw.reshape(shape[0], -1)
        return gguf.quants.dequantize(rows, GGMLQuantizationType[name]).reshape(shape)


def random_blocks(name, rows, blocks, rng, sane):
    """Random bytes as uint8 [rows, bytes]; `sane` makes every f16 scale a moderate number."""
    _, size = sizes(name)
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    if sane:
        for offset in F16_FIELDS.get(name, ()):
            scale = rng.normal(0, 0.05, (rows, blocks, 1)).astype(np.float16)
            raw[..., offset : offset + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def assert_same_bits(got, want):
    assert got.dtype == np.float32 and got.shape == want.shape
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    got_bits = np.ascontiguousarray(got).view(np.uint32)
    want_bits = np.ascontiguousarray(want).view(np.uint32)
    np.testing.assert_array_equal(got_bits[~nan], want_bits[~nan])


@pytest.mark.parametrize("sane", (True, False), ids=("sane", "any bytes"))
@pytest.mark.parametrize("name", BLOCKS)
def test_dequantize_matches_gguf(name, sane):
    rng = np.random.default_rng([GGMLQuantizationType[name], sane])
    rows, blocks = 16, 24
    raw = random_blocks(name, rows, blocks, rng, sane)
    shape = (rows, blocks * sizes(name)[0])
    got = testing.dequantize(raw.reshape(-1), name, shape)
    assert_same_bits(got, gguf_dequantize(raw, name, shape))


@pytest.mark.parametrize("name", FLOATS)
def test_dequantize_floats_matches_gguf(name):
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, 8 * 512 * sizes(name)[1], dtype=np.uint8)
    got = testing.dequantize(raw, name, (8, 512))
    assert_same_bits(got, gguf_dequantize(raw, name, (8, 512)))


def test_every_f16_and_bf16_value():
    codes = np.arange(65536, dtype=np.uint16)
    f16 = testing.dequantize(codes.view(np.uint8), "F16", (65536,))
    assert_same_bits(f16, codes.view(np.float16).astype(np.float32))
    bf16 = testing.dequantize(codes.view(np.uint8), "BF16", (65536,))
    assert_same_bits(bf16, (codes.astype(np.uint32) << 16).view(np.float32))


def test_f32_to_f16_and_bf16_round_as_numpy_and_gguf():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    # f16's own range is 2^5 of f32's 2^8 exponents; half of the values go there, most near ties.
    bits[::2] = (bits[::2] & 0x8FFFFFFF) | 0x30000000
    bits[::4] = (bits[::4] & 0xFFFFE000) | 0x1000 | (bits[::4] & 1)
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        want = values.astype(np.float16)
    got = testing.quantize(values, "F16").reshape(-1).view(np.uint16)
    np.testing.assert_array_equal(got, want.view(np.uint16))
    want = gguf.quants.quantize(values, GGMLQuantizationType.BF16)
    got = testing.quantize(values, "BF16").reshape(-1)
    np.testing.assert_array_equal(got, want.reshape(-1))


def weights(name, shape, rng):
    scale = 3.0 if name == "NVFP4" else 0.02
    return rng.normal(0, scale, shape).astype(np.float32)


@pytest.mark.parametrize("name", ENCODERS)
def test_quantize_round_trip(name):
    rng = np.random.default_rng(11)
    w = weights(name, (16, 2048), rng)
    before = w.copy()
    raw = testing.quantize(w, name)
    elems, size = sizes(name)
    assert raw.dtype == np.uint8 and raw.size == w.size // elems * size
    np.testing.assert_array_equal(w, before)
    np.testing.assert_array_equal(raw, testing.quantize(w, name))

    decoded = gguf_dequantize(raw.reshape(-1), name, w.shape)
    assert_same_bits(testing.dequantize(raw.reshape(-1), name, w.shape), decoded)
    error = np.sqrt(np.mean((decoded - w) ** 2) / np.mean(w**2))
    assert error <= ENCODERS[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_quantize_zeros_and_single_values(name):
    elems, _ = sizes(name)
    w = np.zeros((3, elems), np.float32)
    w[1, elems // 2] = 1.0
    w[2, :] = -1.0
    got = testing.dequantize(testing.quantize(w, name).reshape(-1), name, w.shape)
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got[1:], w[1:], atol=0.04)


# Types whose reference encoder in ggml is a formula (no search): the same bytes.
@pytest.mark.parametrize("name", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16"))
def test_quantize_gives_the_bytes_of_gguf(name):
    rng = np.random.default_rng(13)
    w = weights(name, (32, 1024), rng)
    want = gguf.quants.quantize(w, GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(testing.quantize(w, name).reshape(-1), want.reshape(-1))


def test_bad_sizes_and_types_raise():
    with pytest.raises(ValueError):
        testing.quantize(np.zeros((2, 100), np.float32), "Q4_K")
    with pytest.raises(ValueError):
        testing.dequantize(np.zeros(144, np.uint8), "Q4_K", (1, 100))
    with pytest.raises(ValueError):
        testing.dequantize(np.zeros(143, np.uint8), "Q4_K", (1, 256))
    with pytest.raises(NotImplementedError):
        testing.quantize(np.zeros((1, 256), np.float32), "IQ2_XXS")
    with pytest.raises(NotImplementedError):
        testing.dequantize(np.zeros(36, np.uint8), "Q8_1", (1, 32))

"""Decoders and encoders: the decoders against the `gguf` package, the encoders by their error."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
mo = pytest.importorskip("moesaic")
testing = mo.testing

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: E402

FLOATS = ("F32", "F16", "BF16")
BLOCKS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip

# Relative root mean square error on normal weights that the encoder must stay below, four per cent
# above what it reaches. NVFP4 is tested on weights of a size for its narrow scales.
ENCODERS = {
    "F32": 0, "F16": 0.0004, "BF16": 0.003, "Q4_0": 0.0842, "Q4_1": 0.0718, "Q5_0": 0.0417,
    "Q5_1": 0.0357, "Q8_0": 0.00556, "Q2_K": 0.269, "Q3_K": 0.148, "Q4_K": 0.0724,
    "Q5_K": 0.0364, "Q6_K": 0.0173, "IQ2_XXS": 0.34, "IQ2_XS": 0.296, "IQ3_XXS": 0.184,
    "IQ1_S": 0.46, "IQ4_NL": 0.0762, "IQ3_S": 0.134, "IQ2_S": 0.248, "IQ4_XS": 0.0766,
    "IQ1_M": 0.427, "TQ1_0": 0.451, "TQ2_0": 0.451, "MXFP4": 0.116, "NVFP4": 0.0848,
    "Q1_0": 0.625, "Q2_0": 0.364, "E4M3": 0.0267,
}  # fmt: skip
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
NO_WEIGHTS = (
    "F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4", "NVFP4", "E4M3",
)  # fmt: skip
TAKE_WEIGHTS = tuple(name for name in ENCODERS if name not in NO_WEIGHTS)

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


def block_elems(name):
    return testing.quant_types()[name]["block_elems"]


def relative_rms(got, want, counts=1.0):
    rest = got.astype(np.float64) - want
    return np.sqrt(np.sum(counts * rest**2) / np.sum(counts * want.astype(np.float64) ** 2))


@pytest.mark.parametrize("name", ENCODERS)
def test_quantize_round_trip(name):
    rng = np.random.default_rng(11)
    w = weights(name, (4, 2048), rng)
    before = w.copy()
    raw = mo.quantize(w, name)
    facts = testing.quant_types()[name]
    size = w.shape[1] // facts["block_elems"] * facts["block_bytes"]
    assert raw.dtype == np.uint8 and raw.shape == (4, size)
    np.testing.assert_array_equal(w, before)

    decoded = mo.dequantize(raw, name)
    if name not in ("Q1_0", "Q2_0", "E4M3"):  # the package has no decoder
        assert_same_bits(decoded, gguf_dequantize(raw.reshape(-1), name, w.shape))
    assert relative_rms(decoded, w) <= ENCODERS[name]


def test_every_type_with_an_encoder_has_a_bound():
    encodes = {name for name, facts in testing.quant_types().items() if facts["encodes"]}
    decodes = {name for name, facts in testing.quant_types().items() if facts["decodes"]}
    assert encodes == set(ENCODERS) == decodes - {"F64"}
    takes = {name for name, facts in testing.quant_types().items() if facts["takes_weights"]}
    assert takes == set(TAKE_WEIGHTS)


@pytest.mark.parametrize("name", ENCODERS)
def test_threads_and_slices_do_not_change_bytes(name):
    w = weights(name, (3, 4096 + 256), np.random.default_rng(12))
    if name in GRIDS:
        w = w[:, 3584:]  # they take long; the rest still crosses a piece of 4096
        w = np.tile(w, (1, 6))[:2, : 4096 + 256]
    counts = np.random.default_rng(13).random(w.shape[1]).astype(np.float32)
    given = {"weights": counts} if name in TAKE_WEIGHTS else {}
    with mo.tuning(threads=1):
        one = mo.quantize(w, name, **given)
    with mo.tuning(threads=3):
        np.testing.assert_array_equal(one, mo.quantize(w, name, **given))
    elems = block_elems(name)
    first = mo.quantize(w[1, :elems], name, **{k: v[:elems] for k, v in given.items()})
    np.testing.assert_array_equal(first, one[1, : len(first)])


@pytest.mark.parametrize("name", TAKE_WEIGHTS)
def test_weights_lower_the_weighted_error(name):
    rng = np.random.default_rng(14)
    w = weights(name, (2, 1024), rng)
    counts = np.exp(2 * rng.standard_normal(1024)).astype(np.float32)
    plain = relative_rms(mo.dequantize(mo.quantize(w, name), name), w, counts)
    heeded = relative_rms(mo.dequantize(mo.quantize(w, name, weights=counts), name), w, counts)
    assert heeded < 0.97 * plain


def test_weights_broadcast_as_in_numpy():
    rng = np.random.default_rng(15)
    w = weights("Q4_0", (3, 4, 64), rng)
    counts = rng.random((3, 1, 64)).astype(np.float32)
    got = mo.quantize(w, "Q4_0", weights=counts)
    for expert in range(3):
        want = mo.quantize(w[expert], "Q4_0", weights=counts[expert, 0])
        np.testing.assert_array_equal(got[expert], want)
    np.testing.assert_array_equal(
        got, mo.quantize(w, "Q4_0", weights=np.ascontiguousarray(np.broadcast_to(counts, w.shape)))
    )
    with pytest.raises(mo.ShapeError, match=r"weights\[:, None\]"):
        mo.quantize(w, "Q4_0", weights=counts[:, 0])
    with pytest.raises(mo.ShapeError, match="weights"):
        mo.quantize(w, "Q4_0", weights=counts[..., :32])


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_types_without_importances_say_so(name):
    w = np.ones((1, 256), np.float32)
    with pytest.raises(mo.UnsupportedError, match=f"none for {name}"):
        mo.quantize(w, name, weights=np.ones(256, np.float32))


@pytest.mark.parametrize("bad", (np.nan, np.inf, -1.0))
def test_bad_weights_are_refused_by_position(bad):
    counts = np.ones((2, 256), np.float32)
    counts[1, 9] = bad
    with pytest.raises(mo.ConfigError, match=r"weights\[1, 9\]"):
        mo.quantize(np.ones((2, 256), np.float32), "Q4_K", weights=counts)


@pytest.mark.parametrize("name", ENCODERS)
def test_quantize_odd_rows(name):
    """Zeros are exact, constants near, and what is tiny or huge beside others still decodes."""
    elems = max(block_elems(name), 32)
    w = np.zeros((6, elems), np.float32)
    w[1] = -1.0
    w[2] = np.float32(1e-30)
    w[3] = np.linspace(-1e-6, 1e-6, elems)
    w[4, elems // 2] = 2688.0
    w[5] = 2688.0
    got = mo.dequantize(mo.quantize(w, name), name)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got[[1, 5]], w[[1, 5]], rtol=0.15 if name == "MXFP4" else 0.04)
    assert np.abs(got[2:4]).max() < 1e-5 if name != "NVFP4" else np.abs(got[2:4]).max() < 2e-3
    if name not in (*GRIDS, "Q1_0"):  # they have no zero; the IQ4 types have 1 in 127 for one
        np.testing.assert_allclose(got[4], w[4], rtol=0.15, atol=25)


@pytest.mark.parametrize("name", ENCODERS)
def test_values_that_no_type_holds_are_refused_by_position(name):
    w = np.ones((2, 3, 256), np.float32)
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        w[1, 2, 200] = bad
        if name in FLOATS:
            assert mo.quantize(w, name).shape[:2] == (2, 3)
            continue
        with pytest.raises(mo.ConfigError, match=r"values\[1, 2, 200\]"):
            mo.quantize(w, name)


@pytest.mark.parametrize("name", ("Q4_K", "Q8_0", "F16", "BF16"))
def test_narrow_floats_strides_and_ranks(name):
    w = weights(name, (2, 3, 2, 256), np.random.default_rng(16)).astype(np.float16)
    want = mo.quantize(w.astype(np.float32), name)
    np.testing.assert_array_equal(mo.quantize(w, name), want)
    np.testing.assert_array_equal(mo.quantize(w[0, 0, 0], name), want[0, 0, 0])
    np.testing.assert_array_equal(mo.quantize(w[:, ::2], name), want[:, ::2])
    across = np.ascontiguousarray(np.moveaxis(w, -1, 0))
    np.testing.assert_array_equal(mo.quantize(np.moveaxis(across, 0, -1), name), want)
    assert mo.quantize(w[:0], name).shape == (0, *want.shape[1:])
    assert mo.dequantize(want[:0], name).shape == (0, 3, 2, 256)


# Types of which the search finds what a formula of ggml says: the same bytes.
@pytest.mark.parametrize("name", ("Q8_0", "BF16", "F16"))
def test_quantize_gives_the_bytes_of_gguf(name):
    rng = np.random.default_rng(13)
    w = weights(name, (32, 1024), rng)
    want = gguf.quants.quantize(w, GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(mo.quantize(w, name).reshape(-1), want.reshape(-1))


def test_ternary_weights_survive():
    rng = np.random.default_rng(17)
    w = np.float32(0.03125) * rng.integers(-1, 2, (4, 512)).astype(np.float32)
    for name in ("TQ1_0", "TQ2_0", "Q2_0"):
        np.testing.assert_array_equal(mo.dequantize(mo.quantize(w, name), name), w)


def test_bad_sizes_and_types_raise():
    with pytest.raises(mo.ShapeError):
        mo.quantize(np.zeros((2, 100), np.float32), "Q4_K")
    with pytest.raises(mo.DTypeError):
        mo.quantize(np.zeros((2, 256), np.int32), "Q4_K")
    with pytest.raises(mo.ShapeError):
        mo.dequantize(np.zeros(144, np.uint8), "Q4_K", (1, 100))
    for data in (np.zeros(143, np.uint8), np.zeros((2, 143), np.uint8)):
        with pytest.raises(mo.ShapeError, match="144"):
            mo.dequantize(data, "Q4_K")
    with pytest.raises(mo.ShapeError):
        mo.dequantize(np.zeros(143, np.uint8), "Q4_K", (1, 256))
    with pytest.raises(mo.UnsupportedError):
        mo.quantize(np.zeros((1, 256), np.float32), "Q8_K")
    with pytest.raises(mo.UnsupportedError):
        mo.dequantize(np.zeros(36, np.uint8), "Q8_1", (1, 32))
    with pytest.raises(mo.ConfigError, match="nearest: Q4_K"):
        mo.quantize(np.zeros((1, 256), np.float32), "q4k")


def test_testing_has_the_same_functions():
    assert testing.quantize is mo.quantize and testing.dequantize is mo.dequantize

"""One matrix on its own: made in every way, called with any array, refused where wrong."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from files import write_small
from oracle import rel_l2
from values import normal, poisoned

import moesaic as mo

N, K = 37, 512
TYPES = sorted(name for name, facts in mo.testing.quant_types().items() if facts["encodes"])
ROUTER = "blk.0.ffn_gate_inp.weight"


def product(w, x, bias=None) -> np.ndarray:
    """x @ w.T + bias in f64."""
    y = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    return y if bias is None else y + np.asarray(bias, np.float64)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return normal(N, K, seed=1, scale=K**-0.5)


@pytest.fixture(scope="module")
def bias() -> np.ndarray:
    return normal(N, seed=2)


@pytest.fixture(scope="module")
def matrix(values, bias) -> mo.QuantMatrix:
    return mo.QuantMatrix.from_dense(values, "Q4_K", bias=bias)


@pytest.mark.parametrize("quant", TYPES)
def test_every_type(values, bias, quant):
    coded = mo.quantize(values, quant)
    matrix = mo.QuantMatrix.from_dense(values, quant, bias=bias)
    np.testing.assert_array_equal(matrix.encoded(), coded.view(np.uint8).reshape(N, -1))
    np.testing.assert_array_equal(matrix.dequantize(), mo.dequantize(coded, quant))
    assert matrix.shape == (N, K) and matrix.quant == quant and matrix.nbytes == coded.nbytes
    for layout in ("auto", "file"):
        same = mo.QuantMatrix.from_encoded(coded, quant, bias=bias, layout=layout)
        assert same.layout == ("panels" if layout == "auto" else "rows")
        for rows in (1, 3, 40):
            x = normal(rows, K, seed=rows)
            for precision, bound in {"exact": 5e-5, "fast": 1.2e-2}.items():
                y = same(x, out=poisoned(rows, N), precision=precision)
                assert rel_l2(y, product(matrix.dequantize(), x, bias)) < bound
                np.testing.assert_array_equal(y, matrix(x, precision=precision))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "shape", [(K,), (1, K), (0, K), (5, K), (2, 3, K), (2, 2, 2, K), (0, 3, K)]
)
def test_shapes_and_element_types(matrix, dtype, shape):
    x = normal(*shape).astype(dtype)
    y = matrix(x, precision="exact")
    assert y.shape == (*shape[:-1], N) and y.dtype == x.dtype
    wide = matrix(x.astype(np.float32), precision="exact")
    np.testing.assert_array_equal(y, wide.astype(dtype))
    out = poisoned(*shape[:-1], N)
    assert matrix(x, out=out, precision="exact") is out
    np.testing.assert_array_equal(out, wide)


def test_strides(matrix):
    x = normal(6, K)
    want = matrix(x)
    for given in (x[::-1][::-1], np.asfortranarray(x), np.repeat(x, 2, 1)[:, ::2]):
        np.testing.assert_array_equal(matrix(given), want)
    deep = np.ascontiguousarray(x.reshape(2, 3, K).transpose(1, 0, 2)).transpose(1, 0, 2)
    np.testing.assert_array_equal(matrix(deep), want.reshape(2, 3, N))
    out = poisoned(6, 2 * N)[:, :N]
    np.testing.assert_array_equal(matrix(x, out=out), want)


def test_accumulate(matrix):
    x, before = normal(4, K), normal(4, N, seed=9)
    out = before.copy()
    matrix(x, out=out, accumulate=True)
    np.testing.assert_array_equal(out, before + matrix(x))


def test_a_workspace_is_enough_and_checked(matrix):
    x = normal(33, K)
    workspace = mo.Workspace.for_matrix(matrix, 33)
    np.testing.assert_array_equal(matrix(x, workspace=workspace), matrix(x))
    np.testing.assert_array_equal(matrix(x[:2], workspace=workspace), matrix(x[:2]))
    out = poisoned(33, N)
    with pytest.raises(mo.WorkspaceError, match=r"at least \d+ bytes for 33 rows"):
        matrix(x, workspace=mo.Workspace.for_matrix(matrix, 32), out=out)
    assert np.isnan(out).all()


def test_precision_follows_the_tuning_and_the_call(matrix):
    x = normal(8, K)
    exact, fast = (matrix(x, precision=p) for p in ("exact", "fast"))
    assert not np.array_equal(exact, fast)
    np.testing.assert_array_equal(matrix(x), fast)
    np.testing.assert_array_equal(matrix(x[:2]), exact[:2])
    with mo.tuning(precision="exact"):
        np.testing.assert_array_equal(matrix(x), exact)
        np.testing.assert_array_equal(matrix(x, precision="fast"), fast)
    with mo.tuning(batch_invariant=True):
        np.testing.assert_array_equal(matrix(x), exact)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_threads_do_not_change_results(matrix, threads, rows):
    x = normal(rows, K)
    want = matrix(x)
    with mo.tuning(threads=threads):
        np.testing.assert_array_equal(matrix(x), want)


def test_calls_from_many_threads(matrix):
    xs = [normal(1 + 7 * i, K, seed=i) for i in range(6)]
    want = [matrix(x) for x in xs]
    start = threading.Barrier(len(xs))

    def work(i):
        start.wait()
        for _ in range(20):
            np.testing.assert_array_equal(matrix(xs[i], out=poisoned(len(xs[i]), N)), want[i])

    with ThreadPoolExecutor(len(xs)) as pool:
        list(pool.map(work, range(len(xs))))


def test_nonfinite_rows_stay_alone(matrix):
    x = normal(5, K)
    want = matrix(x)
    x[1, 3], x[3] = np.nan, np.inf
    y = matrix(x)
    np.testing.assert_array_equal(y[[0, 2, 4]], want[[0, 2, 4]])
    assert not np.isfinite(y[[1, 3]]).any()


@pytest.mark.parametrize("kind", ["torch", "own"])
def test_results_are_of_the_kind_of_x(matrix, kind):
    x = normal(3, K)
    if kind == "own":
        y = matrix(mo.asarray(x))
        assert type(y) is mo.Array
    else:
        torch = pytest.importorskip("torch")
        y = matrix(torch.from_numpy(x))
        assert isinstance(y, torch.Tensor) and y.dtype == torch.float32
        half = matrix(torch.from_numpy(x).bfloat16())
        assert half.dtype == torch.bfloat16 and half.shape == (3, N)
        out = torch.full((3, N), float("nan"))
        assert matrix(torch.from_numpy(x), out=out) is out and bool(torch.equal(out, y))
    np.testing.assert_array_equal(np.asarray(y), matrix(x))


# --- how it is made ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dense_values_keep_their_type(values, dtype):
    given = values.astype(dtype)
    matrix = mo.QuantMatrix.from_dense(given)
    assert matrix.quant == {2: "F16", 4: "F32"}[given.itemsize] or dtype is ml_dtypes.bfloat16
    np.testing.assert_array_equal(matrix.dequantize(), given.astype(np.float32))
    np.testing.assert_array_equal(
        mo.QuantMatrix.from_dense(np.asfortranarray(given)).dequantize(), matrix.dequantize()
    )
    assert matrix.bias is None and matrix.scale == 1.0 and matrix.device == "cpu"


def test_importances(values):
    weights = np.abs(normal(K, seed=4)) ** 4
    matrix = mo.QuantMatrix.from_dense(values, "Q4_0", weights)
    want = mo.quantize(values, "Q4_0", weights=weights)
    np.testing.assert_array_equal(matrix.encoded(), want)
    assert not np.array_equal(matrix.encoded(), mo.quantize(values, "Q4_0"))
    with pytest.raises(mo.UnsupportedError):
        mo.QuantMatrix.from_dense(values, "Q8_0", weights)
    with pytest.raises(mo.UnsupportedError):
        mo.QuantMatrix.from_dense(values, weights=weights)


def test_encoded_bytes_of_any_shape(values):
    coded = mo.quantize(values, "Q6_K")
    want = mo.QuantMatrix.from_encoded(coded, "Q6_K").dequantize()
    for data in (coded.ravel(), coded.tobytes(), memoryview(coded.ravel())):
        matrix = mo.QuantMatrix.from_encoded(data, "Q6_K", (N, K))
        np.testing.assert_array_equal(matrix.dequantize(), want)
    scaled = mo.QuantMatrix.from_encoded(coded, "Q6_K", scale=0.5)
    assert scaled.scale == 0.5
    np.testing.assert_array_equal(scaled.dequantize(), want * np.float32(0.5))
    np.testing.assert_array_equal(scaled.encoded(), coded)
    x = normal(3, K)
    np.testing.assert_allclose(
        scaled(x), 0.5 * mo.QuantMatrix.from_encoded(coded, "Q6_K")(x), rtol=1e-6
    )


def test_views_keep_their_owner(values):
    x = normal(2, K)
    want = mo.QuantMatrix.from_dense(values, "Q8_0")(x)
    matrix = mo.QuantMatrix.from_encoded(mo.quantize(values, "Q8_0"), "Q8_0", layout="file")
    copies = [mo.quantize(values + i, "Q8_0") for i in range(8)]  # takes memory that was let go of
    np.testing.assert_array_equal(matrix(x), want)
    assert len(copies) == 8


def test_bias_is_a_copy_and_read_only(values, bias):
    given = bias.copy()
    matrix = mo.QuantMatrix.from_dense(values, bias=given)
    given[:] = 0
    np.testing.assert_array_equal(matrix.bias, bias)
    assert not matrix.bias.flags.writeable
    half = mo.QuantMatrix.from_dense(values, bias=bias.astype(np.float16))
    np.testing.assert_array_equal(half.bias, bias.astype(np.float16).astype(np.float32))


def test_it_repeats_and_explains_itself(matrix):
    assert (
        repr(matrix) == f"moesaic.QuantMatrix([37, 512], Q4_K, {matrix.nbytes} bytes, with a bias)"
    )
    facts = mo.explain(matrix, 1)
    assert facts["precision"] == "exact" and facts["layout"] == "panels" and facts["rows"] == "1"
    assert mo.explain(matrix, 100)["precision"] == "fast"
    assert facts["weight bytes read"] == str(matrix.nbytes)
    with mo.tuning(precision="fast"):
        assert mo.explain(matrix, 1)["precision reason"] == "asked for"


# --- files -------------------------------------------------------------------------------------


def write_tensors(path, tensors) -> None:
    """A file of tensors by name: (array, type name), or an array of f32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            data, quant = tensor
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[quant])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory, values, bias):
    path = tmp_path_factory.mktemp("matrix") / "model.gguf"
    coded = mo.quantize(values, "Q5_K")
    write_tensors(
        path,
        {
            "output.weight": (coded, "Q5_K"),
            "blk.0.attn_q.weight": (coded, "Q5_K"),
            "blk.0.attn_q.bias": bias,
            "blk.0.attn_k.weight": (coded, "Q5_K"),
            "blk.0.attn_k.scale": np.array([0.25], np.float32),
            "output_norm.weight": normal(K, seed=5),
            "blk.0.ffn_up_exps.weight": normal(3, 4, 32),
        },
    )
    return path


@pytest.mark.parametrize("layout", ["auto", "file"])
@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_of_a_file(path, values, bias, layout, mmap):
    decoded = mo.dequantize(mo.quantize(values, "Q5_K"), "Q5_K")
    x = normal(3, K)
    seen = []
    with mo.GgufFile(path, mmap=mmap) as file:
        plain = mo.QuantMatrix.from_gguf(file, "output.weight", layout=layout, progress=seen.append)
        np.testing.assert_array_equal(plain.dequantize(), decoded)
        assert seen[0].what == "output.weight" and plain.bias is None
        biased = mo.QuantMatrix.from_gguf(
            file, "blk.0.attn_q.weight", bias="blk.0.attn_q.bias", layout=layout
        )
        np.testing.assert_array_equal(biased.bias, bias)
        assert rel_l2(biased(x, precision="exact"), product(decoded, x, bias)) < 5e-5
        scaled = mo.QuantMatrix.from_gguf(file, "blk.0.attn_k.weight", layout=layout)
        assert scaled.scale == 0.25
        assert rel_l2(scaled(x, precision="exact"), product(decoded / 4, x)) < 5e-5
        row = mo.QuantMatrix.from_gguf(file, "output_norm.weight", layout=layout)
        assert row.shape == (1, K)
        half = mo.QuantMatrix.from_gguf(file, "output.weight", "f16", layout=layout)
        np.testing.assert_array_equal(half.dequantize(), decoded.astype(np.float16))
        if mmap and layout == "file":
            with pytest.raises(mo.DeviceError, match="holders"):
                file.close()
        del plain, biased, scaled, row, half
    np.testing.assert_array_equal(
        mo.QuantMatrix.from_gguf(path, "output.weight", layout=layout).dequantize(), decoded
    )


def test_every_matrix_of_a_layer_file(small):
    with mo.GgufFile(small.path) as file:
        matrix = mo.QuantMatrix.from_gguf(file, ROUTER)
        x = normal(3, small.hidden)
        with mo.MoeLayer.from_gguf(file, 0) as layer:
            want = product(layer.router_weight, x)
        assert rel_l2(matrix(x), want) < 1e-5


def test_files_refuse(path):
    file = mo.GgufFile(path)
    with pytest.raises(mo.FormatError, match=r"attn_q\.wieght.*nearest: blk\.0\.attn_q\.weight"):
        mo.QuantMatrix.from_gguf(file, "blk.0.attn_q.wieght")
    with pytest.raises(mo.FormatError, match=r"expected a matrix.*got \[3, 4, 32\].*ExpertStack"):
        mo.QuantMatrix.from_gguf(file, "blk.0.ffn_up_exps.weight")
    with pytest.raises(mo.FormatError, match=r"expected shape \[37\], got \[512\]"):
        mo.QuantMatrix.from_gguf(file, "output.weight", bias="output_norm.weight")
    with pytest.raises(mo.FormatError, match="no such tensor"):
        mo.QuantMatrix.from_gguf(file, "output.weight", bias="output.bias")
    with pytest.raises(mo.OperationCancelled):
        mo.QuantMatrix.from_gguf(file, "output.weight", progress=lambda p: False)
    file.close()
    with pytest.raises(mo.DeviceError):
        mo.QuantMatrix.from_gguf(file, "output.weight")


def test_pickles_and_copies(path, matrix):
    x = normal(2, K)
    read = mo.QuantMatrix.from_gguf(path, "blk.0.attn_q.weight", bias="blk.0.attn_q.bias")
    again = pickle.loads(pickle.dumps(read))
    np.testing.assert_array_equal(again(x), read(x))
    np.testing.assert_array_equal(again.bias, read.bias)
    with pytest.raises(mo.DTypeError, match="QuantMatrix"):
        pickle.dumps(matrix)
    assert copy.copy(matrix) is not None
    np.testing.assert_array_equal(copy.deepcopy(matrix)(x), matrix(x))


def test_a_changed_file_is_no_pickle_of_it(tmp_path):
    file = write_small(tmp_path / "m.gguf")
    data = pickle.dumps(mo.QuantMatrix.from_gguf(file.path, ROUTER))
    write_small(tmp_path / "m.gguf", hidden=512)
    with pytest.raises(mo.FormatError):
        pickle.loads(data)


# --- misuse ------------------------------------------------------------------------------------

MAKE = mo.QuantMatrix.from_dense
ENCODED = mo.QuantMatrix.from_encoded
BYTES = np.zeros((4, 34), np.uint8)

REFUSED = {
    "a vector": (
        lambda: MAKE(np.zeros(8, np.float32)),
        mo.ShapeError,
        r"values: expected \[N, K\]",
    ),
    "three dimensions": (lambda: MAKE(np.zeros((2, 4, 8), np.float32)), mo.ShapeError, "values"),
    "no rows": (lambda: MAKE(np.zeros((0, 8), np.float32)), mo.ShapeError, "none of them 0"),
    "integers": (lambda: MAKE(np.zeros((4, 8), np.int32)), mo.DTypeError, "f32, f16 or bf16"),
    "f64": (lambda: MAKE(np.zeros((4, 8))), mo.DTypeError, "values"),
    "a list": (lambda: MAKE([[1.0]]), mo.DTypeError, "numpy.asarray"),
    "None": (lambda: MAKE(None), mo.DTypeError, "values"),
    "unknown type": (lambda: MAKE(np.zeros((4, 32), np.float32), "Q4K"), mo.ConfigError, "Q4_K"),
    "no encoder": (
        lambda: MAKE(np.zeros((4, 256), np.float32), "Q8_K"),
        mo.UnsupportedError,
        "Q8_K",
    ),
    "odd columns": (
        lambda: MAKE(np.zeros((4, 33), np.float32), "Q8_0"),
        mo.ShapeError,
        "multiple of 32, got 33",
    ),
    "a NaN": (
        lambda: MAKE(np.full((4, 32), np.nan, np.float32), "Q8_0"),
        mo.ConfigError,
        "nan",
    ),
    "short bias": (
        lambda: MAKE(np.zeros((4, 8), np.float32), bias=np.zeros(3, np.float32)),
        mo.ShapeError,
        r"bias: expected \[4\]",
    ),
    "column bias": (
        lambda: MAKE(np.zeros((4, 8), np.float32), bias=np.zeros((4, 1), np.float32)),
        mo.ShapeError,
        "bias",
    ),
    "integer bias": (
        lambda: MAKE(np.zeros((4, 8), np.float32), bias=np.zeros(4, np.int32)),
        mo.DTypeError,
        "bias",
    ),
    "unknown layout": (
        lambda: MAKE(np.zeros((4, 8), np.float32), layout="rows"),
        mo.ConfigError,
        "layout",
    ),
    "unknown device": (
        lambda: MAKE(np.zeros((4, 8), np.float32), device="tpu"),
        mo.ConfigError,
        "device",
    ),
    "bytes of no blocks": (lambda: ENCODED(BYTES[:, :33], "Q8_0"), mo.ShapeError, "dense"),
    "rows of no blocks": (
        lambda: ENCODED(np.zeros((4, 33), np.uint8), "Q8_0"),
        mo.ShapeError,
        "whole blocks of 34 bytes",
    ),
    "flat bytes": (lambda: ENCODED(BYTES.ravel(), "Q8_0"), mo.ShapeError, r"give the shape"),
    "too few bytes": (lambda: ENCODED(BYTES, "Q8_0", (5, 32)), mo.ShapeError, "170 bytes"),
    "negative shape": (lambda: ENCODED(BYTES, "Q8_0", (-4, -32)), mo.ShapeError, "none of them 0"),
    "wrapping shape": (lambda: ENCODED(BYTES, "Q8_0", (2**58, 64)), mo.ShapeError, "63 bits"),
    "integer type": (
        lambda: ENCODED(np.zeros((4, 8), np.int32), "I32"),
        mo.UnsupportedError,
        "decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, match = REFUSED[name]
    with pytest.raises(kind, match=match):
        call()


CALLS = {
    "columns": (lambda w: w(normal(2, K - 1)), mo.ShapeError, r"x: expected \[\.\.\., 512\]"),
    "a number": (lambda w: w(np.float32(1)), mo.Error, "x"),
    "integers": (lambda w: w(np.zeros((2, K), np.int32)), mo.DTypeError, "x: expected f32"),
    "five dimensions": (lambda w: w(np.zeros((1,) * 4 + (K,), np.float32)), mo.ShapeError, "x"),
    "out of another shape": (
        lambda w: w(normal(2, K), out=poisoned(3, N)),
        mo.ShapeError,
        r"out: expected \[2, 37\]",
    ),
    "integer out": (
        lambda w: w(normal(2, K), out=np.zeros((2, N), np.int32)),
        mo.DTypeError,
        "out",
    ),
    "read-only out": (
        lambda w: w(normal(2, K), out=np.broadcast_to(np.float32(0), (2, N))),
        mo.ConfigError,
        "writable",
    ),
    "accumulate alone": (lambda w: w(normal(2, K), accumulate=True), mo.ConfigError, "out="),
    "unknown precision": (lambda w: w(normal(2, K), precision="best"), mo.ConfigError, "precision"),
    "no workspace": (
        lambda w: w(normal(2, K), workspace=mo.Workspace(0)),
        mo.WorkspaceError,
        "2 r",
    ),
    "None": (lambda w: w(None), mo.DTypeError, "x"),
    "masked": (lambda w: w(np.ma.array(normal(2, K), mask=True)), mo.DTypeError, "mask"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_refused(matrix, name):
    call, kind, match = CALLS[name]
    with pytest.raises(kind, match=match):
        call(matrix)


def test_out_in_place_of_x():
    square = MAKE(normal(64, 64))
    x = normal(3, 64)
    with pytest.raises(mo.ShapeError, match="memory shared with x"):
        square(x, out=x)


def test_other_devices_say_that_they_do_not(values, path):
    for backend in mo.backends():
        if backend.name == "cpu" or not backend.available:
            continue
        device = str(backend.devices[0])
        for call in (
            lambda device=device: MAKE(values, device=device),
            lambda device=device: ENCODED(mo.quantize(values, "Q8_0"), "Q8_0", device=device),
            lambda device=device: mo.QuantMatrix.from_gguf(path, "output.weight", device=device),
        ):
            with pytest.raises(mo.UnsupportedError, match="only on the CPU"):
                call()
    absent = [b.name for b in mo.backends() if not b.available]
    for name in absent:
        with pytest.raises(mo.DeviceError):
            MAKE(values, device=name)

import array
import gc
import sys
import types

import numpy as np
import pytest
from oracle import rel_l2
from values import normal

import moesaic as mo

DTYPES = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64, "u8": np.uint8}


def ml_dtypes():
    return pytest.importorskip("ml_dtypes")


def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def tensors(monkeypatch):
    """A package of its own, known only by from_dlpack, whose tensors speak only DLPack."""
    module = types.ModuleType("fake_tensors")

    class Tensor:
        def __init__(self, data, device=(1, 0), legacy=False):
            self.data, self.device, self.legacy = data, device, legacy

        def __dlpack_device__(self):
            return self.device

        def __dlpack__(self, **kwargs):
            if self.legacy and kwargs:
                raise TypeError("unexpected keyword argument")
            return self.data.__dlpack__(**kwargs)

    Tensor.__module__ = "fake_tensors.core"
    module.Tensor = Tensor
    module.from_dlpack = lambda x: Tensor(np.from_dlpack(x))
    monkeypatch.setitem(sys.modules, "fake_tensors", module)
    return module


@pytest.mark.parametrize("name", DTYPES)
def test_asarray_shares_memory(name):
    source = np.arange(24).reshape(4, 6).astype(DTYPES[name])
    view = mo.asarray(source)
    assert (view.dtype, view.shape, view.strides) == (name, (4, 6), (6, 1))
    assert view.nbytes == source.nbytes
    assert np.shares_memory(np.asarray(view), source)
    assert np.shares_memory(np.from_dlpack(view), source)
    source[1, 2] = 77
    assert np.asarray(view)[1, 2] == 77


def test_asarray_copy():
    source = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    for copy in (None, False):
        assert np.shares_memory(np.asarray(mo.asarray(source, copy=copy)), source)
    copied = mo.asarray(source, copy=True)
    assert not np.shares_memory(np.asarray(copied), source)
    np.testing.assert_array_equal(np.asarray(copied), source)
    assert copied.strides == (2, 1)


def test_views_keep_their_producer():
    source = np.arange(1000, dtype=np.float32)
    alive = np.from_dlpack(mo.asarray(source))
    expected = source.copy()
    del source
    gc.collect()
    np.testing.assert_array_equal(alive, expected)


def test_export_copy_is_independent():
    source = np.ones(4, np.float32)
    copied = np.from_dlpack(mo.asarray(source), copy=True)
    source[:] = 2
    np.testing.assert_array_equal(copied, np.ones(4))


def test_read_only_exports_say_so():
    source = np.ones(4, np.float32)
    source.flags.writeable = False
    view = mo.asarray(source)
    assert view.readonly
    assert not np.asarray(view).flags.writeable
    assert not np.from_dlpack(view).flags.writeable
    with pytest.raises(BufferError, match="read-only"):
        view.__dlpack__()


@pytest.mark.parametrize("arguments", [{"stream": 1}, {"dl_device": (2, 0)}])
def test_export_refuses(arguments):
    with pytest.raises(BufferError, match=next(iter(arguments))):
        mo.asarray(np.ones(2, np.float32)).__dlpack__(**arguments)


def test_unused_capsules_are_released():
    source = np.ones(4, np.float32)
    before = sys.getrefcount(source)
    for version in (None, (1, 0)):
        view = mo.asarray(source)
        capsule = view.__dlpack__(max_version=version)
        del view, capsule
        gc.collect()
        assert sys.getrefcount(source) == before


def test_buffers_give_numpy(stack):
    x = memoryview(np.ones((2, 24), np.float32))
    assert type(stack.gemv_up(x, np.zeros((2, 1), np.int32))) is np.ndarray
    row = array.array("f", [1.0] * 24)
    assert stack.gemv_up(row, array.array("i", [0, 1])).shape == (2, 40)


@pytest.mark.parametrize("legacy", [False, True])
def test_foreign_in_foreign_out(tensors, stack, legacy):
    x = np.ones((3, 24), np.float32)
    logits = np.eye(3, 5, dtype=np.float32)
    y = mo.moe_forward(tensors.Tensor(x, legacy=legacy), logits, stack, top_k=2)
    assert type(y) is tensors.Tensor
    np.testing.assert_array_equal(y.data, mo.moe_forward(x, logits, stack, top_k=2))


def test_foreign_without_from_dlpack_gives_numpy(tensors, stack, monkeypatch):
    monkeypatch.delattr(tensors, "from_dlpack")
    y = stack.gemv_up(tensors.Tensor(np.ones(24, np.float32)), np.zeros(1, np.int32))
    assert type(y) is np.ndarray


def test_wrong_device_names_the_argument(tensors, stack):
    x = tensors.Tensor(np.ones((1, 24), np.float32), device=(2, 1))
    with pytest.raises(mo.DeviceError, match=r"moe_forward: x: expected .*cpu.*got cuda:1"):
        mo.moe_forward(x, np.zeros((1, 5), np.float32), stack, top_k=1)


def test_own_array_in_own_array_out(stack):
    x = mo.asarray(np.ones(24, np.float32))
    y = stack.gemv_up(x, np.zeros(1, np.int32))
    assert type(y) is mo.Array
    assert (y.dtype, y.shape, len(y), y.device) == ("f32", (1, 40), 1, "cpu")
    np.testing.assert_array_equal(
        np.asarray(y), stack.gemv_up(np.asarray(x), np.zeros(1, np.int32))
    )


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Truncated, which is exact for the small integers used here."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def test_bf16_as_named_bits(stack):
    x = np.arange(48, dtype=np.float32).reshape(2, 24) / 32
    logits = np.eye(2, 5, dtype=np.float32)
    y = mo.moe_forward(mo.asarray(bf16_bits(x), dtype="bf16"), logits, stack, top_k=2)
    assert y.dtype == "bf16"
    got = (np.asarray(y).astype(np.uint32) << 16).view(np.float32)
    assert rel_l2(got, mo.moe_forward(x, logits, stack, top_k=2)) < 4e-3
    assert mo.asarray(x, dtype="bf16").dtype == "bf16"  # converted, not named anew


def test_bf16_of_ml_dtypes(stack):
    bfloat16 = ml_dtypes().bfloat16
    x = (np.arange(48, dtype=np.float32).reshape(2, 24) / 32).astype(bfloat16)
    logits = np.eye(2, 5, dtype=np.float32)
    y = mo.moe_forward(x, logits, stack, top_k=2)
    assert y.dtype == bfloat16
    want = mo.moe_forward(x.astype(np.float32), logits, stack, top_k=2)
    assert rel_l2(y.astype(np.float32), want) < 4e-3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch(stack, dtype):
    t = torch()
    x = (t.arange(48).reshape(2, 24) / 32).to(getattr(t, dtype))
    logits = t.eye(2, 5)
    y = mo.moe_forward(x, logits, stack, top_k=2)
    assert isinstance(y, t.Tensor) and y.dtype == x.dtype and y.shape == (2, 24)
    want = mo.moe_forward(x.float().numpy(), logits.numpy(), stack, top_k=2)
    assert rel_l2(y.float().numpy(), want) < (4e-3 if dtype == "bfloat16" else 1e-3)
    out = t.full_like(x, float("nan"))
    assert mo.moe_forward(x, logits, stack, top_k=2, out=out) is out
    assert t.equal(out, y)


def test_torch_gradient(stack):
    x = torch().ones((1, 24), requires_grad=True)
    with pytest.raises(mo.UnsupportedError, match=r"x: .*requires_grad.*x\.detach\(\)"):
        mo.moe_forward(x, np.zeros((1, 5), np.float32), stack, top_k=1)


def test_strided_rows(stack):
    wide = normal(6, 50)
    x = wide[::2, 3:27]
    logits = np.eye(3, 5, dtype=np.float32)
    np.testing.assert_array_equal(
        mo.moe_forward(x, logits, stack, top_k=2),
        mo.moe_forward(np.ascontiguousarray(x), logits, stack, top_k=2),
    )
    by_columns = np.asfortranarray(x)
    np.testing.assert_array_equal(
        mo.moe_forward(by_columns, logits, stack, top_k=2),
        mo.moe_forward(x, logits, stack, top_k=2),
    )


def test_read_only_input(stack):
    x = np.ones((1, 24), np.float32)
    logits = np.zeros((1, 5), np.float32)
    want = mo.moe_forward(x, logits, stack, top_k=1)
    x.flags.writeable = logits.flags.writeable = False
    np.testing.assert_array_equal(mo.moe_forward(x, logits, stack, top_k=1), want)
    with pytest.raises(mo.ConfigError, match="out: expected a writable array"):
        mo.moe_forward(want, logits, stack, top_k=1, out=x)


@pytest.mark.parametrize("out_dtype", [np.float32, np.float16])
def test_out(stack, out_dtype):
    x = normal(3, 24)
    logits = np.eye(3, 5, dtype=np.float32)
    want = mo.moe_forward(x, logits, stack, top_k=2)
    out = np.full((3, 24), np.nan, out_dtype)
    assert mo.moe_forward(x, logits, stack, top_k=2, out=out) is out
    assert rel_l2(out, want) < 1e-3
    assert mo.moe_forward(x, logits, stack, top_k=2, out=out, accumulate=True) is out
    assert rel_l2(out, 2 * want) < 2e-3


def test_out_is_checked(stack):
    x, logits = np.ones((2, 24), np.float32), np.zeros((2, 5), np.float32)
    for out, error, text in (
        (np.zeros((2, 23), np.float32), mo.ShapeError, r"out: expected \[2, 24\]"),
        (np.zeros((2, 24), np.float64), mo.DTypeError, "out: expected f32, f16 or bf16, got f64"),
        (x, mo.ShapeError, "out: .*shared with x"),
        ("text", mo.DTypeError, "out: expected an array"),
    ):
        with pytest.raises(error, match=text):
            mo.moe_forward(x, logits, stack, top_k=1, out=out)
    joint = np.ones((3, 24), np.float32)
    with pytest.raises(mo.ShapeError, match="shared with x"):
        mo.moe_forward(joint[:2], logits, stack, top_k=1, out=joint[1:])
    with pytest.raises(mo.ConfigError, match="accumulate"):
        mo.moe_forward(x, logits, stack, top_k=1, accumulate=True)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            np.ones((2, 24), np.float64),
            mo.DTypeError,
            r"x: expected f32, f16 or bf16, got f64 \(it.astype",
        ),
        (np.ones((2, 24), np.complex64), mo.DTypeError, "x: .*complex64"),
        (np.ones((2, 24), ">f4"), mo.DTypeError, "x: .*>f4"),
        ([[1.0] * 24], mo.DTypeError, "x: expected an array .*got list"),
        (None, mo.DTypeError, "x: expected an array .*NoneType"),
        (np.ones(24, np.float32), mo.ShapeError, r"x.shape: expected \[T, 24\]"),
        (np.ones((1, 1, 1, 1, 24), np.float32), mo.ShapeError, "x: expected at most 4 dimensions"),
        (np.zeros(100, np.uint8)[1:97].view(np.float32)[None], mo.ShapeError, "x: .*aligned"),
    ],
)
def test_bad_x(stack, x, error, text):
    with pytest.raises(error, match="moe_forward: " + text):
        mo.moe_forward(x, np.zeros((2, 5), np.float32), stack, top_k=1)


def test_ids(stack):
    x = np.ones(24, np.float32)
    want = stack.gemv_up(x, np.array([0, 3], np.int32))
    for ids in (np.array([0, 3]), np.array([0, 9, 3, 9], np.int32)[::2]):
        np.testing.assert_array_equal(stack.gemv_up(x, ids), want)
    with pytest.raises(mo.ShapeError, match=r"ids: .*int32.*4294967296"):
        stack.gemv_up(x, np.array([0, 2**32]))
    with pytest.raises(mo.DTypeError, match="ids: expected int32 or int64, got f32"):
        stack.gemv_up(x, np.zeros(2, np.float32))


# --- conversions, indices and text ------------------------------------------------------------

KINDS = {
    "f32": np.float32, "f16": np.float16, "f64": np.float64, "i32": np.int32, "i64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "bool": np.bool_,
}  # fmt: skip


@pytest.mark.parametrize("source", [*KINDS, "bf16"])
@pytest.mark.parametrize("target", [*KINDS, "bf16"])
def test_asarray_converts(source, target):
    values = np.arange(6).reshape(2, 3)
    if source == "u16" and target in ("f16", "bf16"):
        return  # bits with another name
    given = mo.asarray(values, source) if source == "bf16" else values.astype(KINDS[source])
    want = np.asarray(values != 0) if source == "bool" else values
    got = mo.asarray(given, target)
    assert (got.dtype, got.shape) == (target, (2, 3))
    exact = np.asarray(mo.asarray(got, "f32"))
    np.testing.assert_array_equal(exact, want != 0 if target == "bool" else want)


def test_bf16_is_rounded_to_the_nearest_even():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -1.5, np.inf], np.float32)
    got = np.asarray(mo.asarray(mo.asarray(values, "bf16"), "f32"))
    np.testing.assert_array_equal(got, [1, 1 + 2**-6, 1, -1.5, np.inf])


def test_asarray_of_lists_and_numbers():
    np.testing.assert_array_equal(np.asarray(mo.asarray([[1, 2], [3, 4]], "f32")), [[1, 2], [3, 4]])
    assert mo.asarray((1, 2), "i32").dtype == "i32"
    assert mo.asarray(3, "f64")[()] == 3.0
    assert mo.asarray(np.arange(3, dtype=np.int16), "i32").shape == (3,)
    for wrong in ([[1], [2, 3]], ["a"], [{}]):
        with pytest.raises(mo.DTypeError, match="asarray: x: "):
            mo.asarray(wrong, "f32")


def test_a_conversion_is_no_view():
    source = np.ones(3)
    converted = mo.asarray(source, "f32")
    source[:] = 2
    np.testing.assert_array_equal(np.asarray(converted), 1)
    with pytest.raises(mo.ConfigError, match="copy"):
        mo.asarray(source, "f32", copy=False)
    assert np.shares_memory(np.asarray(mo.asarray(source, "f64", copy=False)), source)


def test_torch_f64(stack):
    x = torch().ones((1, 24), dtype=torch().float64)
    with pytest.raises(mo.DTypeError, match=r"x: .*it\.float\(\)"):
        mo.moe_forward(x, np.zeros((1, 5), np.float32), stack, top_k=1)
    assert mo.asarray(x, "f32").dtype == "f32"


INDICES = [
    0, -1, np.int64(1), slice(1, None), slice(None, None, -2), Ellipsis, (0, 1), (0, ..., 2),
    (..., slice(None, None, 2)), (slice(None), -1), (slice(3, 1),), (1, slice(None), slice(0, 2)),
    (), (0, 1, 2), (..., -1, -1, -1),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("name", ["f32", "i64", "bf16"])
def test_array_indices_are_those_of_numpy(index, name):
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    array = mo.asarray(values, name)
    got, want = array[index], values[index]
    if want.ndim == 0:
        assert type(got) in (int, float) and got == want
        return
    assert type(got) is mo.Array and got.shape == want.shape and got.dtype == name
    np.testing.assert_array_equal(np.asarray(mo.asarray(got, "f32")), want)


def test_array_views_share_memory_and_keep_it():
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    view = mo.asarray(source)[1:, ::2]
    assert np.shares_memory(np.asarray(view), source)
    source[2, 2] = 77
    assert view[1, 1] == 77
    made = mo.asarray([[1, 2], [3, 4]], "f32")[1]
    gc.collect()
    assert [value for value in made] == [3.0, 4.0]  # noqa: C416
    source.flags.writeable = False
    assert mo.asarray(source)[0].readonly


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (3, IndexError), (-4, IndexError), ((0, 4), IndexError), ((0, 0, 0), IndexError),
        ((..., ...), IndexError), ("a", mo.DTypeError), (1.5, mo.DTypeError),
        ([0, 1], mo.DTypeError), (True, mo.DTypeError), (None, mo.DTypeError),
        (2**70, IndexError),
    ],
)  # fmt: skip
def test_bad_indices(index, error):
    array = mo.asarray(np.zeros((3, 4), np.float32))
    with pytest.raises(error):
        array[index]


def test_arrays_print_as_those_of_numpy():
    values = np.array([[1.5, -2], [0, 4]], np.float32)
    array = mo.asarray(values)
    assert str(array) == str(values)
    assert repr(array) == (
        "moesaic.Array([[ 1.5, -2. ],\n               [ 0. ,  4. ]], dtype='f32')"
    )
    assert repr(mo.asarray(values, "bf16")) == repr(array).replace("f32", "bf16")
    assert repr(mo.asarray([1, 2], "i32")) == "moesaic.Array([1, 2], dtype='i32')"
    assert len(repr(mo.asarray(np.zeros((1000, 1000), np.float32)))) < 2000

"""The Python face on the fake Metal device: numpy goes in and comes out, at ``device="metal"``.

Run by check.py (step python), which links ``moesaic._core`` with the fake.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moesaic as mo
from moesaic import _core
from moesaic.bench import BenchOptions, BenchShape
from moesaic.bench import run as run_bench

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 96, 6, 2

fake = ctypes.CDLL(_core.__file__)
fake.fake_metal_buffer.restype = ctypes.c_void_p
fake.fake_metal_buffer.argtypes = [ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
fake.fake_metal_fail.argtypes = [ctypes.c_long]
fake.fake_metal_mapped_bytes.restype = ctypes.c_long
fake.fake_metal_dispatches.restype = ctypes.c_long
fake.fake_metal_register()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    mo.testing.write_moe_gguf(
        path,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        gate_type="Q8_0",
        down_type="Q8_0",
    )
    return path


@pytest.fixture(scope="module")
def layers(path: Path) -> Iterator[tuple[mo.MoeLayer, mo.MoeLayer]]:
    def load(device: str) -> mo.MoeLayer:
        return mo.MoeLayer.from_gguf(path, 0, device=device, precision="exact")

    with load("cpu") as cpu, load("metal") as metal:
        yield cpu, metal


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


def on_pages(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a page."""
    memory = mmap.mmap(-1, array.nbytes)
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def agree(got: np.ndarray, want: np.ndarray) -> None:
    assert isinstance(got, np.ndarray)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(initial=0.0))


def test_it_is_listed() -> None:
    metal = [b for b in mo.backends() if b.name == "metal" and b.available]
    assert metal[0].devices == ["metal"]
    assert "Fake GPU" in metal[0].detail


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_numpy_in_and_out(layers: tuple[mo.MoeLayer, mo.MoeLayer], tokens: int) -> None:
    cpu, metal = layers
    x = values(tokens, HIDDEN)
    before = fake.fake_metal_dispatches()
    got, routing = metal(x, return_routing=True)
    want, expected = cpu(x, return_routing=True)
    agree(got, want)
    np.testing.assert_array_equal(routing.topk_ids, expected.topk_ids)
    assert tokens == 0 or fake.fake_metal_dispatches() > before


def test_shapes_types_and_strides(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    cpu, metal = layers
    x = values(2, 3, HIDDEN)
    agree(metal(x), cpu(x))
    half = values(3, HIDDEN).astype(np.float16)
    assert metal(half).dtype == np.float16
    rows = values(6, 2 * HIDDEN)[::2, :HIDDEN]
    agree(metal(rows), cpu(rows))
    columns = values(HIDDEN, 4).T
    agree(metal(columns), cpu(columns))
    own = mo.asarray(values(3, HIDDEN))
    assert type(metal(own)) is mo.Array


def test_out_and_accumulate(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    cpu, metal = layers
    x = values(4, HIDDEN)
    want = cpu(x)
    wide = np.full((4, 2 * HIDDEN), 7.0, np.float32)
    for out in (np.empty((4, HIDDEN), np.float32), on_pages(want), wide[:, :HIDDEN]):
        out[...] = np.nan
        assert metal(x, out=out) is out
        agree(out, want)
        assert metal(x, out=out, accumulate=True) is out
        agree(out, 2 * want)
    assert (wide[:, HIDDEN:] == 7.0).all()


def test_pages_are_not_copied(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    cpu, metal = layers
    x = values(64, HIDDEN)
    mapped = fake.fake_metal_mapped_bytes()
    agree(metal(x[1:]), cpu(x[1:]))
    assert fake.fake_metal_mapped_bytes() == mapped, "it begins inside a page"
    agree(metal(on_pages(x)), cpu(x))
    assert fake.fake_metal_mapped_bytes() == mapped + x.nbytes


def test_a_given_routing(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    cpu, metal = layers
    x = values(5, HIDDEN)
    routing = cpu.route(x)
    agree(metal(x, routing=routing), cpu(x, routing=routing))
    np.testing.assert_array_equal(metal.route(x).topk_ids, routing.topk_ids)
    logits = values(5, EXPERTS)
    agree(metal(x, logits), cpu(x, logits))
    workspace = mo.Workspace.for_layer(metal, 5)
    agree(metal(x, workspace=workspace), cpu(x))


def test_products(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    cpu, metal = layers
    x = values(3, HIDDEN)
    ids = np.array([[0, 5], [2, -1], [3, 3]])
    agree(metal.stack.gemv_gate(x, ids), cpu.stack.gemv_gate(x, ids))
    agree(metal.stack.gemv_gate_up_silu(x, ids), cpu.stack.gemv_gate_up_silu(x, ids))
    plan = mo.BucketPlan.build(cpu.route(x), EXPERTS)
    agree(metal.stack.gemm_up(x, plan), cpu.stack.gemm_up(x, plan))


def test_a_layer_in_parts(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    cpu, metal = layers
    for tokens in (1, 5, 40):  # one by one, then sorted by expert on the device
        x = values(tokens, HIDDEN)
        routing = cpu.route(x)
        ids = routing.topk_ids.copy()
        ids[0, 0] = -1
        routing = mo.Routing(ids, routing.topk_weights)
        rows = metal.expert_rows(x, routing)
        assert rows.shape == (tokens * TOP_K - 1, HIDDEN)
        agree(rows, cpu.expert_rows(x, routing))
        y = metal.finish(rows, routing, x)
        np.testing.assert_array_equal(y, metal(x, routing=routing))
        agree(y, cpu(x, routing=routing))
        own = np.full_like(rows, np.nan)
        workspace = mo.Workspace.for_layer(metal, tokens)
        assert metal.expert_rows(x, routing, out=own, workspace=workspace) is own
        np.testing.assert_array_equal(own, rows)
        out = np.ones_like(x)
        assert metal.finish(rows, routing, x, out=out, accumulate=True) is out
        agree(out, y + 1)
    with pytest.raises(mo.ShapeError, match="rows"):
        metal.finish(rows[:3], routing, x)


def test_a_store_stays_on_the_cpu(path: Path) -> None:
    file = mo.GgufFile(path)
    store = mo.MoeExpertStore.from_gguf(file)
    with pytest.raises(mo.UnsupportedError, match=r"got metal.*its memory is the host's"):
        mo.MoeLayer.from_store(store, 0, device="metal")
    x = values(3, HIDDEN)
    pool = mo.ExpertPool(num_experts=EXPERTS, budget=2)
    with (
        mo.MoeLayer.from_store(store, 0, pool, precision="exact") as cold,
        mo.MoeLayer.from_gguf(file, 0, device="metal", precision="exact") as metal,
    ):
        agree(metal(x), cold(x))


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_of_four_bits(act_order: bool) -> None:
    random = np.random.default_rng(1)
    hidden, intermediate, group = 128, 64, 32

    def stack(k: int, n: int) -> mo.MarlinExpertStack:
        groups = k // group
        order = random.permutation(np.arange(k, dtype=np.int32) // group).astype(np.int32)
        return mo.MarlinExpertStack.from_gptq(
            random.integers(-(2**31), 2**31, (EXPERTS, k // 8, n), dtype=np.int32),
            random.uniform(0.01, 0.02, (EXPERTS, groups, n)).astype(np.float16),
            random.integers(-(2**31), 2**31, (EXPERTS, groups, n // 8), dtype=np.int32),
            order if act_order else None,
            group,
        )

    gate_up, down = stack(hidden, 2 * intermediate), stack(intermediate, hidden)
    x, logits = values(5, hidden), values(5, EXPERTS)
    mapped = fake.fake_metal_mapped_bytes()
    metal, cpu = (
        mo.ExpertStack.from_marlin(gate_up, down, device=device) for device in ("metal", "cpu")
    )
    assert fake.fake_metal_mapped_bytes() > mapped, "panels are read where they lie"
    with mo.tuning(precision="exact"):
        want, got = (mo.moe_forward(x, logits, s, top_k=TOP_K) for s in (cpu, metal))
        agree(got, want)
        dispatches = [(1, 0, 2, 3), (4, 3, 0, 2)]
        agree(
            gate_up.to("metal").gemm_phase_batched(x, dispatches),
            gate_up.gemm_phase_batched(x, dispatches),
        )


def test_dense_weights_are_copied() -> None:
    gate, up = values(EXPERTS, INTERMEDIATE, HIDDEN), -values(EXPERTS, INTERMEDIATE, HIDDEN)
    down = values(EXPERTS, HIDDEN, INTERMEDIATE)
    stacks = [
        mo.ExpertStack.from_dense_stacks(
            *(w.astype(np.float16) for w in (gate, up, down)), device=device
        )
        for device in ("cpu", "metal")
    ]
    x, logits = values(3, HIDDEN), values(3, EXPERTS)
    want, got = (mo.moe_forward(x, logits, stack, top_k=TOP_K) for stack in stacks)
    agree(got, want)


class _Managed(ctypes.Structure):
    """DLManagedTensor of DLPack."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class MetalArray:
    """An array of a package whose memory is a Metal buffer, as torch has it on mps."""

    OFFSET = 256

    def __init__(self, array: np.ndarray) -> None:
        contents = ctypes.c_void_p()
        self.buffer = fake.fake_metal_buffer(self.OFFSET + array.nbytes, ctypes.byref(contents))
        assert contents.value is not None
        ctypes.memmove(contents.value + self.OFFSET, array.ctypes.data, array.nbytes)
        self._shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self._managed = _Managed(
            self.buffer, 8, 0, array.ndim, 2, 32, 1, self._shape, None, self.OFFSET, None, None
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return (8, 0)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), b"dltensor", None)


def test_metal_arrays_of_other_packages(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    cpu, metal = layers
    x = values(4, HIDDEN)
    out = np.empty_like(x)
    metal(MetalArray(x), out=out)
    agree(out, cpu(x))
    with pytest.raises(mo.DeviceError, match=r"cpu memory, got metal:0 \(copy it to the cpu"):
        cpu(MetalArray(x))


def test_errors(layers: tuple[mo.MoeLayer, mo.MoeLayer]) -> None:
    _, metal = layers
    x = values(2, HIDDEN)
    want = metal(x)
    with pytest.raises(mo.DeviceError, match="stream: expected None on the metal"):
        metal(x, stream=1)
    out = np.full_like(x, 7.0)
    for code, error in ((3, mo.DeviceError), (8, mo.OutOfMemoryError)):
        fake.fake_metal_fail(code)
        try:
            with pytest.raises(error):
                metal(x, out=out)
        finally:
            fake.fake_metal_fail(0)
    assert (out == 7.0).all()
    agree(metal(x), want)


def test_bench() -> None:
    shape = BenchShape("tiny", HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, "Q8_0", "Q8_0")
    options = BenchOptions(tokens=(1,), threads=(1,), rounds=1, seconds=0.01, device="metal")
    result = run_bench(shape, options)
    assert "Fake GPU" in result.machine["gpu"]
    assert result.points[0].engine == "moesaic"
    assert result.points[0].floor_kind == "memory"
    assert result.points[0].rel_l2 < 1e-5

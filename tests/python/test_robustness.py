"""Misuse: each is one clear exception, nothing crashes, and everything stays usable."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from files import write_small
from values import normal

import moesaic as mo

SPEC = ("F32", "a", "b", "c")
STATM = Path("/proc/self/statm")


@pytest.fixture
def x(small) -> np.ndarray:
    return normal(4, small.hidden)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: mo.MoeLayer.from_gguf(None, 0),
        lambda layer: mo.MoeLayer(None, layer.config),
        lambda layer: mo.MoeConfig.from_gguf(None, 0),
        lambda layer: mo.ExpertStack.load_from_gguf(None, 0),
        lambda layer: mo.ExpertStack.from_marlin(None, None),
        lambda layer: mo.ExpertStack.from_dense_stacks(None, None, None),
        lambda layer: mo.Workspace.for_layer(None),
        lambda layer: mo.Workspace.for_stack(None, 2),
        lambda layer: mo.Workspace.for_matrix(None),
        lambda layer: mo.QuantMatrix.from_dense(None),
        lambda layer: mo.QuantMatrix.from_encoded(None, "Q8_0"),
        lambda layer: mo.QuantMatrix.from_gguf(None, "output.weight"),
        lambda layer: mo.QuantMatrix.from_gguf("model.gguf", None),
        lambda layer: mo.BucketPlan.build(None, 8),
        lambda layer: mo.align_block_size(None, 8, 16),
        lambda layer: mo.combine(None, None, None),
        lambda layer: mo.explain(None),
        lambda layer: mo.route(np.zeros((1, 8), np.float32), top_k=1, out=np.zeros(3)),
    ],
)
def test_none_and_wrong_objects(layer, call):
    with pytest.raises(TypeError):
        call(layer)


def test_none_for_an_aligned_routing():
    stack = mo.MarlinExpertStack.from_gptq(
        np.zeros((1, 16, 64), np.int32), np.ones((1, 1, 64), np.float16), group_size=128
    )
    with pytest.raises(TypeError, match="gemm_phase_vllm"):
        stack.gemm_phase_vllm(np.zeros((1, 128), np.float32), None, 1)


def test_masked_arrays(layer, x):
    masked = np.ma.array(x, mask=x > 0)
    with pytest.raises(mo.DTypeError, match=r"x: expected an array without a mask.*filled"):
        layer(masked)
    assert layer(masked.filled(0)).shape == x.shape


@pytest.mark.parametrize("kind", ["matrix", "memmap", "subclass", "reversed", "broadcast"])
def test_kinds_of_numpy_arrays(layer, x, tmp_path, kind):
    class Sub(np.ndarray):
        pass

    if kind == "memmap":
        given = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
        given[:] = x
    else:
        given = {
            "matrix": lambda: x.view(np.matrix),
            "subclass": lambda: x.view(Sub),
            "reversed": lambda: x[::-1],
            "broadcast": lambda: np.broadcast_to(x[0], x.shape),
        }[kind]()
    want = layer(np.ascontiguousarray(np.asarray(given)))
    got = layer(given)
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, want)


def test_nonfinite_rows_stay_alone(layer, x):
    want = layer(x)
    bad = x.copy()
    bad[1, 3], bad[2] = np.nan, np.inf
    got = layer(bad)
    np.testing.assert_array_equal(got[[0, 3]], want[[0, 3]])
    assert not np.isfinite(got[1:3]).all(axis=1).any()
    with mo.tuning(strict=True), pytest.raises(mo.ConfigError, match=r"logits: .*2 rows"):
        layer(bad)
    with mo.tuning(strict=True):
        np.testing.assert_array_equal(layer(x), want)


@pytest.mark.parametrize("tokens", [2**31, 2**62])
def test_workspace_sizes_do_not_overflow(layer, tokens):
    with pytest.raises(mo.ShapeError, match="fewer than 2\\^31 pairs"):
        mo.Workspace.for_layer(layer, tokens)
    with pytest.raises(mo.ShapeError, match="fewer than 2\\^31 pairs"):
        mo.Workspace.for_stack(layer.stack, 3, tokens)


def test_negative_total_pairs():
    with pytest.raises(mo.ShapeError, match="total_pairs: expected at least 0, got -5"):
        mo.pick_block_size(None, device_route=True, total_pairs=-5)


def test_a_backend_that_is_not_there(layer, x):
    want = layer(x)
    for name, text in {"tpu": "cpu.*tpu", "cuda": "an available backend"}.items():
        if any(b.name == name and b.available for b in mo.backends()):
            continue
        with mo.tuning(backend=name), pytest.raises(mo.DeviceError, match=text):
            layer(x)
    with mo.tuning(backend="cpu"):
        np.testing.assert_array_equal(layer(x), want)


class Producer:
    def __init__(self, device, capsule=None):
        self.device, self.capsule = device, capsule

    def __dlpack_device__(self):
        if isinstance(self.device, BaseException):
            raise self.device
        return self.device

    def __dlpack__(self, **_):
        if isinstance(self.capsule, BaseException):
            raise self.capsule
        return self.capsule


@pytest.mark.parametrize("device", [None, ("a", "b"), (1,), ValueError("no such device")])
def test_producers_with_a_bad_device(layer, device):
    with pytest.raises(mo.DeviceError, match="MoeLayer: x:"):
        layer(Producer(device))


def test_interrupts_of_a_producer_come_out_as_themselves(layer):
    with pytest.raises(KeyboardInterrupt):
        layer(Producer((1, 0), KeyboardInterrupt()))
    with pytest.raises(SystemExit):
        layer(Producer(SystemExit(), None))
    with pytest.raises(mo.DTypeError, match="capsule"):
        layer(Producer((1, 0), None))


def stop(progress):
    # Python takes no interrupts where its parent ignores them, as a job in the background does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)


def fail(progress):
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("progress", "error"),
    [(stop, KeyboardInterrupt), (fail, KeyError), (lambda p: False, mo.OperationCancelled)],
)
def test_loads_that_end_early(small, x, progress, error):
    with mo.GgufFile(small.path) as file:
        with pytest.raises(error):
            mo.MoeLayer.from_gguf(file, 0, progress=progress)
        with mo.MoeLayer.from_gguf(file, 0) as layer:
            assert np.isfinite(layer(x)).all()


def test_a_progress_callback_cannot_close_the_file(small, x):
    with mo.GgufFile(small.path) as file:
        with pytest.raises(mo.DeviceError, match="holders"):
            mo.MoeLayer.from_gguf(file, 0, progress=lambda p: file.close())
        assert not file.closed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_files_that_are_not_regular(tmp_path):
    fifo = tmp_path / "fifo.gguf"
    os.mkfifo(fifo)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    for mmap in (True, False):
        with pytest.raises(mo.FormatError, match=r"empty\.gguf"):
            mo.GgufFile(empty, mmap=mmap)
        for path in (fifo, "/dev/zero", tmp_path):
            with pytest.raises(OSError, match=re.escape(f"{str(path)!r}")):
                mo.GgufFile(path, mmap=mmap)


def test_a_deleted_file(small, layer, x, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(small.path.read_bytes())
    mapped = mo.MoeLayer.from_gguf(mo.GgufFile(copy), 0, layout="file")
    want = mapped(x)
    copy.unlink()
    np.testing.assert_array_equal(mapped(x), want)


def cut(path: Path) -> None:
    """Takes the last tensors away from a file, whoever has it open."""
    os.truncate(path, path.stat().st_size // 3)


LOADS = {
    "layer": lambda file, **given: mo.MoeLayer.from_gguf(file, 1, **given),
    "stack": lambda file, **given: mo.ExpertStack.load_from_gguf(file, 1, **given),
    "decoded": lambda file, **given: mo.ExpertStack.load_from_gguf(file, 1, "f16", **given),
    "matrix": lambda file, **given: mo.QuantMatrix.from_gguf(
        file, "blk.1.ffn_gate_inp.weight", **given
    ),
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("load", LOADS)
def test_files_that_are_cut_before_a_load(tmp_path, load, mmap):
    write_small(tmp_path / "cut.gguf", layers=2)
    with mo.GgufFile(tmp_path / "cut.gguf", mmap=mmap) as file:
        cut(tmp_path / "cut.gguf")
        with pytest.raises(mo.FormatError, match=r"cut\.gguf.*became shorter"):
            LOADS[load](file)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("threads", [1, 3])
def test_files_that_are_cut_during_a_load(tmp_path, load, threads):
    write_small(tmp_path / "cut.gguf", layers=2)
    with mo.tuning(threads=threads), mo.GgufFile(tmp_path / "cut.gguf") as file:
        with pytest.raises(mo.FormatError, match=r"cut\.gguf.*became shorter"):
            LOADS[load](file, progress=lambda p: cut(tmp_path / "cut.gguf"))
        assert mo.MoeConfig.from_gguf(file, 0).num_experts == 8


def test_stores_of_files_that_are_cut(tmp_path):
    write_small(tmp_path / "cut.gguf", layers=2)
    file = mo.GgufFile(tmp_path / "cut.gguf")
    store = mo.MoeExpertStore.from_gguf(file, memory_limit=1 << 30)
    pool = mo.ExpertPool(8, 4)
    layer = mo.MoeLayer.from_store(store, 1, pool)
    cut(tmp_path / "cut.gguf")
    for call in (
        lambda: mo.MoeLayer.from_store(store, 1, pool),
        lambda: layer(np.ones((4, 256), np.float32)),
        lambda: store.apply([mo.ExpertPool(8, 4), pool]),
    ):
        with pytest.raises(mo.FormatError, match="became shorter"):
            call()


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is that of Linux")
def test_a_mapping_that_is_used_must_not_be_cut(tmp_path):
    # No library can turn this into an error; layout="auto" and memory_limit read instead.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys, numpy as np, moesaic as mo\n"
            "mo.testing.write_moe_gguf(sys.argv[1], num_experts=8, top_k=3, hidden=256,"
            " intermediate=512)\n"
            "layer = mo.MoeLayer.from_gguf(mo.GgufFile(sys.argv[1]), 0, layout='file')\n"
            "layer(np.ones((4, 256), np.float32))\n"
            "os.truncate(sys.argv[1], 4096)\n"
            "layer(np.ones((4, 256), np.float32))\n",
            str(tmp_path / "cut.gguf"),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGBUS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forks_while_other_threads_run(layer, x):
    want, done = layer(x), threading.Event()

    def work():
        while not done.is_set():
            layer(x)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                try:
                    os._exit(0 if np.array_equal(layer(x), want) else 1)
                finally:
                    os._exit(2)
            deadline = time.monotonic() + 30
            ended, status = os.waitpid(child, os.WNOHANG)
            while not ended and time.monotonic() < deadline:
                time.sleep(0.02)
                ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert ended, "the child hangs"
            assert status == 0
    finally:
        done.set()
        thread.join()
    np.testing.assert_array_equal(layer(x), want)


@pytest.mark.parametrize("knob", ["BLOCK_SIZE", "THREADS", "CPU_ISA", "STRICT", "BACKEND"])
def test_bad_environment(small, knob):
    code = (
        "import sys, numpy as np, moesaic as mo\n"
        "try:\n"
        "    layer = mo.MoeLayer.from_gguf(mo.GgufFile(sys.argv[1]), 0)\n"
        f"    layer(np.zeros((1, {small.hidden}), np.float32))\n"
        "except mo.Error as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small.path)],
        env={**os.environ, f"MOESAIC_{knob}": "seven"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("DeviceError" if knob == "BACKEND" else "ConfigError")
    assert "seven" in done.stdout


@pytest.mark.skipif(not STATM.exists(), reason="no /proc here")
def test_calls_do_not_leak(small, layer, x):
    def resident() -> int:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def once():
        with mo.tuning(threads=1), mo.profile():
            _, routing = layer(x, return_routing=True)
        assert mo.BucketPlan.build(routing, small.num_experts).pair_row.size
        mo.asarray(x).__dlpack__()  # a capsule that nobody takes
        with pytest.raises(mo.ShapeError):
            layer(x[:, :3])

    for _ in range(100):
        once()
    before = resident()
    for _ in range(1000):
        once()
    assert resident() - before < 2 << 20


def marlin(experts: int = 2) -> mo.MarlinExpertStack:
    return mo.MarlinExpertStack.from_gptq(
        np.zeros((experts, 16, 128), np.int32), np.ones((experts, 1, 128), np.float16)
    )


def test_packed_rows_are_not_tokens():
    stack = marlin()
    routing = mo.Routing(np.array([[0, 1]] * 5, np.int32), np.ones((5, 2), np.float32))
    aligned = mo.align_block_size(routing, 2, 16, "packed_rows")
    with pytest.raises(mo.ShapeError, match="row_space: expected token_pairs, or top_k 1"):
        stack.gemm_phase_vllm(np.ones((5, 128), np.float32), aligned, 2)
    assert stack.gemm_phase_vllm(np.ones((10, 128), np.float32), aligned, 1).shape == (10, 128)


@pytest.mark.parametrize("columns", [(0, 2**62), (-(2**63), None), (64, 2**63 - 64)])
def test_columns_far_outside(columns):
    with pytest.raises(mo.ShapeError, match="columns: expected multiples of 64 within 128"):
        marlin().make_expert_linear(0, *columns)


def test_sizes_beyond_memory():
    with pytest.raises(mo.OutOfMemoryError):
        mo._core.MarlinStackBuilder(2**16, 2**20, 2**20, 128, "gptq")


@pytest.mark.parametrize("shape", [(-1, -256), (2**62, 256), (2**40, 2**40), (1, 2**62)])
def test_shapes_of_no_array(shape):
    with pytest.raises(mo.ShapeError, match="shape: expected sizes"):
        mo.testing.dequantize(bytes(144), "Q4_K", shape)


def test_arrays_of_any_order_make_the_same_stack(dense):
    x = normal(4, 24)
    routing = mo.route(normal(4, 5, seed=1), top_k=2)
    want = mo.moe_forward_cpu(x, routing, mo.ExpertStack.from_dense_stacks(*dense))
    for change in (np.asfortranarray, lambda a: np.repeat(a, 2, 2)[:, :, ::2]):
        stack = mo.ExpertStack.from_dense_stacks(*map(change, dense))
        np.testing.assert_array_equal(mo.moe_forward_cpu(x, routing, stack), want)


@pytest.mark.parametrize("layout", ["auto", "file"])
@pytest.mark.parametrize("shape", [(1, 2**60 + 1, 4), (2**30, 2**16, 2**16), (2**31 - 1,) * 3])
def test_products_of_sizes_that_wrap(shape, layout):
    for count in (0, 16):
        role = (np.zeros(count, np.uint8), "F32", shape)
        with pytest.raises(mo.ShapeError):
            mo.ExpertStack.from_encoded(None, role, role, layout=layout)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mo._core.StackBuilder(2**30, 2**17, 2**17, gate=None, up=SPEC, down=SPEC),
        lambda: mo._core.MarlinStackBuilder(2**31 - 1, 2**40, 2**40, 128, "gptq"),
        lambda: mo._core.MarlinStackBuilder(2**31 - 1, 2**63 - 1, 64, 128, "gptq"),
        lambda: mo._core.MarlinStackBuilder(1, 128, 64, 128, "gptq").add(
            0,
            2**63 - 16,
            np.zeros((16, 64), np.int32),
            np.ones((1, 64), np.float16),
            None,
            "one",
        ),
    ],
)
def test_sizes_that_wrap_are_shape_errors(make):
    with pytest.raises(mo.ShapeError):
        make()


HUGE = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1]
EMPTY = np.zeros(0, np.uint8)


def limited(n: int) -> int:
    return min(n, 2**31 - 1)


# Every argument that is a size, as a function of it.
SIZES = {
    "from_encoded, E": lambda n: mo.ExpertStack.from_encoded(
        None, (EMPTY, "F32", (n, 64, 64)), (EMPTY, "F32", (n, 64, 64))
    ),
    "from_encoded, rows": lambda n: mo.ExpertStack.from_encoded(
        None, (EMPTY, "Q4_K", (2, n, 256)), (EMPTY, "Q4_K", (2, n, 256))
    ),
    "from_encoded, cols": lambda n: mo.ExpertStack.from_encoded(
        None, (EMPTY, "F32", (2, 64, n)), (EMPTY, "F32", (2, 64, n))
    ),
    "QuantMatrix, rows": lambda n: mo.QuantMatrix.from_encoded(EMPTY, "Q4_K", (n, 256)),
    "QuantMatrix, cols": lambda n: mo.QuantMatrix.from_encoded(EMPTY, "F32", (64, n)),
    "Workspace.for_matrix": lambda n: mo.Workspace.for_matrix(
        mo.QuantMatrix.from_dense(np.zeros((1, 1 << 20), np.float32)), n
    ),
    "StackBuilder, E": lambda n: mo._core.StackBuilder(
        limited(n), 2**20, 2**20, gate=None, up=SPEC, down=SPEC
    ),
    "StackBuilder, H": lambda n: mo._core.StackBuilder(2, n, 64, gate=SPEC, up=SPEC, down=SPEC),
    "StackBuilder, I": lambda n: mo._core.StackBuilder(2, 64, n, gate=SPEC, up=SPEC, down=SPEC),
    "StackBuilder.add": lambda n: mo._core.StackBuilder(
        1, 32, 32, gate=None, up=SPEC, down=SPEC
    ).add("up", limited(n), np.zeros((32, 32), np.float32)),
    "MarlinStackBuilder, E": lambda n: mo._core.MarlinStackBuilder(
        limited(n), 2**20, 2**20, 128, "gptq"
    ),
    "MarlinStackBuilder, K": lambda n: mo._core.MarlinStackBuilder(2, n, 64, 128, "gptq"),
    "MarlinStackBuilder, N": lambda n: mo._core.MarlinStackBuilder(2, 128, n, 128, "gptq"),
    "MarlinStackBuilder, group": lambda n: mo._core.MarlinStackBuilder(2, 2**62, 64, n, "gptq"),
    "from_gptq, group_size": lambda n: mo.MarlinExpertStack.from_gptq(
        np.zeros((1, 16, 64), np.int32), np.ones((1, 1, 64), np.float16), group_size=n
    ).make_expert_linear(0, 0, n),
    "Workspace": lambda n: mo.Workspace(max(n, 2**40)),
    "Workspace.for_stack": lambda n: mo.Workspace.for_stack(marlin_experts(), limited(n), n),
    "asarray": lambda n: mo.asarray(Producer((1, 0), wide_capsule(n))),
    "dequantize, rows": lambda n: mo.testing.dequantize(EMPTY, "Q4_K", (n, 256)),
    "dequantize, cols": lambda n: mo.testing.dequantize(EMPTY, "F32", (1, n)),
    "RouterConfig": lambda n: mo.route(
        np.zeros((1, 4), np.float32), mo.RouterConfig(limited(n), limited(n))
    ),
    "BucketPlan.build": lambda n: mo.BucketPlan.build(one_routing(), limited(n)),
    "align_block_size, E": lambda n: mo.align_block_size(one_routing(), limited(n), 16),
    "align_block_size, block": lambda n: mo.align_block_size(one_routing(), 2, limited(n)),
    "ExpertPool": lambda n: mo.ExpertPool(limited(n), 1, coactivation=True),
    "fitting_budgets": lambda n: mo.MoeExpertStore.from_gguf(written()).fitting_budgets(
        n, reserve=-n
    ),
    "staging": lambda n: mo.MoeExpertStore.from_gguf(
        written(), memory_limit=2**62, staging=limited(n)
    ),
    "io_threads": lambda n: mo.MoeExpertStore.from_gguf(
        written(), memory_limit=2**30, io_threads=limited(n)
    ),
    "threads": lambda n: mo.tuning(threads=limited(n)).__enter__(),
}

SIZES_CODE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
import test_robustness as here, moesaic as mo
for name, call in here.SIZES.items():
    for n in here.HUGE:
        try:
            call(n)
            print(name, n, "taken")
        except mo.Error:
            pass
        except Exception as error:
            print(name, n, type(error).__name__, str(error)[:100].replace("\\n", " "))
# Not of getrusage(), which counts what the process held that started this one.
(peak,) = [int(line.split()[1]) >> 10 for line in open("/proc/self/status") if "VmHWM" in line]
print(peak, "MiB") if peak > 2000 else None
"""


def one_routing() -> mo.Routing:
    return mo.Routing(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32))


def marlin_experts() -> mo.ExpertStack:
    return mo.ExpertStack.from_marlin(
        mo.MarlinExpertStack.from_gptq(
            np.zeros((2, 8, 128), np.int32), np.ones((2, 1, 128), np.float16), group_size=64
        ),
        mo.MarlinExpertStack.from_gptq(
            np.zeros((2, 8, 64), np.int32), np.ones((2, 1, 64), np.float16), group_size=64
        ),
    )


def written() -> mo.GgufFile:
    with tempfile.TemporaryDirectory() as folder:
        write_small(Path(folder) / "small.gguf")
        return mo.GgufFile(Path(folder) / "small.gguf")


class Managed(ctypes.Structure):
    """A DLManagedTensor whose shape and data are what a test says."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


ALIVE = []


def capsule_of(data, shape, ndim=2):
    managed = Managed(data, (1, 0), ndim, (2, 32, 1, 0), shape, None, 0, None, None)
    ALIVE.append((managed, shape))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(managed), b"dltensor", None)


def wide_capsule(n):
    return capsule_of(4096, (ctypes.c_int64 * 2)(n, n))


@pytest.mark.cost
@pytest.mark.skipif(not STATM.exists(), reason="limits memory as Linux does")
def test_huge_sizes_are_errors_that_cost_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SIZES_CODE],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("data", "shape", "ndim"),
    [
        (0, (4, 256), 2),
        (4096, None, 2),
        (4096, (4, 256), 99),
        (4096, (4, 256), -1),
        (4096, (-4, 256), 2),
        (4096, (2**62, 256), 2),
    ],
)
def test_capsules_of_no_array(layer, data, shape, ndim):
    sizes = None if shape is None else (ctypes.c_int64 * 2)(*shape)
    for call in (mo.asarray, layer):
        with pytest.raises(mo.Error):
            call(Producer((1, 0), capsule_of(data, sizes, ndim)))

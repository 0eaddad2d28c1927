"""Calls and the life of a process: its end, its signals, its floating-point state."""

import ctypes
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import test_changing_arguments
from values import normal

import moesaic as mo

PRELUDE = """
import os, signal, sys, tempfile, threading, time
import numpy as np
import moesaic as mo
path = os.path.join(tempfile.mkdtemp(), "small.gguf")
mo.testing.write_moe_gguf(path, num_experts=8, top_k=3, hidden=256, intermediate=256)
file = mo.GgufFile(path)
layer = mo.MoeLayer.from_gguf(file, 0)
x = np.ones((64, 256), np.float32)
logits = np.ones((4096, 8), np.float32)
big = np.ones((512, 4096), np.float32)
coded = mo.testing.quantize(big, "Q4_K")
routing = mo.route(logits, top_k=3)
one = mo.route(np.ones((64, 8), np.float32), top_k=3)
plan = mo.BucketPlan.build(one, 8)
store = mo.MoeExpertStore.from_gguf(file, memory_limit=1 << 30)
pool = mo.ExpertPool(8, 8)
class Exports:
    def __dlpack__(self, **given):
        for _ in range(1000):
            pass
        return x.__dlpack__()
    def __dlpack_device__(self):
        return x.__dlpack_device__()
noise = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
def loops(progress):
    for _ in range(1000):
        pass
"""

# The machines of CI are shared: what takes 0.2 s may take some time more.
SLACK = 5

CALLS = {
    "layer": "layer(x)",
    "moe_forward": "mo.moe_forward(x, None, layer.stack, routing=one)",
    "moe_forward_cpu": "mo.moe_forward_cpu(x, one, layer.stack)",
    "bucketed": "mo.moe_forward_bucketed(x, None, layer.stack, routing=one)",
    "route": "mo.route(logits, top_k=3)",
    "plan": "mo.BucketPlan.build(routing, 8)",
    "rebuild": "plan.rebuild(one)",
    "align": "mo.align_block_size(routing, 8, 16)",
    "gather_rows": "mo.gather_rows(x, plan)",
    "gemv": "layer.stack.gemv_up(x, np.zeros((64, 2), np.int32))",
    "gemm": "layer.stack.gemm_up(x, plan)",
    "quantize": "mo.testing.quantize(big, 'Q4_K')",
    "quantize_to_a_grid": "mo.testing.quantize(noise, 'IQ1_S', weights=big[0, :1024])",
    "dequantize": "mo.testing.dequantize(coded, 'Q4_K', big.shape)",
    "decode": "layer.stack.dequantize('up', 0)",
    "open": "mo.GgufFile(path)",
    "load": "mo.ExpertStack.load_from_gguf(file, 0)",
    "progress": "mo.ExpertStack.load_from_gguf(file, 0, progress=loops)",
    "dlpack": "layer(Exports())",
    "store": "store.apply([pool])",
    "slot_map": "store.slot_map(0)",
    "new_store": "mo.MoeExpertStore.from_gguf(file, memory_limit=1 << 30)",
}


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", CALLS)
def test_a_process_ends_while_daemon_threads_are_inside_a_call(name):
    for _ in range(2):
        done = run(
            """
def work():
    while True:
        eval(code, globals())
code = compile(sys.argv[1], "call", "eval")
eval(code)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
""",
            CALLS[name],
        )
        assert done.returncode == 0, done.stderr[-2000:]


def test_a_process_ends_while_every_call_with_arrays_runs():
    """One daemon thread for each of them, in few processes: they crash at once or do not matter."""
    calls = [code for code, _ in test_changing_arguments.CALLS.values()]
    for _ in range(3):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                test_changing_arguments.PRELUDE
                + """
def work(code):
    while True:
        try:
            eval(code, globals())
        except (mo.Error, ValueError):  # objects are used by others, too
            pass
for code in sys.argv[1:]:
    threading.Thread(target=work, args=(compile(code, "call", "eval"),), daemon=True).start()
time.sleep(1)
""",
                *calls,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr, done.stderr[-2000:]


# What to make before the clock runs, and what runs longer than the test lets it.
LONG = {
    "layer": ("np.ones((200000, 256), np.float32)", "layer(made)"),
    "moe_forward_cpu": (
        "np.ones((100000, 256), np.float32), mo.route(np.ones((100000, 8), np.float32), top_k=3)",
        "mo.moe_forward_cpu(*made, layer.stack)",
    ),
    "quantize": ("np.ones((50000, 1024), np.float32)", "mo.testing.quantize(made, 'Q4_K')"),
    "dequantize": (
        "np.tile(coded, (200, 1))",
        "mo.testing.dequantize(made, 'Q4_K', (512 * 200, 4096))",
    ),
    "moe_forward": (
        "np.ones((100000, 256), np.float32), mo.route(np.ones((100000, 8), np.float32), top_k=3)",
        "mo.moe_forward(made[0], None, layer.stack, routing=made[1])",
    ),
    "route": ("np.ones((1000000, 8), np.float32)", "mo.route(made, top_k=3)"),
    "silu_mul": ("np.ones((10000, 1024), np.float32)", "mo.silu_mul(made)"),
    "gather_rows": (
        "np.ones((4096, 512), np.float32)",
        "mo.gather_rows(made, mo.BucketPlan.build(routing, 8))",
    ),
    "combine": (
        "np.ones((4096 * 3, 512), np.float32), mo.BucketPlan.build(routing, 8)",
        "mo.combine(*made, routing)",
    ),
    "weighted_sum": ("np.ones((4096 * 3, 512), np.float32)", "mo.weighted_sum(made, routing)"),
    "plan": (
        "mo.route(np.ones((1000000, 8), np.float32), top_k=3)",
        "mo.BucketPlan.build(made, 8)",
    ),
    "rebuild": (
        "mo.route(np.ones((1000000, 8), np.float32), top_k=3), mo.BucketPlan.build(one, 8)",
        "made[1].rebuild(made[0])",
    ),
    "align": (
        "mo.route(np.ones((1000000, 8), np.float32), top_k=3)",
        "mo.align_block_size(made, 8, 16)",
    ),
    "gemm": (
        "np.ones((100000, 256), np.float32), mo.BucketPlan.build("
        "mo.route(np.ones((100000, 8), np.float32), top_k=3), 8)",
        "layer.stack.gemm_up(*made)",
    ),
    "apply": (
        "[mo.ExpertPool(8, 4)]",
        "(made[0].apply_target(np.random.permutation(8)[:4]), store.apply(made))",
    ),
    "data": ("mo.GgufFile(path, mmap=False)", "[t.data for t in made.tensors.values()]"),
    "load": (
        "[np.ones((32, 2048, 2048), np.float32)] * 3",
        "mo.ExpertStack.from_dense_stacks(*made)",
    ),
}


@pytest.mark.cost
@pytest.mark.parametrize("name", LONG)
def test_an_interrupt_ends_a_long_call(name):
    done = run(
        """
signal.signal(signal.SIGINT, signal.default_int_handler)
made, at = eval(sys.argv[1]), []
code = compile(sys.argv[2], "call", "eval")
def interrupt():
    time.sleep(0.05)
    at.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    for _ in range(10000):
        eval(code)
except KeyboardInterrupt:
    print(time.monotonic() - at[0])
layer(x)
""",
        *LONG[name],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 0.2 * SLACK


# Releases of the GIL that no signal ends, with what ends them soon.
SHORT = {
    "gil.hpp": "what the others are made of",
    "workspace.cpp": "gives memory back",
    "expert_store.cpp": "looks at what forwards hold",
    "result.cpp": "waits for a GPU, which ends what it has begun",
}


def test_every_long_call_can_be_interrupted():
    bindings = Path(__file__).parents[2] / "python" / "bindings"
    if not bindings.is_dir():
        pytest.skip("not in a checkout")
    found = {
        path.name
        for path in bindings.glob("*.[ch]pp")
        if re.search(r"const ReleasedGil \w+;|ReleasedGil \w+_;", path.read_text())
    }
    assert found == set(SHORT)


def test_a_handler_that_does_not_raise_ends_nothing():
    done = run("""
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
y = layer(np.ones((60000, 256), np.float32))
signal.setitimer(signal.ITIMER_REAL, 0)
assert seen and np.array_equal(y[:64], layer(x)), seen
""")
    assert done.returncode == 0, done.stderr[-2000:]


ROUNDING = {"nearest": 0, "down": 0x400, "up": 0x800, "zero": 0xC00}


@pytest.mark.parametrize("rounding", ROUNDING)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_results_do_not_depend_on_threads_in_any_rounding_mode(small, layer, rounding, tokens):
    if sys.platform != "linux":
        pytest.skip("the numbers of rounding modes are those of Linux on x86")
    libm = ctypes.CDLL("libm.so.6")
    x = normal(tokens, small.hidden)
    found = []

    def work():
        if libm.fesetround(ROUNDING[rounding]) != 0:
            return
        for threads in (1, 2, 3, 4):
            with mo.tuning(threads=threads, precision="exact"):
                found.extend(layer(x) for _ in range(5))

    thread = threading.Thread(target=work)  # so that the mode ends with it
    thread.start()
    thread.join()
    for y in found[1:]:
        np.testing.assert_array_equal(y.view(np.uint32), found[0].view(np.uint32))


def test_results_do_not_depend_on_threads_when_denormals_are_flushed(small, layer):
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormal numbers")
    try:
        x = normal(64, small.hidden, scale=1e-38)
        found = []
        for threads in (1, 2, 4):
            with mo.tuning(threads=threads, precision="exact"):
                found += [layer(x) for _ in range(5)]
    finally:
        torch.set_flush_denormal(False)
    for y in found[1:]:
        np.testing.assert_array_equal(y.view(np.uint32), found[0].view(np.uint32))


def test_memory_of_a_large_call_comes_back(layer, small):
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    big, one = normal(20000, small.hidden), normal(1, small.hidden)
    mo.trim()
    layer(big)
    kept = mo.trim()
    assert kept > 100 * mo.Workspace.for_layer(layer, 1).nbytes
    assert mo.trim() == 0
    layer(big)
    for _ in range(20):  # which need far less
        layer(one)
    assert 0 < mo.trim() < kept / 2


def test_workspaces_of_threads_that_are_gone_come_back(layer, small):
    x = normal(3000, small.hidden)
    mo.trim()
    threads = [threading.Thread(target=layer, args=(x,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(20):
        layer(x)
    assert mo.trim() <= 2 * mo.Workspace.for_layer(layer, 3000).nbytes

"""Children made by fork: they end, drop and use what the parent had, and never hang."""

import subprocess
import sys

import pytest

PRELUDE = """
import contextvars, gc, os, sys, tempfile, threading, time
import numpy as np
import moesaic as mo
path = os.path.join(tempfile.mkdtemp(), "small.gguf")
mo.testing.write_moe_gguf(path, num_experts=8, top_k=3, hidden=256, intermediate=256)
file = mo.GgufFile(path)
layer = mo.MoeLayer.from_gguf(file, 0)
x = np.ones((64, 256), np.float32)
disk = mo.MoeExpertStore.from_gguf(file, memory_limit=1 << 30)
pooled = mo.MoeLayer.from_store(disk, 0, mo.ExpertPool(8, 4))
want, cold = layer(x), pooled(x)
mapped = mo.MoeExpertStore.from_gguf(file)
pool = mo.ExpertPool(8, 2)
staged = mo.MoeLayer.from_store(mapped, 0, pool, on_miss="stage")
hot = staged(x[:1])
with mo.profile("counters") as profile:
    collecting = contextvars.copy_context()
def move():
    pool.refresh_from_indices([time.monotonic_ns() % 8])
    mapped.apply([pool])
def look():
    profile.zones, pool.stats, pool.usage, pool.slot_map, mapped.slot_map(0), mapped.memory()
def touch():
    [tensor.data for tensor in file.tensors.values()]
def busy(call):
    while True:
        call()
for call in (lambda: layer(x), lambda: layer(x[:1]), mo.trim, mo.backends, lambda: pooled(x),
             lambda: staged(x[:1]), move, look, touch):
    threading.Thread(target=collecting.copy().run, args=(busy, call), daemon=True).start()
time.sleep(0.1)
for _ in range(5):
    child = os.fork()
    if child == 0:
        exec(sys.argv[1])
        sys.exit(0)
    deadline = time.monotonic() + 30
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, 9)
            raise AssertionError("the child hangs")
        time.sleep(0.01)
    assert status == 0, status
assert np.array_equal(pooled(x), cold)
os._exit(0)
"""

IN_THE_CHILD = {
    "exit": "pass",
    "drop": """
del disk, pooled, layer, file, mapped, staged, pool, profile, collecting
gc.collect()
""",
    "use": "assert np.array_equal(layer(x), want); assert mo.GgufFile(path).moe_layers",
    "pool": """
for _ in range(20):
    pool.refresh_from_indices([3, 3, 5]), pool.observe([0]), pool.stats, pool.scores
pool.apply_target([6, 7])
assert pool.residents.tolist() == [6, 7]  # since nobody pins experts here
""",
    "mapped": """
for _ in range(20):
    move()
    assert np.array_equal(staged(x[:1]), hot)
mapped.slot_map(0), mapped.memory(), mapped.pools()
assert np.array_equal(mo.MoeLayer.from_store(mapped, 0, pool)(x[:1]), hot)
""",
    "file": "touch(); del layer, staged, pooled, disk, mapped; gc.collect(); file.closed",
    "profile": "profile.zones, profile.counters, profile.chrome_trace(); profile.reset()",
    "trim": "mo.trim(); mo.backends(); layer(x)",
    "stats": "disk.io_stats(); disk.memory()",
    "disk": """
try:
    pooled(x)
    raise SystemExit(2)
except mo.DeviceError as e:
    assert "forked child" in str(e), e
try:
    mo.MoeLayer.from_store(disk, 0)
except (mo.Error):
    pass
""",
    "store": """
own = mo.MoeExpertStore.from_gguf(mo.GgufFile(path), memory_limit=1 << 30)
assert np.array_equal(mo.MoeLayer.from_store(own, 0, mo.ExpertPool(8, 4))(x), cold)
""",
    "fork": """
again = os.fork()
if again == 0:
    layer(x)
    os._exit(0)
assert os.waitpid(again, 0)[1] == 0
""",
}


@pytest.mark.skipif(sys.platform == "win32", reason="has no fork")
@pytest.mark.parametrize("name", IN_THE_CHILD)
def test_a_forked_child(name):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE, IN_THE_CHILD[name]],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]

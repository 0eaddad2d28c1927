import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from values import normal, poisoned

import moesaic as mo

THREADS = 8


def test_calls_from_many_threads(small, layer):
    xs = [normal(1 + 5 * i, small.hidden, seed=i) for i in range(THREADS)]
    want = [layer(x) for x in xs]
    start = threading.Barrier(THREADS)

    def work(i):
        start.wait()
        for _ in range(20):
            out = poisoned(*xs[i].shape)
            layer(xs[i], out=out)
            np.testing.assert_array_equal(out, want[i])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


def test_tuning_is_of_one_thread(layer):
    with mo.tuning(block_size=48):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(mo.current_tuning().block_size))
        thread.start()
        thread.join()
        context = contextvars.copy_context()
        carried = threading.Thread(
            target=lambda: seen.append(context.run(mo.current_tuning).block_size)
        )
        carried.start()
        carried.join()
    assert seen == [None, 48]


def test_one_workspace_for_one_call_at_a_time(small, layer):
    """Two threads on one workspace: a clear error, or they took turns; never a wrong answer."""
    x = normal(64, small.hidden)
    want = layer(x)
    workspace = mo.Workspace.for_layer(layer, max_tokens=64)
    start = threading.Barrier(2)
    refused = []

    def work():
        start.wait()
        for _ in range(30):
            try:
                np.testing.assert_array_equal(layer(x, workspace=workspace), want)
            except mo.WorkspaceError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("workspace" in text.lower() for text in refused)


def test_close_lets_calls_finish(small):
    x = np.ones((32, small.hidden), np.float32)
    layer = mo.MoeLayer.from_gguf(mo.GgufFile(small.path), 0)
    want = layer(x)
    started = threading.Event()
    results = []

    def work():
        while True:
            try:
                results.append(layer(x))
                started.set()
            except mo.DeviceError:
                return

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    layer.close()
    thread.join(30)
    assert not thread.is_alive()
    for y in results:
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_does_not_change_results(small, layer, threads):
    x = normal(33, small.hidden)
    want = layer(x)
    with mo.tuning(threads=threads):
        np.testing.assert_array_equal(layer(x), want)

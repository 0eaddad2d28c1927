import subprocess
import sys

import pytest


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


HEAVY = {
    "gguf",
    "torch",
    "jax",
    "mlx",
    "tqdm",
    "ml_dtypes",
    "yaml",
    "requests",
    "asyncio",
    "tempfile",
}


def test_import_brings_numpy_and_nothing_heavier():
    code = "import {}, sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    with_numpy = set(run(code.format("numpy, logging, importlib.metadata, dataclasses")))
    ours = set(run(code.format("moesaic")))
    assert not (ours & HEAVY) - with_numpy
    assert {m for m in ours - with_numpy if not m.startswith("_")} <= {"moesaic"}


@pytest.mark.cost
def test_import_is_fast():
    code = (
        "import numpy, logging, importlib.metadata, dataclasses, time; t = time.perf_counter()\n"
        "import moesaic; print(time.perf_counter() - t)"
    )
    assert min(float(run(code)[0]) for _ in range(3)) < 0.25


def test_import_reads_no_environment():
    run("import os; os.environ['MOESAIC_BLOCK_SIZE'] = 'nonsense'; import moesaic")


def test_import_prints_and_configures_nothing():
    out = run(
        "import logging, moesaic\n"
        "print(len(logging.getLogger('moesaic').handlers), logging.root.handlers)"
    )
    assert out == ["1", "[]"]

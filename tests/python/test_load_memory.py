"""What the load of a mapped file leaves in memory: its result, and no pages of the file."""

import subprocess
import sys
from pathlib import Path

import pytest
from files import write_small

STATUS = Path("/proc/self/status")
UP = "blk.0.ffn_up_shexp.weight"

MEASURE = """
import sys
import moesaic as mo
LOADS = {
    "layer": lambda file: mo.MoeLayer.from_gguf(file, 0),
    "decoded": lambda file: mo.ExpertStack.load_from_gguf(file, 0, "f16"),
    "matrix": lambda file: mo.QuantMatrix.from_gguf(file, NAME),
    "matrix in the file": lambda file: mo.QuantMatrix.from_gguf(file, NAME, layout="file"),
}
large, small, what, NAME = sys.argv[1:]
def memory():
    found = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(found[name].split()[0]) * 1024 for name in ("RssFile", "VmRSS", "VmHWM")]
with mo.tuning(threads=2):
    LOADS[what](mo.GgufFile(small))  # code, buffers, imports
    file = mo.GgufFile(large)
    before = memory()
    made = LOADS[what](file)
    if what == "matrix in the file":
        made.encoded()
size = made.memory()["total"] if what == "layer" else made.nbytes
print(*((now - then) / size for now, then in zip(memory(), before)))
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    """A file whose layer takes some 120 MiB, and a small one of the same kind."""
    folder = tmp_path_factory.mktemp("memory")
    sizes = {
        "large": {"hidden": 1024, "intermediate": 2048, "shared_intermediate": 8192},
        "small": {"hidden": 64, "intermediate": 64, "shared_intermediate": 64},
    }
    types = {"gate_type": "Q8_0", "down_type": "Q8_0", "arch": "qwen2moe"}
    for name, size in sizes.items():
        write_small(folder / f"{name}.gguf", num_experts=4, top_k=2, **size, **types)
    return [str(folder / f"{name}.gguf") for name in sizes]


def growth(paths: list[str], what: str) -> tuple[float, ...]:
    """Growth of pages of files, of memory, and of its peak, in sizes of the result."""
    command = [sys.executable, "-c", MEASURE, *paths, what, UP]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return tuple(map(float, done.stdout.split()))


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
@pytest.mark.parametrize("what", ["layer", "decoded", "matrix"])
def test_a_repacked_load_keeps_no_pages_of_the_file(paths, what):
    pages, memory, peak = growth(paths, what)
    assert pages < 0.1
    assert 0.8 < memory < 1.2
    assert peak < 1.5


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
def test_weights_that_stay_in_the_file_are_its_pages(paths):
    # So that the test above measures what it says.
    assert growth(paths, "matrix in the file")[0] > 0.9

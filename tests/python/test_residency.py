"""What a loop over the layers of a file leaves in memory: about one layer, however it reads."""

import subprocess
import sys

import pytest
from files import write_small

LOOP = """
import sys
import numpy as np
import moesaic as mo

def resident():
    with open("/proc/self/status") as status:
        facts = dict(line.split(":", 1) for line in status)
    return int(facts["VmRSS"].split()[0]) * 1024

file = mo.GgufFile(sys.argv[1])
x = np.ones((2, 1024), np.float32)
def visit(i):
    use(file, i, x)
exec(sys.argv[2])
visit(0)
before = resident()
for i in file.moe_layers[1:]:
    visit(i)
print(resident() - before)
"""

WAYS = {
    "a layer": """
def use(file, i, x):
    with mo.MoeLayer.from_gguf(file, i) as layer:
        layer(x)
""",
    "a layer in place": """
def use(file, i, x):
    with mo.MoeLayer.from_gguf(file, i, layout="file") as layer:
        layer(x)
""",
    "decoded experts": """
def use(file, i, x):
    mo.ExpertStack.load_from_gguf(file, i, "f16")
""",
    "views of tensors": """
def use(file, i, x):
    for name, tensor in file.tensors.items():
        if name.startswith(f"blk.{i}."):
            tensor.data.sum()
""",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four layers of 13 MiB, whose roles are too large for what malloc keeps."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    return write_small(
        path, num_experts=8, top_k=1, hidden=1024, intermediate=512, layers=4,
        gate_type="Q8_0", down_type="Q8_0",
    ).path  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_over_layers_gives_pages_back(way, large):
    done = subprocess.run(
        [sys.executable, "-c", LOOP, str(large), WAYS[way]],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    # The first layer brought in what all need; the others would be three quarters if they stayed.
    assert int(done.stdout) < large.stat().st_size / 4

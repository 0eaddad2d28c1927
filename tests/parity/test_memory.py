"""What whole models take while they load and run: little more than their weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moesaic.transformers as mt
from moesaic.bench import whole_models
from moesaic.bench.whole_file import WholeShape, write_whole_gguf

RESET = Path("/proc/self/clear_refs")
pytestmark = pytest.mark.skipif(not RESET.exists(), reason="no /proc here")

#: Some 320 MB of experts; all else takes 6. A role of a layer is larger than several huge pages,
#: to which its memory is rounded up.
LARGE = WholeShape(
    layers=6, hidden=1024, intermediate=512, num_experts=32, top_k=4, heads=4, key_heads=2,
    head_width=64, words=256, context=256, gate_up_type="Q8_0", down_type="Q8_0",
    matrix_type="Q8_0",
)  # fmt: skip
SMALL = WholeShape(
    layers=1, hidden=64, intermediate=64, num_experts=8, top_k=4, heads=2, key_heads=2,
    head_width=32, words=256, context=256, gate_up_type="Q8_0", down_type="Q8_0",
    matrix_type="Q8_0",
)  # fmt: skip

MEASURE = """
import gc, sys, torch, transformers
import moesaic.transformers as mt
from moesaic.torch import Experts
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
what, limit = sys.argv[1], int(sys.argv[2])
ids = torch.randint(0, 256, (1, 64))

def memory(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024

def load(folder):
    if what == "from_gguf":
        return mt.from_gguf(f"{folder}/model.gguf")
    if what == "limited":
        return mt.from_gguf(f"{folder}/model.gguf", memory=limit)
    return mt.from_pretrained(f"{folder}/checkpoint")

def measured(folder):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = memory("VmRSS:")
    model = load(folder)
    with torch.no_grad():
        model(ids)
    experts = sum(m.nbytes for m in model.modules() if isinstance(m, Experts))
    return memory("VmHWM:") - before, experts

measured(sys.argv[4])  # code, buffers, imports
print(*measured(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A large model and a small one, each as a GGUF file and as a checkpoint in bf16."""
    made = []
    for name, shape in (("large", LARGE), ("small", SMALL)):
        folder = tmp_path_factory.mktemp(name)
        write_whole_gguf(folder / "model.gguf", shape)
        ours = mt.from_gguf(folder / "model.gguf", torch.bfloat16, config=shape.config())
        whole_models.in_torch(ours).save_pretrained(folder / "checkpoint")
        made.append(str(folder))
    return made


def growth(folders: list[str], what: str, limit: int = 0) -> tuple[int, int]:
    """Bytes that loading and one call added at the most, and bytes of the experts."""
    command = [sys.executable, "-c", MEASURE, what, str(limit), *folders]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    added, experts = map(int, done.stdout.split())
    return added, experts


@pytest.mark.parametrize("what", ["from_gguf", "from_pretrained"])
def test_no_more_than_the_experts(folders, what):
    added, experts = growth(folders, what)
    assert experts > 300e6
    assert added < 1.2 * experts


def test_a_limit_holds(folders):
    """The rest of the model is beside it, and slots are rounded up to huge pages."""
    limit = 130_000_000
    added, experts = growth(folders, "limited", limit)
    assert limit < experts / 2
    arrays = 2 * 3 * LARGE.layers  # slots and those that experts pass through, by roles
    assert added < limit + arrays * (2 << 20) + 0.05 * experts

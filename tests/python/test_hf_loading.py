"""Loading experts from safetensors: progress, memory, and the builder under the loaders."""

import sys

import numpy as np
import pytest
from hf_experts import LAYER, E, H, I, per_expert, weights, write
from load_memory import peak_of_load

import moesaic as mo
from moesaic import _core


def test_progress_counts_bytes(tmp_path):
    folder, seen = write(tmp_path, per_expert(*weights())), []
    mo.ExpertStack.load_from_safetensors(folder, LAYER, progress=seen.append)
    reading = [p for p in seen if "experts" in p.what]
    assert len(reading) == 3 * E
    assert [p.done_bytes for p in reading] == [i * I * H * 4 for i in range(1, 3 * E + 1)]
    assert reading[-1].done_bytes == reading[-1].total_bytes
    with pytest.raises(mo.OperationCancelled):
        mo.ExpertStack.load_from_safetensors(folder, LAYER, progress=lambda p: False)


@pytest.mark.cost
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_at_load(tmp_path):
    """Beside its result a load holds one role, while that is repacked, and one expert."""

    def save(folder, experts, hidden, inter):
        folder.mkdir()
        base = "model.layers.0.mlp.experts"
        tensors = {
            f"{base}.gate_up_proj": np.ones((experts, 2 * inter, hidden), np.float16),
            f"{base}.down_proj": np.ones((experts, hidden, inter), np.float16),
        }
        return write(folder, tensors, "qwen3_5_moe_text")

    large = save(tmp_path / "large", 16, 1024, 512)
    assert peak_of_load(large, save(tmp_path / "small", 2, 64, 32)) < 1.4


def test_builder():
    """What the loaders rely on: whole matrices, each once."""
    up, down = ("F32", "here", "read", ""), ("F16", "here", "read", "")
    builder = _core.StackBuilder(2, 4, 3, gate=None, up=up, down=down)
    rows = np.zeros((3, 16), np.uint8)
    builder.add("up", 0, rows)
    for call, match in (
        (("up", 0, rows), "up of expert 0.*again"),
        (("up", 2, rows), "expert 2"),
        (("up", 1, rows[:-1]), "48 bytes.*32"),
        (("gate", 0, rows), "gate"),
        (("up", 1, rows, 1.0, np.zeros(2, np.float32)), "bias.*3 values.*2"),
    ):
        with pytest.raises(mo.ShapeError, match=match):
            builder.add(*call)
    with pytest.raises(mo.ConfigError, match="role"):
        builder.add("other", 0, rows)
    with pytest.raises(mo.ConfigError, match="Q9_9"):
        _core.StackBuilder(1, 4, 3, gate=None, up=("Q9_9", "", "", ""), down=down)
    with pytest.raises(mo.ShapeError, match="32"):
        _core.StackBuilder(1, 4, 3, gate=None, up=("Q8_0", "", "", ""), down=down)
    with pytest.raises(mo.ShapeError, match="shape"):
        _core.StackBuilder(0, 4, 3, gate=None, up=up, down=down)

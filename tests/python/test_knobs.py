"""Every knob changes something that its user can see: what it says, and not a field alone.

A case has two settings and what a call shows under each; the two must differ. A new knob fails here
until it has a case.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Small

import moesaic as mo

Observe = Callable[[mo.MoeLayer, Small], Any]


def batch(small: Small, tokens: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((tokens, small.hidden), np.float32)


def fact(name: str, tokens: int) -> Observe:
    """What explain() says of a call."""
    return lambda layer, small: dict(mo.explain(layer, num_tokens=tokens))[name]


def padded_rows(layer: mo.MoeLayer, small: Small) -> int:
    with mo.profile("counters") as p:
        layer(batch(small, 8))
    return p.counters["padded_rows"]


def outcome(layer: mo.MoeLayer, small: Small) -> str:
    try:
        layer(batch(small, 4))
    except mo.Error as error:
        return type(error).__name__
    return "done"


def outcome_of_nan(layer: mo.MoeLayer, small: Small) -> str:
    logits = np.zeros((2, small.num_experts), np.float32)
    logits[1, 3] = np.nan
    try:
        layer(batch(small, 2), logits)
    except mo.ConfigError:
        return "refused"
    return "done"


def device_block_size(layer: mo.MoeLayer, small: Small) -> int:
    return mo.pick_block_size(None, device_route=True, total_pairs=2000)


def keeps_events(layer: mo.MoeLayer, small: Small) -> bool:
    with mo.profile() as p:
        layer(batch(small, 2))
    return '"ph"' in p.chrome_trace()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fills_workspace(layer: mo.MoeLayer, small: Small) -> bool:
    """Whether memory is written that a call without a single pair has no other use for."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    # More memory than an allocator keeps for reuse, whose pages would be resident already.
    tokens = 65536
    x, out = batch(small, tokens), np.zeros((tokens, small.hidden), np.float32)
    ids = np.full((tokens, small.top_k), -1, np.int32)
    routing = mo.Routing(ids, np.zeros(ids.shape, np.float32))
    workspace = mo.Workspace.for_layer(layer, max_tokens=tokens)
    assert workspace.nbytes > 64 << 20
    before = resident_bytes()
    layer(x, routing=routing, out=out, workspace=workspace)
    return resident_bytes() - before > workspace.nbytes // 2


def run(code: str, **environment: str) -> str:
    """What a new process says, in which the environment is read."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def warnings_of_a_process(level: str) -> str:
    code = "import logging; logging.basicConfig(); import moesaic as mo; mo.current_tuning()"
    return run(code, MOESAIC_LOG=level, MOESAIC_TREADS="1")


def reason_without_a_plugin(path: str, folder: Path) -> str:
    """Any library passes for the driver's: it is opened, and the plug-in is missed next."""
    if sys.platform != "linux":
        pytest.skip("CUDA needs Linux")
    (library,) = set(
        re.findall(
            r"/\S*/libc(?:-[\d.]+)?\.so\S*", Path("/proc/self/maps").read_text(errors="replace")
        )
    )
    (folder / "libcuda.so.1").symlink_to(library)
    code = "import moesaic as mo; print([b.reason for b in mo.backends() if b.name == 'cuda'])"
    return run(code, LD_LIBRARY_PATH=str(folder), MOESAIC_CUDA_PLUGIN=path)


# Knob: the settings of one call, of another, and what shows the difference.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Observe]] = {
    "block_size": (
        {"gemm": "aligned", "block_size": 8}, {"gemm": "aligned", "block_size": 64}, padded_rows,
    ),
    "large_m_block_size": ({}, {"large_m_block_size": 64}, device_block_size),
    "large_m_min_pairs": (
        {"large_m_block_size": 64},
        {"large_m_block_size": 64, "large_m_min_pairs": 2001},
        device_block_size,
    ),
    "gemm": ({}, {"gemm": "aligned"}, fact("path", 8)),
    "route": ({}, {"route": "device"}, outcome),
    "row_space": ({}, {"row_space": "packed_rows"}, fact("row_space", 8)),
    "precision": ({"precision": "exact"}, {"precision": "fast"}, fact("precision", 8)),
    "batch_invariant": ({}, {"batch_invariant": True}, fact("precision", 512)),
    "profile": ({"profile": "events"}, {"profile": "counters"}, keeps_events),
    "strict": ({}, {"strict": True}, outcome_of_nan),
    "threads": ({"threads": 1}, {"threads": 3}, fact("threads", 8)),
    "numa": ({"numa": "off"}, {"numa": 3}, fact("numa", 8)),
    "cpu_isa": ({"cpu_isa": "scalar"}, {"cpu_isa": None}, fact("down kernel", 8)),
    "backend": ({}, {"backend": "none_such"}, outcome),
    "poison": ({}, {"poison": True}, fills_workspace),
}  # fmt: skip


@pytest.mark.parametrize(
    "knob", [k for k in mo.Tuning().to_dict() if k not in ("log", "cuda_plugin")]
)
def test_a_knob_changes_a_call(knob: str, layer: mo.MoeLayer, small: Small) -> None:
    one, other, observe = CASES[knob]
    assert one.get(knob, mo.Tuning().to_dict()[knob]) != other[knob]
    assert {**one, knob: None} == {**other, knob: None}, "the settings differ in one knob"
    seen = []
    for knobs in (one, other):
        with mo.tuning(**knobs):
            seen.append(observe(layer, small))
    assert seen[0] != seen[1]


def test_the_log_level_of_a_process() -> None:
    assert "MOESAIC_TREADS" in warnings_of_a_process("warn")
    assert warnings_of_a_process("error") == ""


def test_the_plugin_of_a_process(tmp_path: Path) -> None:
    assert "/nowhere/plugin.so" in reason_without_a_plugin("/nowhere/plugin.so", tmp_path)

"""``moesaic convert`` killed, stopped and gone on with; its threads and memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from converting import convert, leftovers, small_source

import moesaic as mo
from moesaic.cli import main
from moesaic.saving.convert import Types, planned, run, write_plan
from moesaic.saving.tensors import Tensor

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return small_source(tmp_path_factory.mktemp("convert") / "source.gguf")


@pytest.fixture
def often(monkeypatch):
    """A record of the journal for each unit."""
    monkeypatch.setattr(run, "RECORD_EVERY", 1)


def stopped(source: Path, target: Path, after: int, types: Types) -> None:
    """A conversion that ends after some steps, of which the disk lost what was not recorded."""
    seen: list[mo.Progress] = []

    def progress(step: mo.Progress) -> bool:
        seen.append(step)
        return len(seen) < after

    with pytest.raises(mo.OperationCancelled):
        convert(source, target, types, progress=progress)
    first, *records = target.with_name(f".{target.name}.journal").read_text().splitlines()
    with planned(source, types) as plan:
        units = [tensor for tensor in plan.tensors for _ in range(tensor.units)]
        done = sum(tensor.nbytes // tensor.units for tensor in units[: int(records[-1])])
        assert 0 < done < sum(tensor.nbytes for tensor in plan.tensors)
    partial = target.with_name(f".{target.name}.partial")
    kept = int(first.split()[1]) + done  # tensors here leave no gaps between them
    data = bytearray(partial.read_bytes())
    data[kept:] = bytes(len(data) - kept)
    partial.write_bytes(data)


def test_a_stopped_conversion_goes_on(source, tmp_path, often):
    types = Types("Q4_0", down="Q8_0")
    whole = convert(source, tmp_path / "whole.gguf", types).read_bytes()
    target = tmp_path / "target.gguf"
    stopped(source, target, 20, types)
    assert sorted(leftovers(tmp_path)) == [".target.gguf.journal", ".target.gguf.partial"]
    steps: list[mo.Progress] = []
    convert(source, target, types, resume=True, progress=steps.append)
    assert target.read_bytes() == whole and leftovers(tmp_path) == []
    assert steps[0].done_bytes > steps[0].total_bytes // 10
    assert steps[-1].done_bytes == steps[-1].total_bytes


def test_a_record_that_was_being_written_does_not_count(source, tmp_path, often):
    types = Types("Q4_0")
    whole = convert(source, tmp_path / "whole.gguf", types).read_bytes()
    target = tmp_path / "target.gguf"
    stopped(source, target, 20, types)
    with (tmp_path / ".target.gguf.journal").open("a") as journal:
        journal.write("9999")
    convert(source, target, types, resume=True)
    assert target.read_bytes() == whole


def test_another_conversion_is_not_gone_on_with(source, tmp_path, often):
    target = tmp_path / "target.gguf"
    stopped(source, target, 20, Types("Q4_0"))
    with pytest.raises(mo.ConfigError, match="the rest of the same conversion"):
        convert(source, target, Types("Q8_0"), resume=True)
    whole = convert(source, tmp_path / "whole.gguf", Types("Q8_0")).read_bytes()
    convert(source, target, Types("Q8_0"))  # starts anew
    assert target.read_bytes() == whole and leftovers(tmp_path) == []


def test_two_conversions_of_one_name(source, tmp_path):
    target = tmp_path / "target.gguf"

    def meanwhile(_: mo.Progress) -> None:
        with pytest.raises(mo.ConfigError, match="no other process"):
            convert(source, target, Types("Q8_0"))

    convert(source, target, Types("Q8_0"), progress=meanwhile)
    assert mo.GgufFile(target).moe_layers == [0, 1]


def test_a_killed_conversion_goes_on(source, tmp_path):
    types = Types("Q5_K", down="Q6_K")
    whole = convert(source, tmp_path / "whole.gguf", types).read_bytes()
    target = tmp_path / "target.gguf"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from moesaic.saving.convert import Types, planned, run, write_plan\n"
        "run.RECORD_EVERY = 1\n"
        "with planned(sys.argv[1], Types('Q5_K', down='Q6_K')) as plan:\n"
        "    write_plan(plan, Path(sys.argv[2]), progress=lambda p: time.sleep(0.02))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(source), str(target)])
    journal = tmp_path / ".target.gguf.journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if journal.exists() and len(journal.read_text().splitlines()) > 5:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not target.exists() and journal.exists()
    assert main(["convert", str(source), str(target), "--experts", "Q5_K", "--down", "Q6_K",
                 "--resume"]) == 0  # fmt: skip
    assert target.read_bytes() == whole and leftovers(tmp_path) == []


def test_threads_do_not_change_bytes(source, tmp_path):
    types = Types("Q4_K")
    files = [
        convert(source, tmp_path / f"{count}.gguf", types, threads=count).read_bytes()
        for count in (1, 3)
    ]
    assert files[0] == files[1]


def test_units_are_made_a_few_ahead(source, tmp_path):
    """Not all at once, which would take the memory of a model."""
    made: list[int] = []
    written: list[mo.Progress] = []

    def counted(tensor: Tensor) -> Tensor:
        def read(unit: int) -> np.ndarray:
            made.append(unit)
            assert len(made) - len(written) <= 2 + 2 + 1  # in work, waiting, being written
            return tensor.read(unit)

        return replace(tensor, read=read)

    with planned(source, Types("Q8_0")) as plan:
        units = sum(tensor.units for tensor in plan.tensors)
        plan.tensors[:] = map(counted, plan.tensors)
        write_plan(plan, tmp_path / "t.gguf", progress=written.append, threads=2)
    assert len(made) == len(written) == units

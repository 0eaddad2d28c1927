"""Saved files appear whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from saved import assert_same, names_in, open_layer

import moesaic as mo
from moesaic.saving import container, layers

pytest.importorskip("gguf")


@pytest.fixture
def target(tmp_path) -> Path:
    path = tmp_path / "new.gguf"
    path.write_text("old")
    return path


def test_errors_name_files_whose_names_are_no_text(layer, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.gguf"
    try:
        Path(os.fsdecode(path)).write_text("old")
    except OSError:
        pytest.skip("a file system of names that are text")
    with pytest.raises(mo.ConfigError) as caught:
        layer.save(path)
    assert caught.value.what.endswith("\\xff.gguf")
    assert caught.value.hint == "overwrite=True replaces it"


def test_a_file_that_is_there_is_kept(layer, target):
    with pytest.raises(mo.ConfigError, match="overwrite"):
        layer.save(target)
    assert target.read_text() == "old"
    target.chmod(0o640)
    layer.save(target, overwrite=True)
    assert_same(layer, open_layer(target))
    assert target.stat().st_mode & 0o777 == 0o640
    assert names_in(target.parent) == ["new.gguf"]


def test_a_link_stays_a_link(layer, tmp_path, target):
    link = tmp_path / "link.gguf"
    link.symlink_to(target.name)
    layer.save(link, overwrite=True)
    assert link.is_symlink()
    assert_same(layer, open_layer(target))


def test_a_new_file_has_the_usual_mode(layer, tmp_path):
    (tmp_path / "usual").touch()
    layer.save(tmp_path / "new.gguf")
    assert (tmp_path / "new.gguf").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_progress_is_told_and_may_cancel(layer, target):
    steps: list[mo.Progress] = []
    layer.save(target, overwrite=True, progress=steps.append)
    done = [step.done_bytes for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1].total_bytes
    assert {step.what for step in steps} == set(mo.GgufFile(target).tensors)
    written = target.read_bytes()
    with pytest.raises(mo.OperationCancelled):
        layer.save(target, overwrite=True, progress=lambda _: False)

    def interrupt(_: mo.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer.save(target, overwrite=True, progress=interrupt)
    assert target.read_bytes() == written and names_in(target.parent) == ["new.gguf"]


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_leaves_the_old_file(layer, target, monkeypatch, after):
    count = 0
    write_at = container.write_at

    def full(*arguments):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(*arguments)

    monkeypatch.setattr(layers, "write_at", full)
    with pytest.raises(OSError, match="No space") as caught:
        layer.save(target, overwrite=True)
    assert caught.value.filename == str(target)
    assert target.read_text() == "old" and names_in(target.parent) == ["new.gguf"]


def test_a_limit_on_file_sizes_leaves_the_old_file(target):
    code = (
        "import resource, sys, moesaic as mo\n"
        "mo.testing.write_moe_gguf('m.gguf')\n"
        "layer = mo.MoeLayer.from_gguf('m.gguf', 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "layer.save(sys.argv[1], overwrite=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, target], cwd=target.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert f"[Errno {errno.EFBIG}]" in done.stderr and "new.gguf" in done.stderr
    assert target.read_text() == "old" and names_in(target.parent) == ["m.gguf", "new.gguf"]


def test_the_bytes_are_on_the_disk_before_the_name(layer, tmp_path, monkeypatch):
    events = []
    fsync, link = os.fsync, Path.hardlink_to

    def spy_fsync(handle):
        events.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def spy_link(self, other):
        events.append(("name", self.name))
        link(self, other)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "hardlink_to", spy_link)
    layer.save(tmp_path / "new.gguf")
    assert [kind for kind, _ in events] == ["fsync", "name", "fsync"]
    assert events[0][1].endswith(".tmp") and events[2][1] == tmp_path.name

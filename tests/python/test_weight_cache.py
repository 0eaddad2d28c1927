"""Repacked weights that are kept from one start to the next: when they are taken, and when not."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from files import write_small
from test_gguf_layers import Model, fuse, split_experts
from values import normal

import moesaic as mo
from moesaic.cli import main

STATUS = Path("/proc/self/status")
HEAD = 4096


def decisions(report: mo.LoadReport) -> list[str]:
    return [role.decision for role in report.roles]


def load(path: Path, **options) -> mo.MoeLayer:
    return mo.MoeLayer.from_gguf(path, 0, **{"weight_cache": True, **options})


def folder_of(path: Path) -> Path:
    return path.with_name(path.name + ".panels")


def files_of(path: Path) -> list[Path]:
    return sorted(folder_of(path).iterdir())


def replace(file: Path, data: bytes) -> None:
    """Not in place: who has mapped the file keeps its bytes."""
    file.unlink()
    file.write_bytes(data)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_small(tmp_path / "m.gguf", arch="qwen2moe", shared_intermediate=256).path


def same_bits(one: mo.MoeLayer, other: mo.MoeLayer) -> bool:
    return all(
        np.array_equal(one(x), other(x))
        for x in (normal(n, one.config.hidden_size) for n in (1, 5, 64))
    )


class TestResults:
    def test_of_a_layer(self, path):
        plain = mo.MoeLayer.from_gguf(path, 0)
        first, second = load(path), load(path)
        assert decisions(first.report) == ["repacked"] * 3
        assert decisions(second.report) == ["cached"] * 3
        assert len(files_of(path)) == 6  # three roles of the experts, three of the shared ones
        assert all("there is none" in role.reason for role in first.report.roles)
        assert str(folder_of(path)) in second.report.roles[0].reason
        for layer in (first, second):
            assert same_bits(layer, plain)
            assert layer.memory() == plain.memory()
            for role in ("gate", "up", "down"):
                np.testing.assert_array_equal(layer.stack.encoded(role), plain.stack.encoded(role))

    @pytest.mark.parametrize("form", ["fused", "one tensor per expert"])
    def test_of_other_files(self, tmp_path, form):
        model = Model.small()
        (fuse if form == "fused" else split_experts)(model)
        path = model.path(tmp_path)
        plain = mo.MoeLayer.from_gguf(path, 0)
        assert same_bits(load(path), plain)
        again = load(path)
        assert decisions(again.report) == ["cached"] * 3
        assert same_bits(again, plain)

    def test_of_some_experts(self, path):
        """Each choice of experts has files of its own."""
        routing = mo.Routing(np.array([[1, 5]], np.int32), np.ones((1, 2), np.float32))
        x = normal(1, 256)
        for kept in (None, [1, 5], [1, 4, 5]):
            plain = mo.MoeLayer.from_gguf(path, 0, experts=kept)
            for decision in ("repacked", "cached"):
                layer = load(path, experts=kept)
                assert decisions(layer.report) == [decision] * 3
                assert np.array_equal(layer(x, routing=routing), plain(x, routing=routing))
        assert load(path, experts=[]).stack.experts == []

    def test_of_a_stack_and_of_a_matrix(self, path):
        stacks = [mo.ExpertStack.load_from_gguf(path, 0, weight_cache=True) for _ in range(2)]
        opened = mo.ExpertStack.open_and_load(path, 0, weight_cache=True)
        assert decisions(stacks[1].report) == decisions(opened.report) == ["cached"] * 3
        name, x = "blk.0.ffn_down_shexp.weight", normal(3, 256)
        plain = mo.QuantMatrix.from_gguf(path, name)
        for _ in range(2):
            matrix = mo.QuantMatrix.from_gguf(path, name, weight_cache=True)
            assert matrix.layout == "panels"
            np.testing.assert_array_equal(matrix(x), plain(x))
        assert len(files_of(path)) == 4

    @pytest.mark.parametrize("numa", [2, 3])
    def test_on_several_nodes(self, path, numa):
        """Panels are dealt as without a cache: they are read from it."""
        plain = mo.MoeLayer.from_gguf(path, 0)
        with mo.tuning(numa=numa, threads=numa):
            made, read = load(path), load(path)
            for layer, decision in ((made, "repacked"), (read, "cached")):
                assert decisions(layer.report) == [decision] * 3
                assert all(f"dealt to {numa}" in role.reason for role in layer.report.roles)
                assert same_bits(layer, plain)
        assert same_bits(load(path), plain)

    def test_under_another_instruction_set(self, path):
        """The files are those of every one of them."""
        load(path)
        code = (
            "import sys, moesaic as mo; layer = mo.MoeLayer.from_gguf(sys.argv[1], 0,"
            " weight_cache=True); print(*(role.decision for role in layer.report.roles))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True,
            env={**os.environ, "MOESAIC_CPU_ISA": "scalar"},
        )  # fmt: skip
        assert done.stdout.split() == ["cached"] * 3


class TestPlaces:
    def test_a_folder_of_ones_own(self, path, tmp_path, monkeypatch):
        load(path, weight_cache=tmp_path / "new" / "cache")
        assert not folder_of(path).exists()
        assert len(list((tmp_path / "new/cache/m.gguf.panels").iterdir())) == 6
        monkeypatch.chdir(tmp_path)
        assert decisions(load(path, weight_cache="new/cache").report) == ["cached"] * 3

    def test_a_model_that_moves(self, path, tmp_path):
        load(path)
        there = tmp_path / "there"
        there.mkdir()
        for one in (path, folder_of(path)):
            shutil.move(one, there)
        assert decisions(load(there / path.name).report) == ["cached"] * 3

    def test_pickles_go_there_too(self, path, tmp_path):
        layer = load(path, weight_cache=tmp_path / "cache")
        again = pickle.loads(pickle.dumps(layer))
        assert decisions(again.report) == ["cached"] * 3
        assert same_bits(again, layer)

    def test_that_cannot_be_made(self, path, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match=r"m\.gguf\.panels"):
            load(path, weight_cache=tmp_path / "file")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
    def test_that_cannot_be_written(self, path):
        folder_of(path).mkdir()
        folder_of(path).chmod(0o500)
        with pytest.raises(PermissionError, match=r"m\.gguf\.panels"):
            load(path)
        assert files_of(path) == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
    def test_that_is_read_only_and_full_already(self, path):
        load(path)
        folder_of(path).chmod(0o500)
        assert decisions(load(path).report) == ["cached"] * 3

    def test_a_full_disk(self, path):
        """The limit of a file's size stands for it: the same call fails at the same place."""
        code = """
import resource, sys
import moesaic as mo
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    mo.MoeLayer.from_gguf(sys.argv[1], 0, weight_cache=True)
except OSError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
        )
        assert "File too large" in done.stdout and "m.gguf.panels" in done.stdout
        assert files_of(path) == []


class TestWhatIsNotTaken:
    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (lambda data: b"", "it is cut short"),
            (lambda data: data[:-1], "it has "),
            (lambda data: data[:HEAD], "it has 4096 bytes"),
            (lambda data: data + b"\0", "it has "),
            (lambda data: b"x" * len(data), "it is no file of this cache"),
            (lambda data: data[:20] + b"x" + data[21:], "its head is damaged"),
            (lambda data: data[: HEAD - 16] + b"x" + data[HEAD - 15 :], "its head is damaged"),
        ],
        ids=["empty", "cut", "head alone", "longer", "foreign", "text", "hash"],
    )
    def test_damaged_files_are_made_anew(self, path, damage, why):
        plain = load(path)
        for file in files_of(path):
            replace(file, damage(file.read_bytes()))
        anew = load(path)
        assert decisions(anew.report) == ["repacked"] * 3
        assert all(f"since {why}" in role.reason for role in anew.report.roles)
        assert same_bits(anew, plain)
        assert decisions(load(path).report) == ["cached"] * 3

    def test_files_of_other_roles(self, path):
        plain = load(path)
        gate, up = (
            next(f for f in files_of(path) if name in f.name)
            for name in ("ffn_gate_exps", "ffn_up_exps")
        )
        replace(up, gate.read_bytes())
        anew = load(path)
        assert decisions(anew.report) == ["cached", "repacked", "cached"]
        assert "it is of another tensor" in anew.report.roles[1].reason
        assert same_bits(anew, plain)

    @pytest.mark.parametrize("change", ["time", "weights of the same time", "types"])
    def test_files_of_another_model(self, path, change):
        load(path)
        then = path.stat()
        if change == "time":
            os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns + 1))
        elif change == "types":
            write_small(path, arch="qwen2moe", shared_intermediate=256, gate_type="Q8_0")
        else:
            write_small(path, arch="qwen2moe", shared_intermediate=256, seed=7)
            os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
        anew = load(path)
        assert decisions(anew.report) == ["repacked"] * 3
        why = "sample of its bytes" if "weights" in change else "source file"
        assert all(f"it is of another {why}" in role.reason for role in anew.report.roles)
        assert same_bits(anew, mo.MoeLayer.from_gguf(path, 0))
        assert len(files_of(path)) == 6  # in the place of the old ones

    def test_folders_in_the_place_of_files(self, path):
        load(path)
        first = files_of(path)[0]
        first.unlink()
        first.mkdir()
        (first / "mine").write_text("")
        with pytest.raises(OSError, match=r"m\.gguf\.panels"):
            load(path)
        assert (first / "mine").exists()


class TestCommand:
    def test_what_is_good_and_what_is_not(self, path, capsys):
        load(path)
        assert main(["cache", str(folder_of(path))]) == 0
        assert "6 files" in capsys.readouterr().out
        damaged = files_of(path)[2]
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1  # which no load looks at
        replace(damaged, data)
        assert decisions(load(path).report) == ["cached"] * 3
        assert main(["cache", str(folder_of(path)), "--json"]) == 1
        files = json.loads(capsys.readouterr().out)["files"]
        wrong = {one["name"]: one["wrong"] for one in files if one["wrong"]}
        assert wrong == {damaged.name: "its bytes are not those that were written"}

    def test_folders_without_files(self, tmp_path, capsys):
        assert main(["cache", str(tmp_path)]) == 2
        assert main(["cache", str(tmp_path / "nothing")]) == 2
        assert "Traceback" not in capsys.readouterr().err


class TestRefused:
    def test_arguments(self, path):
        with mo.GgufFile(path, mmap=False) as file, pytest.raises(mo.ConfigError, match="mapped"):
            load(file)
        with pytest.raises(mo.ConfigError, match="stay as the file has them"):
            load(path, layout="file")
        with pytest.raises(mo.ConfigError, match="dequantize"):
            mo.ExpertStack.load_from_gguf(path, 0, "f32", weight_cache=True)
        with pytest.raises(mo.ConfigError, match="dequantize"):
            mo.QuantMatrix.from_gguf(path, "blk.0.ffn_down_shexp.weight", "f32", weight_cache=True)
        with pytest.raises(mo.DTypeError, match="weight_cache: expected True, False, or a path"):
            load(path, weight_cache=3)
        assert not folder_of(path).exists()

    def test_progress_that_says_no(self, path):
        with pytest.raises(mo.OperationCancelled):
            load(path, progress=lambda done: done.what != "repack")
        assert all(not file.name.endswith(".tmp") for file in files_of(path))


BOTH = """
import sys, time
import moesaic as mo
path, start = sys.argv[1], float(sys.argv[2])
time.sleep(max(0, start - time.time()))
layer = mo.MoeLayer.from_gguf(path, 0, weight_cache=True)
import numpy as np
x = np.ones((4, 256), np.float32)
print(layer(x).tobytes().hex(), *(role.decision for role in layer.report.roles))
"""


class TestSeveral:
    def test_processes_at_once(self, path):
        """All get the same bits, and no role is made twice."""
        import time

        start = str(time.time() + 1)
        command = [sys.executable, "-c", BOTH, str(path), start]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        said = [process.communicate(timeout=60)[0].split() for process in running]
        assert [process.returncode for process in running] == [0] * 3
        want = mo.MoeLayer.from_gguf(path, 0)(np.ones((4, 256), np.float32))
        assert {one[0] for one in said} == {want.tobytes().hex()}
        for role in range(3):
            assert sorted(one[1 + role] for one in said) == ["cached", "cached", "repacked"]
        assert len(files_of(path)) == 6

    def test_threads_at_once(self, path):
        made: list[mo.MoeLayer] = []
        threads = [threading.Thread(target=lambda: made.append(load(path))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for role in range(3):
            assert [decisions(one.report)[role] for one in made].count("repacked") == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_uses_what_is_mapped(self, path):
        code = """
import os, sys
import numpy as np
import moesaic as mo
x = np.ones((4, 256), np.float32)
for _ in range(2):
    layer = mo.MoeLayer.from_gguf(sys.argv[1], 0, weight_cache=True)
    want = layer(x)
    child = os.fork()
    if child == 0:
        again = mo.MoeLayer.from_gguf(sys.argv[1], 0, weight_cache=True)
        good = all(role.decision == "cached" for role in again.report.roles)
        os._exit(0 if good and (layer(x) == want).all() and (again(x) == want).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
"""
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=120)

    def test_a_killed_writer_leaves_nothing_that_counts(self, path):
        folder_of(path).mkdir()
        left = folder_of(path) / f".{name_of_first(path)}.0123456789abcdef.tmp"
        left.write_bytes(b"half")
        load(path)
        assert not left.exists()


def name_of_first(path: Path) -> str:
    other = path.with_name("names")
    mo.ExpertStack.load_from_gguf(path, 0, weight_cache=other)
    return min(file.name for file in (other / f"{path.name}.panels").iterdir())


MEASURE = """
import sys
import moesaic as mo
path, small, cache = sys.argv[1:]
def memory():
    found = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(found[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM")]
with mo.tuning(threads=2):
    mo.MoeLayer.from_gguf(small, 0)(mo.asarray([[1.0] * 64], "f32"))  # code, buffers, imports
    before = memory()
    layer = mo.MoeLayer.from_gguf(path, 0, weight_cache=cache == "cached")
    loaded = memory()
size = layer.memory()["total"]
print(*((now - then) / size for now, then in zip(loaded, before)))
"""


@pytest.mark.cost
@pytest.mark.skipif(not STATUS.exists(), reason="no /proc here")
def test_mapped_weights_take_no_memory_of_the_process(tmp_path):
    sizes = {"num_experts": 4, "top_k": 2, "gate_type": "Q8_0", "down_type": "Q8_0"}
    large = write_small(tmp_path / "l.gguf", hidden=1024, intermediate=2048, **sizes).path
    small = write_small(tmp_path / "s.gguf", hidden=64, intermediate=64, **sizes).path

    def growth(how: str) -> list[float]:
        command = [sys.executable, "-c", MEASURE, str(large), str(small), how]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        return [float(part) for part in done.stdout.split()]

    assert growth("plain")[0] > 0.8
    # Made: a role at a time is in memory beside what is mapped.
    anonymous, peak = growth("cached")
    assert anonymous < 0.1 and peak < 1.5
    anonymous, peak = growth("cached")  # mapped, and not even touched
    assert anonymous < 0.1 and peak < 0.2

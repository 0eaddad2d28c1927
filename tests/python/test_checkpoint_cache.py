"""Repacked experts of checkpoints that are kept from one start to the next."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_checkpoint_stores import BLOCKS, FORMS, H, I, Written, floats, fp8
from values import expert_weights, normal

import moesaic as mo
from moesaic.cli import main
from moesaic.safetensors.reader import Checkpoint

LAYER = BLOCKS[0]


def decisions(report: mo.LoadReport) -> list[str]:
    return [role.decision for role in report.roles]


def load(folder: Path, **options) -> mo.MoeLayer:
    return mo.MoeLayer.from_safetensors(folder, LAYER, **{"weight_cache": True, **options})


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "moesaic.panels").iterdir())


def same_bits(one: mo.MoeLayer, other: mo.MoeLayer) -> bool:
    return all(
        np.array_equal(one(x), other(x))
        for x in (normal(n, one.config.hidden_size, seed=n) for n in (1, 5, 64))
    )


def with_shared_experts() -> Written:
    written = floats("BF16")
    written.config = {
        "model_type": "qwen2_moe", "hidden_size": H, "moe_intermediate_size": I,
        "num_experts": 6, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 96,
        "norm_topk_prob": False,
    }  # fmt: skip
    for block in BLOCKS:
        stem = f"model.layers.{block}.mlp"
        gate, up, down = (part[0] for part in expert_weights(1, H, 96, seed=block))
        written.add({
            f"{stem}.shared_expert.gate_proj.weight": gate,
            f"{stem}.shared_expert.up_proj.weight": up,
            f"{stem}.shared_expert.down_proj.weight": down,
            f"{stem}.shared_expert_gate.weight": normal(1, H, seed=block),
        })  # fmt: skip
    return written


@pytest.fixture
def folder(tmp_path) -> Path:
    return with_shared_experts().write(tmp_path / "model")


class TestResults:
    @pytest.mark.parametrize("form", FORMS)
    def test_of_every_form(self, tmp_path, form):
        folder = FORMS[form]().write(tmp_path)
        plain = mo.MoeLayer.from_safetensors(folder, LAYER)
        if plain.stack.kind == "marlin":
            with pytest.raises(mo.UnsupportedError, match=r"weight_cache: .* stays INT4"):
                load(folder)
            return
        first, second = load(folder), load(folder)
        assert decisions(first.report) == ["repacked"] * 3
        assert decisions(second.report) == ["cached"] * 3
        for layer in (first, second):
            assert same_bits(layer, plain)
            assert layer.memory() == plain.memory()
            assert layer.stack.quants == plain.stack.quants
            for role in ("gate", "up", "down"):
                np.testing.assert_array_equal(layer.stack.encoded(role), plain.stack.encoded(role))
                for values in ("biases", "scales"):
                    mine, others = (getattr(one.stack, values).get(role) for one in (layer, plain))
                    np.testing.assert_array_equal(mine, others)

    def test_of_shared_experts(self, folder):
        plain = mo.MoeLayer.from_safetensors(folder, LAYER)
        layers = [load(folder) for _ in range(2)]
        assert len(files_of(folder)) == 6  # three roles of the experts, three of the shared ones
        for layer, decision in zip(layers, ("repacked", "cached"), strict=True):
            assert decisions(layer.shared.stack.report) == [decision] * 3
            assert same_bits(layer, plain)
        assert all("there is none" in role.reason for role in layers[0].report.roles)
        assert str(folder / "moesaic.panels") in layers[1].report.roles[0].reason

    def test_of_a_stack(self, folder):
        load(folder)
        stack = mo.ExpertStack.load_from_safetensors(folder, LAYER, weight_cache=True)
        assert decisions(stack.report) == ["cached"] * 3

    def test_of_some_experts(self, folder):
        """Each choice of experts has files of its own."""
        routing = mo.Routing(np.array([[1, 5]], np.int32), np.ones((1, 2), np.float32))
        x = normal(1, H)
        for kept in (None, [1, 5], [1, 4, 5]):
            plain = mo.MoeLayer.from_safetensors(folder, LAYER, experts=kept)
            for decision in ("repacked", "cached"):
                layer = load(folder, experts=kept)
                assert decisions(layer.report) == [decision] * 3
                assert np.array_equal(layer(x, routing=routing), plain(x, routing=routing))
        assert load(folder, experts=[]).stack.experts == []

    def test_on_several_nodes(self, folder):
        """Panels are dealt as without a cache: they are read from it."""
        plain = mo.MoeLayer.from_safetensors(folder, LAYER)
        with mo.tuning(numa=2, threads=2):
            for decision in ("repacked", "cached"):
                layer = load(folder)
                assert decisions(layer.report) == [decision] * 3
                assert all("dealt to 2" in role.reason for role in layer.report.roles)
                assert same_bits(layer, plain)

    def test_nothing_but_small_tensors_is_read(self, folder, monkeypatch):
        load(folder)
        read = []
        raw = Checkpoint.raw

        def watched(self: Checkpoint, name: str, index: int | None = None) -> np.ndarray:
            read.append(name)
            return raw(self, name, index)

        monkeypatch.setattr(Checkpoint, "raw", watched)
        load(folder)
        assert read and not any("_proj" in name for name in read)


class TestTypes:
    """Experts that are encoded on the way."""

    QUANT = {"gate": "Q4_0", "up": "Q4_0", "down": "Q8_0"}  # noqa: RUF012

    @pytest.mark.parametrize("form", FORMS)
    def test_of_every_form(self, tmp_path, form):
        """Each is what its own values are encoded as, and cached or not it is the same.

        A type that a matrix has already, or can have without loss, is not encoded a second time.
        """
        folder = FORMS[form]().write(tmp_path)
        options = {"quant": self.QUANT}
        plain = mo.ExpertStack.load_from_safetensors(folder, LAYER)
        stacks = [mo.ExpertStack.load_from_safetensors(folder, LAYER, **options)]
        for _ in range(2):
            stacks.append(
                mo.ExpertStack.load_from_safetensors(folder, LAYER, weight_cache=True, **options)
            )
        assert decisions(stacks[0].report) == ["repacked"] * 3
        assert decisions(stacks[2].report) == ["cached"] * 3
        for role, kind in self.QUANT.items():
            values = plain.dequantize(role)
            want = np.stack([mo.quantize(one, kind) for one in values])
            got = stacks[0].encoded(role)
            if plain.kind == "marlin":
                lost = np.abs(values - mo.dequantize(want, kind)).max(axis=(1, 2))
                assert (np.abs(values - mo.dequantize(got, kind)).max(axis=(1, 2)) <= lost).all()
            elif plain.quants[role] == kind:
                np.testing.assert_array_equal(got, plain.encoded(role))
            else:
                np.testing.assert_array_equal(got, want)
        for stack in stacks:
            assert stack.quants == self.QUANT
            for role in self.QUANT:
                np.testing.assert_array_equal(stack.encoded(role), stacks[0].encoded(role))
                mine, others = stack.biases.get(role), plain.biases.get(role)
                np.testing.assert_array_equal(mine, others)
            assert not stack.scales

    def test_of_one_role(self, folder):
        load = mo.ExpertStack.load_from_safetensors
        assert load(folder, LAYER, quant={"down": "Q8_0"}).quants == {
            "gate": "BF16", "up": "BF16", "down": "Q8_0",
        }  # fmt: skip
        assert set(load(folder, LAYER, quant="Q8_0").quants.values()) == {"Q8_0"}
        same = load(folder, LAYER, quant="BF16")
        np.testing.assert_array_equal(same.encoded("up"), load(folder, LAYER).encoded("up"))

    def test_each_choice_has_files_of_its_own(self, folder):
        for quant in (None, "Q8_0", "Q4_0"):
            for decision in ("repacked", "cached"):
                stack = mo.ExpertStack.load_from_safetensors(
                    folder, LAYER, quant=quant, weight_cache=True
                )
                assert decisions(stack.report) == [decision] * 3
        assert len(files_of(folder)) == 9

    def test_pickles_have_them(self, folder):
        stack = mo.ExpertStack.load_from_safetensors(folder, LAYER, quant=self.QUANT)
        again = pickle.loads(pickle.dumps(stack))
        assert again.quants == self.QUANT

    def test_what_is_refused(self, tmp_path, folder):
        load = mo.ExpertStack.load_from_safetensors
        with pytest.raises(mo.ConfigError, match="quant"):
            load(folder, LAYER, quant="Q9_9")
        with pytest.raises(mo.ConfigError, match="quant: expected None beside dequantize"):
            load(folder, LAYER, "f32", quant="Q8_0")
        with pytest.raises(mo.ShapeError, match=r"multiple of 256 \(Q4_K\)"):
            load(folder, LAYER, quant="Q4_K")
        fused = FORMS["fused"]().write(tmp_path / "fused")
        with pytest.raises(mo.UnsupportedError, match="one type for gate and up"):
            load(fused, LAYER, quant={"gate": "Q8_0"})
        int4 = FORMS["AWQ"]().write(tmp_path / "int4")
        with pytest.raises(mo.UnsupportedError, match="a type for every role of INT4"):
            load(int4, LAYER, quant={"gate": "Q8_0", "up": "Q8_0"})


class TestPlaces:
    def test_a_folder_of_ones_own(self, folder, tmp_path):
        load(folder, weight_cache=tmp_path / "new" / "cache")
        assert not (folder / "moesaic.panels").exists()
        assert len(list((tmp_path / "new/cache/model.panels").iterdir())) == 6
        for path in (folder, folder / "model.safetensors"):
            layer = load(path, weight_cache=str(tmp_path / "new/cache"))
            assert decisions(layer.report) == ["cached"] * 3

    def test_a_model_that_moves(self, folder, tmp_path):
        load(folder)
        moved = shutil.move(folder, tmp_path / "there")
        assert decisions(load(moved).report) == ["cached"] * 3

    def test_a_snapshot_of_the_hub(self, tmp_path):
        revision = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
        revision.mkdir(parents=True)
        floats("f4").write(revision)
        for decision in ("repacked", "cached"):
            layer = load(tmp_path / "models--org--name")
            assert decisions(layer.report) == [decision] * 3
        assert len(files_of(revision)) == 3

    def test_pickles_go_there_too(self, folder, tmp_path):
        layer = load(folder, weight_cache=tmp_path / "cache")
        again = pickle.loads(pickle.dumps(layer))
        assert decisions(again.report) == ["cached"] * 3
        assert same_bits(again, layer)

    def test_that_cannot_be_made(self, folder, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError, match=r"model\.panels"):
            load(folder, weight_cache=tmp_path / "file")


class TestWhatIsNotTaken:
    @pytest.mark.parametrize("change", ["time", "bytes of the same time", "configuration", "types"])
    def test_files_of_another_model(self, tmp_path, change):
        folder = fp8((48, 32)).write(tmp_path)
        file = folder / "model.safetensors"
        before = load(folder)
        then = file.stat()
        if change == "time":
            os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns + 1))
        elif change == "types":
            floats("BF16").write(folder)
        elif change == "configuration":
            config = json.loads((folder / "config.json").read_text())
            config["quantization_config"]["weight_block_size"] = [45, 32]  # as many blocks
            (folder / "config.json").write_text(json.dumps(config))
        else:
            written = fp8((48, 32))
            for name, dtype in written.types.items():
                assert dtype == "F8_E4M3"
                written.tensors[name] = written.tensors[name] ^ 0x80
            written.write(folder)
            os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
            assert file.stat().st_size == then.st_size
        anew = load(folder)
        assert decisions(anew.report) == ["repacked"] * 3
        assert all("it is of another" in role.reason for role in anew.report.roles)
        plain = mo.MoeLayer.from_safetensors(folder, LAYER)
        assert same_bits(anew, plain)
        assert change == "time" or not same_bits(anew, before)
        assert len(files_of(folder)) == 3  # in the place of the old ones

    def test_damaged_files_are_made_anew(self, folder):
        plain = load(folder)
        for file in files_of(folder):
            data = file.read_bytes()
            file.unlink()
            file.write_bytes(data[:-1])
        anew = load(folder)
        assert decisions(anew.report) == ["repacked"] * 3
        assert same_bits(anew, plain)
        assert decisions(load(folder).report) == ["cached"] * 3

    def test_one_role_of_a_tensor_of_two(self, tmp_path):
        """Where one of both is missing, the tensor is read for it."""
        folder = FORMS["gpt-oss"]().write(tmp_path)
        plain = load(folder)
        gate = next(file for file in files_of(folder) if ".gate-" in file.name)
        gate.unlink()
        anew = load(folder)
        assert decisions(anew.report) == ["repacked", "cached", "cached"]
        assert same_bits(anew, plain)


class TestRefused:
    def test_arguments(self, folder):
        with pytest.raises(mo.ConfigError, match=r"weight_cache: .*got dequantize"):
            load(folder, dequantize="f32")
        with pytest.raises(mo.DTypeError, match="weight_cache: expected True, False, or a path"):
            load(folder, weight_cache=3)
        assert not (folder / "moesaic.panels").exists()

    def test_progress_that_says_no(self, folder):
        with pytest.raises(mo.OperationCancelled):
            load(folder, progress=lambda done: done.what != "repack")
        assert all(not file.name.endswith(".tmp") for file in files_of(folder))

    def test_rows_of_a_role_that_is_there(self):
        spec = ("F32", "", "", "")
        builder = mo._core.StackBuilder(1, 4, 3, gate=None, up=spec, down=spec)
        with pytest.raises(mo.ShapeError, match="expected 48 bytes, got 0"):
            builder.add("up", 0, None)


def test_the_command_reads_them_all(folder, capsys):
    load(folder)
    assert main(["cache", str(folder / "moesaic.panels")]) == 0
    assert "6 files" in capsys.readouterr().out
    damaged = files_of(folder)[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.unlink()
    damaged.write_bytes(data)
    assert main(["cache", str(folder / "moesaic.panels")]) == 1


BOTH = """
import sys, time
import numpy as np, moesaic as mo
time.sleep(max(0, float(sys.argv[2]) - time.time()))
layer = mo.MoeLayer.from_safetensors(sys.argv[1], 1, weight_cache=True)
print(layer(np.ones((4, layer.config.hidden_size), np.float32)).tobytes().hex())
"""


def test_processes_at_once(folder):
    import time

    command = [sys.executable, "-c", BOTH, str(folder), str(time.time() + 1)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 3
    assert len(said) == 1
    assert len(files_of(folder)) == 6

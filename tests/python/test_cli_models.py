"""The commands on every kind of model: GGUF files, checkpoint folders, layers with more inputs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from files import write_checkpoint
from values import expert_weights, normal

import moesaic as mo
from moesaic.cli import COMMANDS, fit, main
from moesaic.cli.completion import commands
from moesaic.cli.models import open_model
from moesaic.cli.table import pairs, table

E, K, H, I = 4, 2, 64, 32
LAYERS = (1, 3)


def per_expert(*roles: np.ndarray, base: str) -> dict[str, np.ndarray]:
    names = ("gate_proj", "up_proj", "down_proj")
    return {
        f"{base}.{e}.{name}.weight": matrix
        for name, matrices in zip(names, roles, strict=True)
        for e, matrix in enumerate(matrices)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of five blocks, two of them with experts."""
    tensors = {}
    for layer in LAYERS:
        base = f"model.layers.{layer}.mlp"
        tensors |= per_expert(*expert_weights(E, H, I, seed=layer), base=f"{base}.experts")
        tensors[f"{base}.gate.weight"] = normal(E, H, seed=layer)
    config = {
        "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I,
        "intermediate_size": 2 * I, "num_experts": E, "num_experts_per_tok": K,
        "num_hidden_layers": 5, "norm_topk_prob": True, "mlp_only_layers": [0, 2, 4],
        "decoder_sparse_step": 1,
    }  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tensors, config)


@pytest.fixture(scope="module")
def cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the hub's cache has it."""
    root = tmp_path_factory.mktemp("hub") / "models--org--name"
    shutil.copytree(folder, root / "snapshots" / "abc123")
    (root / "snapshots" / "older").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc123")
    return root


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    mo.testing.write_moe_gguf(path, num_experts=E, top_k=K, layers=2)
    return path


@pytest.fixture
def of_json(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object, status: int = 0):
        assert main([*map(str, arguments), "--json"]) == status
        return json.loads(capsys.readouterr().out)

    return run


def test_a_folder_of_the_hubs_cache_opens(folder: Path, cache: Path) -> None:
    x = normal(2, H)
    for place in (cache, cache / "snapshots" / "abc123"):
        load = mo.MoeLayer.from_safetensors
        with load(place, 1) as a, load(folder, 1) as b:
            np.testing.assert_array_equal(a(x), b(x))
        assert mo.MoeConfig.from_hf(place, 1).num_experts == E
    other = cache / "snapshots" / "older"
    with pytest.raises(FileNotFoundError):
        mo.MoeLayer.from_safetensors(other, 1)


def test_a_cache_without_its_main_revision(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c" / "refs" / "main").unlink()
    with pytest.raises(OSError, match="2 snapshots"):
        mo.MoeLayer.from_safetensors(tmp_path / "c", 1)
    (tmp_path / "c" / "snapshots" / "older").rmdir()
    mo.MoeLayer.from_safetensors(tmp_path / "c", 1).close()


def test_layers_of_a_folder(folder: Path, cache: Path, of_json) -> None:
    for place in (folder, cache, folder / "model.safetensors"):
        found = of_json("layers", place)
        assert found["layers"] == list(LAYERS)
        rows = [t for t in found["tensors"] if t["layer"] == 1]
        assert {(t["name"], tuple(t["shape"]), t["type"], t["count"]) for t in rows} == {
            ("mlp.gate.weight", (E, H), "F32", 1),
            ("mlp.experts.*.gate_proj.weight", (I, H), "F32", E),
            ("mlp.experts.*.up_proj.weight", (I, H), "F32", E),
            ("mlp.experts.*.down_proj.weight", (H, I), "F32", E),
        }
        assert sum(t["nbytes"] for t in rows) == 4 * (E * H + 3 * E * H * I)


def test_a_folder_with_one_gguf_file(gguf_path: Path, of_json) -> None:
    assert of_json("layers", gguf_path.parent)["layers"] == [0, 1]


@pytest.mark.parametrize("command", ["layers", "explain", "demo", "trace", "fit"])
def test_layers_have_the_numbers_of_their_blocks(folder: Path, capsys, command: str) -> None:
    if command in ("explain", "demo"):
        assert main([command, str(folder), "--layer", "3"]) == 0
        assert "layer 3" in capsys.readouterr().out
        arguments = [command, str(folder), "--layer", "2"]
    elif command == "layers":
        assert main([command, str(folder)]) == 0
        assert "\n1 " in capsys.readouterr().out
        return
    else:
        assert main([command, str(folder), "--layers", "3", "--tokens", "4"]) == 0
        assert "\n3" in capsys.readouterr().out
        arguments = [command, str(folder), "--layers", "1,2"]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "(1, 3), got 2" in err and len(err.splitlines()) == 1


def test_explain_json(folder: Path, of_json) -> None:
    found = of_json("explain", folder, "--tokens", "1,8")
    assert found["layer"] == 1 and found["num_experts"] == E
    assert [role["role"] for role in found["roles"]] == ["gate", "up", "down"]
    assert [call["tokens"] for call in found["calls"]] == [1, 8]


def test_demo_json(folder: Path, of_json) -> None:
    found = of_json("demo", folder)
    assert found["results"] and all(result["good"] for result in found["results"])
    assert {result["tokens"] for result in found["results"]} == {1, 64}


def test_trace_of_a_folder_is_that_of_a_store(tmp_path: Path, of_json) -> None:
    """The same weights as a GGUF file, whose experts really move, give the same figures."""
    gguf = pytest.importorskip("gguf")
    sizes = {"num_experts": E, "top_k": K, "hidden": 256, "intermediate": 256}
    kinds = dict.fromkeys(("gate_type", "up_type", "down_type"), "F32")
    path = tmp_path / "same.gguf"
    mo.testing.write_moe_gguf(path, **sizes, **kinds)
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}
    base = "model.layers.0.mlp"
    roles = [tensors[f"blk.0.ffn_{role}_exps.weight"] for role in ("gate", "up", "down")]
    of_folder = per_expert(*roles, base=f"{base}.experts")
    of_folder[f"{base}.gate.weight"] = tensors["blk.0.ffn_gate_inp.weight"]
    config = {
        "model_type": "qwen3_moe", "hidden_size": 256, "moe_intermediate_size": 256,
        "intermediate_size": 256, "num_experts": E, "num_experts_per_tok": K,
        "num_hidden_layers": 1, "norm_topk_prob": True,
    }  # fmt: skip
    (tmp_path / "folder").mkdir()
    write_checkpoint(tmp_path / "folder", of_folder, config)
    for more in ([], ["--on-miss", "compute"], ["--budget", "3", "--batch", "4"]):
        one = of_json("trace", path, "--tokens", "32", *more)["layers"]
        limited = ["--memory-limit", "0.05"]  # of GiB: experts of the folder move too
        for way in ([], limited):
            arguments = ["trace", tmp_path / "folder", "--tokens", "32", *more, *way]
            assert of_json(*arguments)["layers"] == one


def test_a_limit_on_what_no_store_reads(tmp_path: Path, capsys) -> None:
    tensors = per_expert(*expert_weights(E, H, I), base="model.layers.0.mlp.experts")
    tensors = {name: values.astype(np.float64) for name, values in tensors.items()}
    tensors["model.layers.0.mlp.gate.weight"] = normal(E, H)
    config = {
        "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I,
        "num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": True,
    }  # fmt: skip
    write_checkpoint(tmp_path, tensors, config)
    assert main(["trace", str(tmp_path), "--tokens", "4"]) == 0
    capsys.readouterr()
    for arguments in (["trace", "--memory-limit", "1"], ["simulate-offload", "--memory", "1G"]):
        assert main([arguments[0], str(tmp_path), *arguments[1:]]) == 2
        err = capsys.readouterr().err
        assert "F64" in err and "moesaic convert" in err


def test_simulate_offload_of_a_folder(folder: Path, of_json, capsys) -> None:
    """Hit rates are those of layers that run, and bytes those of the folder's files."""
    common = ["--memory", "200KiB,16MiB", "--steps", "20", "--seeds", "1", "--max-tokens", "4"]
    found = of_json("simulate-offload", folder, *common, "--disk", "2GB/s", "--measure")
    tight, roomy = found["memory"]
    assert 0 < tight["budget"] < roomy["budget"] == E
    assert tight["hit_rate"] < roomy["hit_rate"]
    for row in found["memory"]:
        assert row["hit_rate"] == row["measured_hit_rate"]
        assert row["measured_tokens_per_second"] > 0
    costs = found["costs"]
    assert costs["stored_bytes"] == costs["expert_bytes"] == 4 * 3 * H * I
    assert main(["simulate-offload", str(folder), *common, "--disk", "2GB/s"]) == 0
    out = capsys.readouterr().out
    assert f"2 layers with {E} experts, top {K}" in out and "200.0 KiB" in out


def test_trace_saves_what_it_found(folder: Path, tmp_path: Path, capsys) -> None:
    out = {name: str(tmp_path / name) for name in ("profile.npz", "trace.npz")}
    arguments = ["--save", out["profile.npz"], "--save-trace", out["trace.npz"], "--tokens", "8"]
    assert main(["trace", str(folder), *arguments]) == 0
    profile = mo.ExpertProfile.load(out["profile.npz"])
    assert profile.layer_indices.tolist() == list(LAYERS)
    assert profile.counts.sum(axis=1).tolist() == [8 * K] * 2
    capsys.readouterr()
    assert main(["simulate-offload", "--trace", out["trace.npz"], "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["budget"] == 0 and isinstance(first["tokens/s"], float)
    assert 0 <= first["hit rate"] <= 1


@pytest.mark.parametrize("content", ["archive", "text", "words"])
def test_trace_refuses_other_input(gguf_path: Path, tmp_path: Path, capsys, content) -> None:
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        if content == "archive":
            np.savez(file, x=np.zeros(3))
        elif content == "words":
            np.save(file, np.array([["a"]]))
        else:
            file.write(b"no array")
    assert main(["trace", str(gguf_path), "--input", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moesaic trace: {path}: expected") and error.count("\n") == 1


def test_trace_refuses_a_picture_of_no_format_before_any_work(gguf_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        main(["trace", str(gguf_path), "--plot", "heat.xyz"])
    assert "--plot: expected one that ends in .png" in capsys.readouterr().err


# --- fit --------------------------------------------------------------------------------------


def test_fit_tells_what_a_load_takes(gguf_path: Path, of_json) -> None:
    found = of_json("fit", gguf_path, "--memory", "1GiB", "--tokens", "64")
    (kind,) = found["kinds"]
    assert kind["layers"] == [0, 1] and kind["exact"]
    with mo.MoeLayer.from_gguf(gguf_path, 0) as layer:
        assert kind["repacked"] == layer.stack.nbytes
        workspace = mo.Workspace.for_layer(layer, 64).nbytes
    with mo.MoeLayer.from_gguf(gguf_path, 0, layout="file") as layer:
        assert kind["stored"] == layer.stack.nbytes
        router = layer.memory()["router"]
    assert router <= kind["other"] < router + 4096
    assert 0.9 * workspace < kind["workspace"] < 1.3 * workspace
    assert found["layout"] == "auto" and found["left"] > 0


def test_fit_of_a_folder(folder: Path, of_json) -> None:
    found = of_json("fit", folder, "--memory", "1G")
    (kind,) = found["kinds"]
    with mo.MoeLayer.from_safetensors(folder, 1) as layer:
        assert kind["repacked"] == layer.stack.nbytes
    assert (kind["layers"], kind["types"]) == (list(LAYERS), "F32 F32 F32")


def test_fit_verdicts(gguf_path: Path, of_json) -> None:
    kind = fit.Kind(8, 2, "Q4_K Q4_K Q6_K", 800, 1600, 10, 100, True)
    kinds = {kind: [0, 1]}
    for memory, layout in [(3320, "auto"), (3319, "file"), (1720, "file"), (1719, "pools")]:
        assert fit.verdict(kinds, memory)["layout"] == layout, memory
    assert fit.verdict(kinds, 120 + 2 * 3 * 100)["budget"] == 3
    assert fit.verdict(kinds, 120)["layout"] == "none"
    assert of_json("fit", gguf_path, "--memory", "1K", status=1)["layout"] == "none"
    assert fit.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_fit_reads_no_weights(gguf_path: Path, tmp_path: Path, of_json) -> None:
    """A file whose weights are a hole of the file system, of a size that nobody could read."""
    with mo.GgufFile(gguf_path) as f:
        first = min(t.offset for t in f.tensors.values())
    hollow = tmp_path / "hollow.gguf"
    hollow.write_bytes(gguf_path.read_bytes()[:first])
    with hollow.open("r+b") as file:
        file.truncate(gguf_path.stat().st_size)
    want = of_json("fit", gguf_path, "--memory", "1G")
    assert of_json("fit", hollow, "--memory", "1G")["kinds"] == want["kinds"]


# --- bad values -------------------------------------------------------------------------------

BAD = {
    "trace": [
        ["--tokens", "0"], ["--batch", "-1"], ["--seed", "-1"], ["--budget", "-1"],
        ["--decay", "2"], ["--decay", "nan"], ["--memory-limit", "0"], ["--layers", "a"],
        ["--save", "/nowhere/a.npz"], ["--ranking", "most"],
    ],
    "explain": [["--tokens", "1,"], ["--layer", "-1"], ["--layer", "x"]],
    "demo": [["--layer", "1.5"]],
    "fit": [["--memory", "64 apples"], ["--memory", "0"], ["--tokens", "0"]],
    "bench": [
        ["--tokens", "0"], ["--threads", "x"], ["--rounds", "0"], ["--seconds", "0"],
        ["--precision", "best"], ["--gate-up-type", "q4_k"], ["--json", "/nowhere/r.json"],
    ],
    "simulate-offload": [
        ["--experts", "0"], ["--fast", "0"], ["--warm", "1"], ["--expert-mib", "inf"],
        ["--policies", "best"], ["--top-k", "-1"],
    ],
    "completion": [["csh"]],
    "generate": [
        ["a", "--max-tokens", "0"], ["a", "--temperature", "-1"], ["a", "--top-p", "2"],
        ["a", "--dtype", "f64"], ["a", "--usage", "/nowhere/a.npz"], [],
    ],
}  # fmt: skip
NO_FILE = ("bench", "simulate-offload", "completion")


@pytest.mark.parametrize(("command", "bad"), [(c, b) for c, many in BAD.items() for b in many])
def test_bad_values_are_refused_before_any_work(command, bad, monkeypatch, capsys) -> None:
    def work(*_, **__):
        raise AssertionError("work has started")

    for name in ("GgufFile", "MoeExpertStore", "ExpertPool"):
        monkeypatch.setattr(mo, name, work)
    arguments = [command, *([] if command in NO_FILE else ["model.gguf"]), *bad]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert f"moesaic {command}: error: " in capsys.readouterr().err


LATER = [
    ("bench", ["--peers", "abacus"],
     "--peers: expected installed, none or some of ", "got 'abacus'"),
    ("simulate-offload", ["--experts", "4", "--top-k", "8"],
     "--top-k: expected at most --experts, 4, got 8", ""),
    ("simulate-offload", ["--budgets", "1/0"], "--budgets: expected 0 to 128 experts", "got '1/0'"),
    ("layers", ["{folder}"], "{folder}: expected one model, got ", "a.gguf, b.gguf"),
    ("explain", ["{file}", "--layer", "7"], "layer: expected one with experts (0, 1), got 7", ""),
    ("trace", ["{file}", "--input", "{text}"], "{text}: expected an .npy file, got ", ""),
    ("trace", ["{file}", "--input", "{array}"], "{array}: expected [tokens, 256], got [3]", ""),
]  # fmt: skip


@pytest.mark.parametrize(("command", "options", "begin", "end"), LATER)
def test_what_is_wrong_with_a_file_or_together_is_one_line(
    command, options, begin, end, gguf_path, tmp_path, capsys
) -> None:
    """The name of the command once, then the parts of the error."""
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    places = {"folder": folder, "file": gguf_path, "text": tmp_path / "t", "array": tmp_path / "a"}
    places["text"].write_text("0.5 0.25")
    with places["array"].open("wb") as file:
        np.save(file, np.zeros(3, np.float32))
    assert main([command, *(option.format(**places) for option in options)]) == 2
    error = capsys.readouterr().err
    where = "open: " if command in ("layers", "explain") else ""
    assert error.startswith(f"moesaic {command}: {where}{begin.format(**places)}"), error
    assert end in error and error.count("\n") == 1


# --- tables and completion --------------------------------------------------------------------


def test_tables_heed_the_width() -> None:
    rows = [["a", "words that take some room", "1234567"], ["b", "few", "89"]]
    header = ("name", "what it is", "bytes")
    for width in (26, 30, 40):
        text = table(header, rows, left=("what it is",), width=width)
        assert max(map(len, text.splitlines())) <= width
        assert "1234567" in text and "room" in text
    narrow = table(header, rows, left=("what it is",), width=12)
    assert "bytes" in narrow and "1234567" in narrow and "---" not in narrow
    assert table(header, rows, width=200) == table(header, rows)
    text = pairs([("name", "one two three four five six seven eight")], width=40)
    assert max(map(len, text.splitlines())) <= 40 and text.split() == [
        "name", "one", "two", "three", "four", "five", "six", "seven", "eight"
    ]  # fmt: skip


def test_columns_sets_the_width(gguf_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["layers", str(gguf_path)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines()[1:])) <= 50


def test_completion_knows_every_command_and_option(capsys) -> None:
    found = {command.name: command for command in commands()}
    assert set(found) == set(COMMANDS)
    assert {"--json", "--tokens", "--memory"} <= {o.name for o in found["fit"].options}
    assert found["completion"].words == ["bash", "zsh", "fish"]
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for command in found.values():
            assert command.name in script
            for option in command.options:
                assert option.name.lstrip("-") in script
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("moesaic exp", ["explain"]),
        ("moesaic trace f --rank", ["--ranking"]),
        ("moesaic trace f --ranking h", ["hits"]),
        ("moesaic completion z", ["zsh"]),
    ],
)
def test_completion_in_bash(line: str, want: list[str], tmp_path: Path) -> None:
    words = line.split(" ")
    code = f"""
eval "$({sys.executable} -m moesaic completion bash)"
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
_moesaic; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == want


def test_every_command_has_json() -> None:
    without = {c.name for c in commands() if not any(o.name == "--json" for o in c.options)}
    assert without == {"completion"}


def test_models_say_what_they_lack(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.layers.0.mlp.up_proj.weight": normal(4, 4)}, {})
    with pytest.raises(mo.FormatError, match=r"layers\.N\.mlp\.experts"), open_model(str(tmp_path)):
        pass

"""The command line: exit status, what goes where, and that a broken bound fails the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moesaic as mo
from moesaic.cli import demo, main
from moesaic.cli.table import size, table


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "small.gguf"
    mo.testing.write_moe_gguf(
        path,
        num_experts=4,
        top_k=2,
        hidden=256,
        intermediate=256,
        layers=2,
        gate_type="Q4_K",
        up_type="Q4_K",
        down_type="Q6_K",
        seed=3,
    )
    return path


@pytest.fixture(scope="module")
def plain_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("cli") / "plain.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def module(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moesaic", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_demo_on_a_file(gguf_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(gguf_path), "--layer", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("reference", "one token at a time", "layer 1", "rel. error", "GB/s"):
        assert word in out
    for way in ("bucketed", "aligned"):
        for row_space in ("token_pairs", "packed_rows"):
            assert f"{way}, {row_space}" in out
    assert "Pairs per expert, 64 tokens x top_k 2" in out


def test_demo_without_a_file_has_the_documented_shape(monkeypatch, capsys) -> None:
    asked: dict[str, object] = {}
    write = mo.testing.write_moe_gguf

    def small(path: Path, **sizes: object) -> None:
        asked.update(sizes)
        write(path, **{**sizes, "hidden": 256, "intermediate": 256})

    monkeypatch.setattr(mo.testing, "write_moe_gguf", small)
    assert main(["demo"]) == 0
    assert (asked["num_experts"], asked["top_k"]) == (32, 8)
    assert (asked["gate_type"], asked["up_type"], asked["down_type"]) == ("Q4_K", "Q4_K", "Q6_K")
    assert "E 32, top_k 8" in capsys.readouterr().out


def test_demo_fails_when_a_result_is_wrong(gguf_path: Path, monkeypatch, capsys) -> None:
    def wrong(x, layer, out, workspace):
        out[:] = 1.0

    ways = (*demo.WAYS, demo.Way("broken", wrong, {}))
    monkeypatch.setattr(demo, "WAYS", ways)
    assert main(["demo", str(gguf_path)]) == 1
    assert " > 2e-02" in capsys.readouterr().out


def test_demo_fails_on_nan() -> None:
    nan = demo.Result("x", 1, 1.0, 1.0, float("nan"), 1e-2, "k")
    assert not nan.good


def test_info(capsys) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (mo.__version__, "cpu", "cuda", "metal", "absent", "MOESAIC_CPU_ISA", "qwen3moe"):
        assert word in out


def test_info_json(capsys) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == mo.__version__
    backends = {b["name"]: b for b in facts["backends"]}
    assert backends["cpu"]["available"]
    assert backends["cpu"]["kernels"]
    for name in ("cuda", "metal"):
        assert backends[name]["available"] != bool(backends[name]["reason"])
    assert {"knob", "variable", "value", "source", "help"} == set(facts["config"][0])


def test_gguf(gguf_path: Path, capsys) -> None:
    assert main(["gguf", str(gguf_path)]) == 0
    out = capsys.readouterr().out
    assert "2 MoE layers" in out
    for word in ("ffn_gate_exps.weight", "ffn_down_exps.weight", "Q4_K", "Q6_K", "4 x 256 x 256"):
        assert word in out
    assert out.count("sum") == 2
    gate = mo.GgufFile(gguf_path).tensors["blk.0.ffn_gate_exps.weight"].nbytes
    assert size(gate) in out


@pytest.mark.parametrize("command", ["gguf", "demo", "explain"])
def test_a_file_without_experts_is_one_line(plain_gguf: Path, command: str) -> None:
    done = module(command, plain_gguf)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "expert" in done.stderr


@pytest.mark.parametrize("command", ["gguf", "demo", "explain"])
def test_a_missing_or_malformed_file_is_one_line(tmp_path: Path, command: str) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\x00\x00\x00")
    for path in (tmp_path / "missing.gguf", bad):
        done = module(command, path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"moesaic {command}: ")
        assert path.name in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_missing_file_reads_like_other_tools(tmp_path: Path, capsys) -> None:
    path = tmp_path / "missing.gguf"
    assert main(["gguf", str(path)]) == 2
    assert capsys.readouterr().err == f"moesaic gguf: {path}: No such file or directory\n"


def test_bench_refuses_a_file_that_is_no_result(tmp_path: Path, capsys) -> None:
    path = tmp_path / "result.json"
    for text in ("no json", "[]", '{"results": [1]}'):
        path.write_text(text)
        assert main(["bench", "--compare", str(path)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("moesaic bench: ")
        assert "result.json" in err


def test_warnings_go_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_TREADS", "1")
    done = module("info")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "moesaic: unknown environment variable MOESAIC_TREADS (nearest: MOESAIC_THREADS)"
    ]


def test_explain(gguf_path: Path, capsys) -> None:
    assert main(["explain", str(gguf_path), "--layer", "1", "--tokens", "1,64"]) == 0
    out = capsys.readouterr().out
    assert "layer 1" in out
    assert "\n1 token\n" in out
    assert "\n64 tokens\n" in out
    assert "path" in out


def test_explain_names_the_layers_there_are(gguf_path: Path, capsys) -> None:
    assert main(["explain", str(gguf_path), "--layer", "7"]) == 2
    assert "0, 1" in capsys.readouterr().err


def test_bad_arguments(capsys) -> None:
    for arguments in ([], ["nonsense"], ["explain", "f", "--tokens", "a"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_version_and_help(capsys) -> None:
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as stop:
            main([flag])
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert mo.__version__ in out
    assert "explain" in out


def test_python_m_moesaic() -> None:
    done = module("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"moesaic {mo.__version__}")


def test_table_and_size() -> None:
    text = table(("name", "n"), [["a", "1"], ["bcd", "10"]])
    assert text.splitlines() == ["name   n", "----  --", "a      1", "bcd   10"]
    assert [size(n) for n in (0, 1023, 1024, 3 << 20)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB"]

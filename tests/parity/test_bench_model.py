"""moesaic bench --model: every engine runs, the same model in each."""

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from whole import distance, logits_of

import moesaic.transformers as mt
from moesaic.bench import whole_models
from moesaic.bench.whole_file import WholeShape, write_whole_gguf
from moesaic.cli import main

TINY = WholeShape(
    layers=2, hidden=256, intermediate=256, num_experts=8, top_k=2, heads=4, key_heads=2,
    head_width=64, words=128, context=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.gguf"
    write_whole_gguf(path, TINY)
    return path


class Llama:
    """llama-cpp-python, which compiles for half an hour, as far as it is called."""

    made: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        Llama.made = options
        self.tokens: list[int] = []

    def reset(self) -> None:
        self.tokens.clear()

    def eval(self, tokens: list[int]) -> None:
        self.tokens += tokens
        assert len(self.tokens) < Llama.made["n_ctx"]


def test_every_engine(file, tmp_path, monkeypatch, capsys):
    module = types.ModuleType("llama_cpp")
    module.Llama = Llama
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    arguments = ["--tokens", "40", "--rounds", "3", "--threads", "1", "--json", str(tmp_path)]
    assert main(["bench", "--model", str(file), *arguments, "--markdown"]) == 0
    names = [
        "torch bf16, eager", "torch bf16, grouped_mm", "llama.cpp", "experts here",
        "experts and matrices here",
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert all(name in out for name in names) and "| --- | --: |" in out
    (saved,) = tmp_path.glob("*.json")
    result = json.loads(saved.read_text())
    assert [row["engine"] for row in result["engines"]] == names
    for row in result["engines"]:
        for low, median, high in (row["decode_ms"], row["prefill_ms"]):
            assert 0 <= low <= median <= high
    assert result["model"] == "model.gguf" and result["layers"] == 2 and not result["absent"]
    assert result["types"] == {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K", "matrices": "Q4_K"}
    assert Llama.made["n_threads"] == Llama.made["n_threads_batch"] == 1
    assert Llama.made["model_path"] == str(file)
    torch_s, _, _, ours, kept = (row["mib"] for row in result["engines"])
    assert torch_s > ours > kept > 0


def test_ours_alone_and_one_that_is_absent(file, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    arguments = ["bench", "--model", str(file), "--tokens", "8", "--rounds", "1", "--json", "-"]
    assert main([*arguments, "--peers", "llama.cpp"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert [row["engine"] for row in result["engines"]] == [
        "experts here", "experts and matrices here",
    ]  # fmt: skip
    assert "pip install llama-cpp-python" in result["absent"]["llama.cpp"]
    assert "absent: llama.cpp" in err


def test_one_that_is_made_for_this(monkeypatch, capfd):
    from moesaic.bench import whole_file

    monkeypatch.setattr(whole_file, "WholeShape", lambda **changes: TINY)
    arguments = ["--tokens", "8", "--rounds", "1", "--peers", "none", "--json", "-"]
    assert main(["bench", "--model", *arguments]) == 0
    assert json.loads(capfd.readouterr().out)["model"] == whole_file.NAME


def test_its_words_are_those_of_every_byte(tmp_path):
    path = tmp_path / "model.gguf"
    write_whole_gguf(path, dataclasses.replace(TINY, words=300))
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "abba, \n\u00e9!"
    assert words.decode(words(text)["input_ids"]) == text
    assert words.eos_token == "<|endoftext|>" and len(words) == 300


def test_engines_run_one_model(file):
    """Up to the rounding of bf16, which chooses other experts for some tokens."""
    torch.manual_seed(0)
    ours = mt.from_gguf(file, torch.bfloat16, config=TINY.config())
    plain = whole_models.in_torch(ours)
    plain.set_experts_implementation("eager")
    ids = torch.randint(0, TINY.words, (2, 16))
    assert distance(logits_of(ours, ids), logits_of(plain, ids)) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--busy"], "--busy: expected none beside --model"),
        (["--shape", "olmoe"], "--shape: expected none beside --model"),
        (["--layers", "2"], "--layers: expected none beside a file"),
        (["--tokens", "1,2"], "--tokens: expected one number"),
        (["--peers", "ggml"], "--peers: expected installed, none or some of torch-eager"),
    ],
)
def test_options_that_do_not_fit(arguments, message, file, capsys):
    assert main(["bench", "--model", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_packages_that_are_missing(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--model"]) == 2
    assert "pip install 'moesaic[transformers]'" in capsys.readouterr().err


def test_a_folder(tmp_path, capsys):
    TINY.config().save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("moesaic bench: ")


def test_layers_take_no_option_of_models(capsys):
    assert main(["bench", "--layers", "2"]) == 2
    assert "--layers: expected --model beside it" in capsys.readouterr().err

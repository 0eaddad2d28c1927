"""moesaic generate: whole models, with tokenizers of their own, from the command line."""

import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
import transformers
from models import MODELS, Model
from whole import make_model
from whole_gguf import write

import moesaic as mo
import moesaic.transformers as mt
from moesaic.cli import main

PROMPT = "an apple"
#: Printable bytes are their own letters in the alphabet of GPT-2.
LETTERS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
WORDS = [*LETTERS, "an", "<end>"]
MERGES = ["a n"]


def small() -> Any:
    case = next(case for case in MODELS if case.name == "qwen3_moe")
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 32}
    return make_model(Model(case.name, case.config, {**case.changes, **wide, "vocab_size": 258}))


def tokenizer() -> Any:
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(WORDS)}, [("a", "n")])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its tokenizer."""
    place = tmp_path_factory.mktemp("model")
    small().save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF file, its matrices encoded."""
    place = tmp_path_factory.mktemp("gguf") / "model.gguf"

    def words(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(WORDS)
        writer.add_token_types([1] * (len(WORDS) - 1) + [3])
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(len(WORDS) - 1)

    write(place, "qwen3moe", small(), {"_exps.weight": "Q8_0"}, keys=words)
    return place


def said(model: Any, tokens: int) -> str:
    """What the model goes on with."""
    words = tokenizer()
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=257)
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_checkpoint(folder, capsys):
    assert main(["generate", str(folder), PROMPT, "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=mt.MoesaicConfig()
    )
    assert out == said(model, 12) + "\n"
    lines = dict(line.split("  ", 1) for line in err.splitlines())
    assert set(lines) == {"load", "prompt", "text", "experts"}
    assert "tokens/s" in lines["prompt"] and "tokens/s" in lines["text"]
    assert "3 layers of" in lines["experts"]


def test_a_gguf_file(file, capsys):
    assert main(["generate", str(file), PROMPT, "--max-tokens", "12", "--dtype", "f32"]) == 0
    assert capsys.readouterr().out == said(mt.from_gguf(file, dtype=torch.float32), 12) + "\n"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_limit_on_memory(kind, request, capsys):
    arguments = ["generate", str(request.getfixturevalue(kind)), PROMPT, "--max-tokens", "8"]
    assert main(arguments) == 0
    want, err = capsys.readouterr()
    assert "memory" not in err
    arguments += ["--memory", {"file": "3MiB", "folder": "9MiB"}[kind]]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == want
    (line,) = [line for line in err.splitlines() if line.startswith("memory")]
    assert re.search(r"of \d+ experts a layer, \d+\.\d% of .* was there; .*iB read", line)
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    assert 0 < found["fewest"] <= found["most"] < found["num_experts"]
    assert 0 < found["hit_rate"] < 1 and found["read_bytes"] > 0


def test_weights_that_are_kept(file, tmp_path, capsys):
    arguments = ["generate", str(file), PROMPT, "--max-tokens", "8"]
    assert main(arguments) == 0
    want = capsys.readouterr().out
    for _ in range(2):
        assert main([*arguments, "--weight-cache", str(tmp_path)]) == 0
        assert capsys.readouterr().out == want
    kept = list((tmp_path / f"{file.name}.panels").iterdir())
    assert len(kept) == 9  # three roles of three layers


def test_experts_of_a_checkpoint_that_are_kept(folder, tmp_path, capsys):
    types = ["--gate-up-type", "Q4_K", "--down-type", "Q6_K"]
    for options in ([], types):
        arguments = ["generate", str(folder), PROMPT, "--max-tokens", "8", *options]
        assert main(arguments) == 0
        want = capsys.readouterr().out
        for _ in range(2):
            assert main([*arguments, "--weight-cache", str(tmp_path)]) == 0
            assert capsys.readouterr().out == want
    kept = list((tmp_path / f"{folder.name}.panels").iterdir())
    assert len(kept) == 18  # three roles of three layers, as they are and encoded


def test_json_and_the_use_of_experts(file, tmp_path, capsys):
    path = tmp_path / "usage.npz"
    arguments = ["generate", str(file), PROMPT, "--max-tokens", "5", "--usage", str(path)]
    assert main([*arguments, "--json", "--dense", "f32"]) == 0
    found = json.loads(capsys.readouterr().out)
    prompt = len(tokenizer()(PROMPT)["input_ids"])
    assert found["prompt"]["tokens"] == prompt
    assert found["new"]["tokens"] <= 5 and found["text"] is not None
    assert found["memory"] is None
    # The last token goes nowhere.
    pairs = (prompt + found["new"]["tokens"] - 1) * 3
    assert [one["pairs"] for one in found["layers"]] == [pairs] * 3
    assert mo.ExpertProfile.load(path).counts.sum(axis=1).tolist() == [pairs] * 3


def test_encoded_on_the_way(folder, capsys):
    types = ["--gate-up-type", "Q4_K", "--down-type", "Q6_K"]
    assert main(["generate", str(folder), PROMPT, "--max-tokens", "8", *types]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=mt.MoesaicConfig(gate_up="Q4_K", down="Q6_K")
    )
    assert capsys.readouterr().out == said(model, 8) + "\n"


def test_sampling_by_seed(file, capsys):
    def text(seed: int) -> str:
        arguments = ["--temperature", "3", "--seed", str(seed), "--max-tokens", "16"]
        assert main(["generate", str(file), PROMPT, *arguments]) == 0
        return capsys.readouterr().out

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_message(folder, tmp_path, capsys, monkeypatch):
    words = tokenizer()
    words.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    words.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    arguments = ["--chat", "--tokenizer", str(tmp_path), "--max-tokens", "2", "--json"]
    assert main(["generate", str(folder), "-", *arguments]) == 0
    tokens = json.loads(capsys.readouterr().out)["prompt"]["tokens"]
    assert tokens == len(words(f"[{PROMPT}]")["input_ids"])


class TestRefusals:
    @staticmethod
    def error(capsys: Any, *arguments: str) -> str:
        assert main(["generate", *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("moesaic generate: ") and err.count("\n") == 1
        return str(err)

    def test_a_folder_without_a_tokenizer(self, tmp_path, capsys):
        small().save_pretrained(tmp_path)
        capsys.readouterr()  # the bar of transformers
        error = self.error(capsys, str(tmp_path), PROMPT)
        assert "tokenizer" in error and "--tokenizer" in error

    def test_a_file_without_a_tokenizer(self, tmp_path, capsys):
        mo.testing.write_moe_gguf(tmp_path / "model.gguf")
        error = self.error(capsys, str(tmp_path / "model.gguf"), PROMPT)
        assert "tokenizer" in error and "--tokenizer" in error

    def test_a_tokenizer_that_is_nowhere(self, file, capsys):
        error = self.error(capsys, str(file), PROMPT, "--tokenizer", "/nowhere")
        assert error == "moesaic generate: /nowhere: No such file or directory\n"

    def test_options_of_the_other_kind_of_model(self, file, folder, capsys):
        assert "--gate-up-type" in self.error(capsys, str(file), PROMPT, "--gate-up-type", "Q4_K")
        assert "--dense" in self.error(capsys, str(folder), PROMPT, "--dense", "bf16")
        both = ["--memory", "1G", "--down-type", "Q4_K"]
        assert "--down-type" in self.error(capsys, str(folder), PROMPT, *both)
        assert "--temperature" in self.error(capsys, str(folder), PROMPT, "--top-p", "0.5")

    def test_a_message_without_a_template(self, folder, capsys):
        assert "template" in self.error(capsys, str(folder), PROMPT, "--chat")

    def test_no_words(self, folder, capsys):
        assert "at least one token" in self.error(capsys, str(folder), "")

    @pytest.mark.parametrize("name", ["torch", "transformers"])
    def test_packages_that_are_missing(self, file, name, capsys, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == name else find(n))
        error = self.error(capsys, str(file), PROMPT)
        assert f"no {name}" in error and "pip install 'moesaic[transformers]'" in error


def test_the_parser_imports_no_torch():
    """Help and errors of options take no seconds."""
    code = (
        "import sys; from moesaic.cli import build_parser; build_parser('generate');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Whole models from one GGUF file."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from models import ARCHITECTURES, MODELS, Model
from whole import PROMPT, distance, logits_of, make_model
from whole_gguf import write

import moesaic as mo
import moesaic.transformers as mt
from moesaic.transformers.gguf_names import ARCHITECTURES as KNOWN

transformers.logging.disable_progress_bar()
CASES = [
    "qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "qwen3_5_moe", "olmoe", "glm4_moe", "dots1",
]  # fmt: skip
#: Sizes that the blocks of Q8_0 fit, and value heads in groups of several.
ROUND = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}


def named(name: str) -> Model:
    case = next(case for case in MODELS if case.name == name)
    changes = dict(case.changes)
    if name in ("mixtral", "gpt_oss", "olmoe"):
        changes["intermediate_size"] = 32
    else:
        changes |= {key: size for key, size in ROUND.items() if key in changes}
        changes["intermediate_size"] = 64
    if name == "qwen3_5_moe":
        changes |= {"linear_num_value_heads": 6, "linear_num_key_heads": 2}
    return dataclasses.replace(case, changes=changes)


def made(name: str, tmp_path: Any, quants: dict[str, str] | None = None) -> tuple[Any, Any]:
    """A model, and the file that holds it."""
    model = make_model(named(name))
    path = tmp_path / "model.gguf"
    write(path, ARCHITECTURES[name], model, quants)
    return model, path


def test_every_architecture_of_the_table_is_tested():
    assert {ARCHITECTURES[name] for name in CASES} == set(KNOWN)


@pytest.mark.parametrize("name", CASES)
def test_decoded_to_f32(name, tmp_path):
    model, path = made(name, tmp_path)
    ours = mt.from_gguf(path, torch.float32, config=model.config)
    assert distance(logits_of(ours), logits_of(model)) < 1e-5
    want = {key: value for key, value in model.state_dict().items() if ".experts." not in key}
    got = ours.state_dict()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_kept(name, tmp_path):
    """As the same file decoded: only the products differ."""
    quants = {end: "Q8_0" for end in (
        "token_embd.weight", "output.weight", "_exps.weight", "_shexp.weight", "attn_q.weight",
        "attn_k.weight", "attn_v.weight", "attn_output.weight", "attn_qkv.weight",
        "attn_gate.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
    ) if end != "ffn_gate_inp_shexp.weight"}  # fmt: skip
    model, path = made(name, tmp_path, quants)
    decoded = mt.from_gguf(path, torch.float32, config=model.config)
    kept = mt.from_gguf(path, dtype=torch.float32, config=model.config)
    linears = [n for n, m in kept.named_modules() if isinstance(m, mo.torch.Linear)]
    assert len(linears) >= 13 and "lm_head" in linears
    assert isinstance(kept.get_input_embeddings(), mo.torch.Embedding)
    with mo.tuning(precision="exact"):
        assert distance(logits_of(kept), logits_of(decoded)) < 1e-3
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = decoded.generate(PROMPT[:, :8], **options)
    with mo.tuning(precision="exact"):
        got = kept.generate(PROMPT[:, :8], **options)
    for row in range(len(want)):
        differ = (got[row] != want[row]).nonzero()
        if len(differ):  # two tokens as likely as each other
            best = logits_of(decoded, want[row : row + 1, : differ[0]])[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-2
    with pytest.raises(ValueError, match="not serializable"):
        kept.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "qwen3_5_moe"])
def test_beside_the_loader_of_transformers(name, tmp_path):
    """Which reads the same files by a table of its own."""
    model, path = made(name, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=model.config, dtype=torch.float32
    )
    ours = mt.from_gguf(path, torch.float32, config=model.config)
    assert distance(logits_of(ours), logits_of(theirs)) < 1e-5


def test_the_configuration_of_the_file(tmp_path):
    model, path = made("qwen3_moe", tmp_path)
    ours = mt.from_gguf(path, torch.float32)
    assert ours.config.num_experts == 8 and ours.config.num_experts_per_tok == 3
    assert distance(logits_of(ours), logits_of(model)) < 1e-5


def test_blocks_that_predict_further_tokens(tmp_path):
    model = make_model(named("glm4_moe"))
    write(tmp_path / "model.gguf", "glm4moe", model, drafts=1)
    ours = mt.from_gguf(tmp_path / "model.gguf", torch.float32, config=model.config)
    assert distance(logits_of(ours), logits_of(model)) < 1e-5


def test_tied_embeddings(tmp_path):
    case = named("qwen3_moe")
    case = dataclasses.replace(case, changes={**case.changes, "tie_word_embeddings": True})
    model = make_model(case)
    quants = {"token_embd.weight": "Q8_0", "attn_q.weight": "Q8_0"}
    write(tmp_path / "model.gguf", "qwen3moe", model, quants)
    decoded = mt.from_gguf(tmp_path / "model.gguf", torch.float32, config=model.config)
    assert decoded.lm_head.weight is decoded.model.embed_tokens.weight
    kept = mt.from_gguf(tmp_path / "model.gguf", dtype=torch.float32, config=model.config)
    assert kept.lm_head.matrix.shape == (64, 32)
    with mo.tuning(precision="exact"):
        assert distance(logits_of(kept), logits_of(decoded)) < 1e-3


class TestRefusals:
    def test_a_type_by_name(self):
        with pytest.raises(mo.ConfigError, match="dense: expected 'keep'"):
            mt.from_gguf("model.gguf", "bf16")

    def test_other_layers_than_the_file_has(self, tmp_path):
        model, path = made("qwen3_moe", tmp_path)
        model.config.norm_topk_prob = False
        with pytest.raises(mo.ConfigError, match="renormalize of layer 0"):
            mt.from_gguf(path, torch.float32, config=model.config)

    def test_an_architecture_outside_of_the_table(self, tmp_path):
        model = make_model(named("qwen3_moe"))
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", arch="deepseek2")
        with pytest.raises(mo.UnsupportedError, match="architecture: expected one of dots1"):
            mt.from_gguf(tmp_path / "m.gguf", config=model.config)

    def test_another_model(self, tmp_path):
        _, path = made("qwen3_moe", tmp_path)
        config = make_model(named("qwen2_moe")).config
        with pytest.raises(mo.UnsupportedError, match="qwen3_moe for a file of qwen3moe"):
            mt.from_gguf(path, config=config)

    def test_a_configuration_that_nobody_reads(self, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", arch="bailingmoe2")
        with pytest.raises(mo.UnsupportedError, match="give it as config="):
            mt.from_gguf(tmp_path / "m.gguf")

    def test_a_tensor_that_is_missing(self, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", hidden=32, intermediate=32, gate_type="F32",
                                  down_type="F32", top_k=3, layers=3)  # fmt: skip
        config = make_model(named("qwen3_moe")).config
        with pytest.raises(mo.FormatError, match=r"embed_tokens\.weight: .*token_embd\.weight"):
            mt.from_gguf(tmp_path / "m.gguf", torch.float32, config=config)

    def test_a_tensor_too_many(self, tmp_path):
        model = make_model(named("qwen3_moe"))
        write(tmp_path / "model.gguf", "qwen3moe", model, more=("blk.1.attn_extra.weight",))
        with pytest.raises(mo.FormatError, match=r"blk\.1\.attn_extra\.weight: .*a place"):
            mt.from_gguf(tmp_path / "model.gguf", torch.float32, config=model.config)

    def test_a_tensor_of_another_shape(self, tmp_path):
        model, path = made("qwen3_moe", tmp_path)
        model.config.vocab_size = 65
        with pytest.raises(mo.FormatError, match=r"embed_tokens.*\[65, 32\].*\[64, 32\]"):
            mt.from_gguf(path, torch.float32, config=model.config)

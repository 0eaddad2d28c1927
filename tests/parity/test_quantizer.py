"""from_pretrained with experts that torch never holds, and models that come back from disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from models import MODELS, Model
from safetensors.torch import save_file
from whole import PROMPT, distance, logits_of, make_model

import moesaic as mo
import moesaic.transformers as mt

mt.register()
#: One of each family that AutoModelForCausalLM loads.
FAMILIES = [
    "qwen3_moe", "qwen2_moe", "qwen3_next", "qwen3_5_moe", "mixtral", "olmoe", "deepseek_v2",
    "deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2", "granitemoe", "ernie4_5_moe", "dots1",
    "llama4",
]  # fmt: skip


def named(name: str) -> Model:
    return next(case for case in MODELS if case.name == name)


def load(folder: Path, config: Any, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, **options
    )


def saved(case: Model, folder: Path) -> torch.Tensor:
    """The logits of a model whose checkpoint is in the folder now."""
    model = make_model(case)
    model.save_pretrained(folder)
    return logits_of(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_the_checkpoint_itself(name, tmp_path):
    want = saved(named(name), tmp_path)
    model, info = load(tmp_path, mt.MoesaicConfig(), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any(".experts." in key for key, _ in model.named_parameters())
    assert distance(logits_of(model), want) < 1e-5
    options = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(PROMPT[:, :6], **options).shape[0] == 2


def wide(name: str) -> Model:
    """As wide as the blocks of K types."""
    case = named(name)
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 32}
    return Model(case.name, case.config, {**case.changes, **sizes})


def mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks [E, rows, cols / 32, 16] with neighbours in a byte, scales, and their values."""
    data = mo.quantize(weights.contiguous().numpy(), "MXFP4")
    decoded = torch.from_numpy(mo.dequantize(data, "MXFP4"))
    parts = torch.from_numpy(data).unflatten(-1, (-1, 17))  # the halves of a block share bytes
    codes = torch.cat([parts[..., 1:] & 15, parts[..., 1:] >> 4], -1)
    return codes[..., ::2] | (codes[..., 1::2] << 4), parts[..., 0], decoded


class TestSources:
    def test_a_gguf_file(self, tmp_path):
        model = make_model(wide("qwen3_moe"))
        want = logits_of(model)
        model.save_pretrained(tmp_path / "model")
        layers = [mo.MoeLayer.from_safetensors(tmp_path / "model", i).replace() for i in range(3)]
        mo.write_gguf(tmp_path / "experts.gguf", layers)
        config = mt.MoesaicConfig(experts=tmp_path / "experts.gguf")
        got = logits_of(load(tmp_path / "model", config, dtype=torch.float32))
        assert distance(got, want) < 1e-5

    def test_encoded_on_the_way(self, tmp_path):
        saved(wide("qwen3_moe"), tmp_path)
        config = mt.MoesaicConfig(gate_up="Q4_K", down="Q6_K")
        model = load(tmp_path, config, dtype=torch.float32)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        mt.convert(plain, gate_up="Q4_K", down="Q6_K")
        for ours, other in zip(model.model.layers, plain.model.layers, strict=True):
            a, b = ours.mlp.experts.stack, other.mlp.experts.stack
            assert a.quants == b.quants
            assert all((a.encoded(role) == b.encoded(role)).all() for role in a.quants)
        assert torch.equal(logits_of(model), logits_of(plain))

    def test_biases_stay(self, tmp_path):
        case = named("gpt_oss")
        case = Model(case.name, case.config, {**case.changes, "intermediate_size": 32})
        saved(case, tmp_path)
        model = load(tmp_path, mt.MoesaicConfig(gate_up="Q8_0"), dtype=torch.float32)
        stack = model.model.layers[0].mlp.experts.stack
        assert stack.quants == {"gate": "Q8_0", "up": "Q8_0", "down": "F32"}
        assert set(stack.biases) == {"gate", "up", "down"}

    def test_mxfp4_as_gpt_oss_has_it(self, tmp_path):
        """Such a checkpoint names a method of its own, which the configuration must not."""
        case = named("gpt_oss")
        case = Model(case.name, case.config, {**case.changes, "intermediate_size": 32})
        model = make_model(case)
        tensors = {k: v for k, v in model.state_dict().items() if not k.endswith("_proj")}
        for i, layer in enumerate(model.model.layers):
            for name in ("gate_up_proj", "down_proj"):
                weights = getattr(layer.mlp.experts, name)
                blocks, scales, decoded = mxfp4(weights.detach().transpose(1, 2))
                key = f"model.layers.{i}.mlp.experts.{name}"
                tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
                weights.data = decoded.transpose(1, 2)
        want = logits_of(model)
        model.config.save_pretrained(tmp_path)
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
        got = load(tmp_path, mt.MoesaicConfig(), dtype=torch.float32)
        assert got.model.layers[0].mlp.experts.stack.quants["down"] == "MXFP4"
        with mo.tuning(precision="exact"):
            assert distance(logits_of(got), want) < 1e-3

    def test_experts_of_another_model(self, tmp_path):
        saved(wide("qwen3_moe"), tmp_path / "wide")
        saved(named("qwen3_moe"), tmp_path / "narrow")
        with pytest.raises(mo.FormatError, match=r"model\.layers\.0\.mlp\.experts"):
            load(tmp_path / "narrow", mt.MoesaicConfig(experts=tmp_path / "wide"))

    def test_two_parts_that_count_their_layers_alike(self, tmp_path):
        saved(named("qwen3_moe"), tmp_path)

        class Twice(transformers.Qwen3MoeForCausalLM):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.other = transformers.Qwen3MoeModel(config)

        with pytest.raises(mo.UnsupportedError, match="one module of experts in a layer"):
            Twice.from_pretrained(tmp_path, quantization_config=mt.MoesaicConfig())

    def test_the_other_kind_of_model(self, tmp_path):
        """Each of both functions names the other."""
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(mo.FormatError, match=r"got a file.*from_gguf"):
            mt.from_pretrained(tmp_path / "model.gguf")
        with pytest.raises(mo.FormatError, match=r"got a folder.*from_pretrained"):
            mt.from_gguf(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"snapshot_download.*some/model"):
            mt.from_pretrained("some/model")

    def test_types_that_there_are_not(self):
        """They are named before anything is loaded."""
        with pytest.raises(mo.ConfigError, match="nearest: Q4_K"):
            mt.MoesaicConfig(gate_up="Q4K")
        with pytest.raises(mo.ConfigError, match="a type name"):
            mt.MoesaicConfig(down="INT4")

    def test_experts_that_are_here_already(self):
        model = mt.convert(make_model(named("qwen3_moe")))
        with pytest.raises(mo.UnsupportedError, match="got experts that run here already"):
            mt.convert(model)

    def test_no_files(self):
        model = make_model(named("qwen3_moe"))
        with pytest.raises(mo.ConfigError, match="a GGUF file or a folder"):
            type(model).from_pretrained(
                None, config=model.config, state_dict=model.state_dict(),
                quantization_config=mt.MoesaicConfig(),
            )  # fmt: skip


class TestSaving:
    def test_comes_back_from_disk(self, tmp_path):
        want = saved(named("qwen3_moe"), tmp_path / "model")
        model = load(tmp_path / "model", mt.MoesaicConfig(), dtype=torch.float32)
        model.save_pretrained(tmp_path / "again")
        size = sum(file.stat().st_size for file in (tmp_path / "again").glob("*.safetensors"))
        assert size < sum(p.numel() * 4 for p in model.parameters()) + 20_000
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "again", dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert distance(logits_of(again), want) < 1e-5

    def test_encoded_comes_back_too(self, tmp_path):
        saved(wide("qwen3_moe"), tmp_path / "model")
        model = load(tmp_path / "model", mt.MoesaicConfig(gate_up="Q4_K"), dtype=torch.float32)
        model.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "again", dtype=torch.float32
        )
        assert torch.equal(logits_of(again), logits_of(model))

    def test_a_converted_model_is_refused(self, tmp_path):
        model = mt.convert(make_model(named("qwen3_moe")))
        with pytest.raises(mo.UnsupportedError, match="weights made of arrays"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))


class TestWeightCache:
    """Experts that are mapped as kernels read them from the second start on."""

    @pytest.mark.parametrize("types", [{}, {"gate_up": "Q4_K", "down": "Q6_K"}])
    def test_it_says_the_same(self, tmp_path, types):
        saved(wide("qwen3_moe"), tmp_path / "model")
        want = logits_of(load(tmp_path / "model", mt.MoesaicConfig(**types), dtype=torch.float32))
        for decision in ("repacked", "cached"):
            ours = mt.from_pretrained(
                tmp_path / "model", dtype=torch.float32, weight_cache=tmp_path / "cache", **types
            )
            reports = [layer.mlp.experts.stack.report for layer in ours.model.layers]
            assert {role.decision for one in reports for role in one.roles} == {decision}
            assert torch.equal(logits_of(ours), want)
        config = mt.MoesaicConfig(weight_cache=tmp_path / "cache", **types)
        again = load(tmp_path / "model", config, dtype=torch.float32)
        assert {role.decision for role in again.model.layers[1].mlp.experts.stack.report.roles} == {
            "cached"
        }

    def test_a_saved_model_names_no_place_to_write_to(self, tmp_path):
        saved(named("qwen3_moe"), tmp_path / "model")
        config = mt.MoesaicConfig(weight_cache=tmp_path / "cache")
        model = load(tmp_path / "model", config, dtype=torch.float32)
        want, state = logits_of(model), model.state_dict()
        model.save_pretrained(tmp_path / "again")
        shutil.rmtree(tmp_path / "cache")
        text = (tmp_path / "again/config.json").read_text()
        assert "weight_cache" not in text
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "again", dtype=torch.float32
        )
        assert torch.equal(logits_of(again), want)
        again.load_state_dict(state)
        assert torch.equal(logits_of(again), want)
        assert not (tmp_path / "cache").exists()
        facts = json.loads(text)
        facts["quantization_config"]["weight_cache"] = str(tmp_path / "cache")
        (tmp_path / "again/config.json").write_text(json.dumps(facts))
        with pytest.raises(mo.ConfigError, match=r"weight_cache of config\.json: expected none"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_hooks_of_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    want = saved(named("qwen3_moe"), tmp_path)
    model = load(tmp_path, mt.MoesaicConfig(), dtype=torch.float32, device_map="cpu")
    assert distance(logits_of(model), want) < 1e-5
    model = load(tmp_path, mt.MoesaicConfig(), dtype=torch.float32)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert distance(logits_of(model), want) < 1e-5


def test_layers_that_accelerate_keeps_on_disk(tmp_path):
    """Its hooks bring in what is torch's; experts stay where they are."""
    pytest.importorskip("accelerate")
    want = saved(named("qwen3_moe"), tmp_path)
    options = {"max_memory": {"cpu": "60KB"}, "offload_folder": tmp_path / "offloaded"}
    model = load(
        tmp_path, mt.MoesaicConfig(), dtype=torch.float32, device_map="auto", **options
    )  # fmt: skip
    assert {"cpu", "disk"} <= {str(place) for place in model.hf_device_map.values()}
    assert distance(logits_of(model), want) < 1e-5
    tokens = load(tmp_path, mt.MoesaicConfig(), dtype=torch.float32).generate(
        PROMPT[:, :6], max_new_tokens=4, do_sample=False
    )
    assert torch.equal(model.generate(PROMPT[:, :6], max_new_tokens=4, do_sample=False), tokens)


def test_pipelines():
    plain, ours = (make_model(named("qwen3_moe")) for _ in range(2))
    vocabulary = {"<end>": 0, **{f"w{i}": i for i in range(1, plain.config.vocab_size)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<end>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>"
    )

    def said(model: Any) -> list[Any]:
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        texts = ["w5 w9 w4", "w7 w8 w20 w33"]
        return pipe(texts, batch_size=2, max_new_tokens=5, do_sample=False)

    assert said(mt.convert(ours)) == said(plain)


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = mt.convert(make_model(named("qwen3_moe")))
    want = logits_of(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trained = peft.get_peft_model(model, config)
    step = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 0.5)
    losses = []
    for _ in range(8):
        loss = trained(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01
    trained.save_pretrained(tmp_path)
    changed = logits_of(trained)
    assert distance(changed, want) > 1e-3
    fresh = mt.convert(make_model(named("qwen3_moe")))
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert distance(logits_of(again), changed) < 1e-5

"""Whole models from one GGUF file."""

import dataclasses
import shutil
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


@pytest.mark.parametrize("name", CASES)
def test_routers_of_a_bf16_model_are_f32(name, tmp_path):
    model, path = made(name, tmp_path)
    decoded = mt.from_gguf(path, torch.float32, config=model.config)
    kept = mt.from_gguf(path, config=model.config)
    assert kept.dtype == torch.bfloat16
    seen = []
    for key, module in kept.named_modules():
        if key.endswith((".gate", ".router")) and hasattr(module, "weight"):
            assert torch.equal(module.weight, decoded.get_submodule(key).weight)
            module.register_forward_hook(lambda *one: seen.append(one))
    with torch.no_grad():
        outputs = kept(PROMPT, output_hidden_states=True)
    assert {one.dtype for one in (outputs.logits, *outputs.hidden_states)} == {torch.bfloat16}
    assert len(seen) >= 2
    for module, (hidden,), outputs in seen:
        assert hidden.dtype == torch.float32
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert first.dtype == torch.float32, type(module)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert kept.generate(PROMPT[:, :8], **options).shape == (len(PROMPT), 12)


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


QUANTS = {"_exps.weight": "Q8_0", "attn_q.weight": "Q8_0", "output.weight": "Q8_0"}


class TestWeightCache:
    """Weights that are mapped as kernels read them from the second start on."""

    def test_it_says_the_same(self, tmp_path):
        model, path = made("qwen3_moe", tmp_path, QUANTS)
        plain = mt.from_gguf(path, torch.float32, config=model.config)
        for decision in ("repacked", "cached"):
            ours = mt.from_gguf(
                path, torch.float32, config=model.config, weight_cache=tmp_path / "cache"
            )
            reports = [layer.mlp.experts.stack.report for layer in ours.model.layers]
            assert {role.decision for one in reports for role in one.roles} == {decision}
            assert torch.equal(logits_of(ours), logits_of(plain))

    def test_linears_too(self, tmp_path):
        model, path = made("qwen3_moe", tmp_path, QUANTS)
        options = {"dtype": torch.float32, "config": model.config}
        plain = mt.from_gguf(path, **options)
        first = mt.from_gguf(path, weight_cache=True, **options)
        names = {
            file.name.split(".weight")[0] for file in (tmp_path / "model.gguf.panels").iterdir()
        }
        assert {"output", "blk.0.attn_q", "blk.2.ffn_down_exps"} <= names
        second = mt.from_gguf(path, weight_cache=True, **options)
        for ours in (first, second):
            assert torch.equal(logits_of(ours), logits_of(plain))

    def test_a_state_dict_names_no_place_to_write_to(self, tmp_path):
        model, path = made("qwen3_moe", tmp_path, QUANTS)
        ours = mt.from_gguf(
            path, torch.float32, config=model.config, weight_cache=tmp_path / "cache"
        )
        want = logits_of(ours)
        state = ours.state_dict()
        shutil.rmtree(tmp_path / "cache")
        other = mt.from_gguf(path, torch.float32, config=model.config)
        other.load_state_dict(state)
        assert torch.equal(logits_of(other), want)
        assert not (tmp_path / "cache").exists()

    def test_what_is_refused(self, tmp_path):
        model, path = made("qwen3_moe", tmp_path)
        with pytest.raises(mo.ConfigError, match=r"weight_cache: .*got memory"):
            mt.from_gguf(path, config=model.config, memory="1GiB", weight_cache=True)
        with pytest.raises(mo.ConfigError, match=r"weight_cache: .*got gate_up"):
            mt.MoesaicConfig(path, gate_up="Q8_0", weight_cache=True)


@pytest.fixture(scope="class")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, int]:
    """A model with many experts, its file, and the bytes of its experts."""
    case = named("qwen3_moe")
    model = make_model(Model(case.name, case.config, {**case.changes, "num_experts": 48}))
    path = tmp_path_factory.mktemp("many") / "model.gguf"
    write(path, "qwen3moe", model)
    store = mo.MoeExpertStore.from_gguf(path)
    return model, path, sum(layer.stack.nbytes for layer in store.layers)


class TestMemory:
    """Experts that do not fit into the memory they may take."""

    def load(self, many: tuple[Any, Any, int], part: float = 0.4) -> tuple[Any, Any]:
        """The model, and the store that its experts come from."""
        model, path, size = many
        ours = mt.from_gguf(path, torch.float32, config=model.config, memory=int(part * size))
        return ours, ours.model.layers[0].mlp.experts._weights.store

    def test_it_says_the_same(self, many):
        model, path, size = many
        ours, store = self.load(many)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        want = model.generate(PROMPT[:, :6], **options)
        assert torch.equal(ours.generate(PROMPT[:, :6], **options), want)
        whole = mt.from_gguf(path, torch.float32, config=model.config)
        assert torch.equal(logits_of(ours), logits_of(whole))
        held = store.memory()
        assert held["slots"] + held["staging"] <= held["limit"] == int(0.4 * size) < size
        budget = ours.model.layers[0].mlp.experts._weights.pool.budget
        resident = 3 * budget * store.layers[0].expert_bytes
        assert store.io_stats()["bytes"] > 2 * resident

    def test_experts_that_are_used_stay(self, many):
        ours, _ = self.load(many)
        experts = ours.model.layers[0].mlp.experts
        assert f", {experts._weights.pool.budget} in memory" in repr(experts)
        x, weights = torch.randn(1, 32), torch.ones(1, 2)
        for _ in range(4):
            experts(x, torch.tensor([[40, 41]]), weights)
        pool = experts._weights.pool
        assert {40, 41} <= set(pool.residents.tolist())
        assert pool.stats.hit_rate > 0.7

    def test_as_much_as_there_is(self, many):
        ours, _ = self.load(many, 4)
        assert ours.model.layers[0].mlp.experts._weights.pool.budget == 48
        assert distance(logits_of(ours), logits_of(many[0])) < 1e-5

    def test_sizes_with_units(self, many):
        model, path, _ = many
        ours = mt.from_gguf(path, torch.float32, config=model.config, memory="1.5MiB")
        assert ours.model.layers[0].mlp.experts._weights.store.memory()["limit"] == 3 << 19

    def test_gradients(self, many):
        model, path, _ = many
        ours, _ = self.load(many)
        whole = mt.from_gguf(path, torch.float32, config=model.config)
        x, ids = torch.randn(4, 32), torch.randint(0, 48, (4, 2))
        gradients = []
        for one in (ours, whole):
            into = x.clone().requires_grad_()
            one.model.layers[1].mlp.experts(into, ids, torch.ones(4, 2)).sum().backward()
            gradients.append(into.grad)
        torch.testing.assert_close(*gradients)

    def test_state(self, many, tmp_path):
        ours, store = self.load(many)
        want = logits_of(ours)
        torch.save(ours.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        ours.load_state_dict(state)
        assert ours.model.layers[0].mlp.experts._weights.store is store
        # Elsewhere they run where the file is mapped.
        whole = mt.from_gguf(many[1], torch.float32, config=many[0].config)
        whole.load_state_dict(state)
        assert whole.model.layers[0].mlp.experts.stack.nbytes == store.layers[0].stack.nbytes
        assert torch.equal(logits_of(whole), want)

    def test_from_pretrained(self, many, tmp_path):
        model, path, size = many
        model.save_pretrained(tmp_path / "model")
        config = mt.MoesaicConfig(experts=path, memory=int(0.4 * size))
        load = transformers.AutoModelForCausalLM.from_pretrained
        ours = load(tmp_path / "model", dtype=torch.float32, quantization_config=config)
        assert distance(logits_of(ours), logits_of(model)) < 1e-5
        ours.save_pretrained(tmp_path / "again")
        again = load(tmp_path / "again", dtype=torch.float32)
        budgets = [one.model.layers[0].mlp.experts._weights.pool.budget for one in (again, ours)]
        assert 1 < budgets[0] == budgets[1] < 48
        assert torch.equal(logits_of(again), logits_of(ours))

    def test_fewer_blocks_than_the_model_has(self, many, tmp_path):
        model, path, size = many
        changes = {**model.config.to_diff_dict(), "num_hidden_layers": 4}
        longer = make_model(Model("longer", "Qwen3MoeConfig", changes))
        longer.save_pretrained(tmp_path)
        config = mt.MoesaicConfig(experts=path, memory=4 * size)
        with pytest.raises(mo.FormatError, match=r"block 3 of .*one with experts: 0, 1, 2"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)

    @pytest.mark.parametrize("part", [0.0001, 0.02, 0.05])
    def test_too_little(self, many, part):
        with pytest.raises(mo.ConfigError, match=r"memory: expected at least \d+: \d+ of an"):
            self.load(many, part)

    @pytest.mark.parametrize("size", ["much", 0, -1, "0", True, 1.5])
    def test_sizes_that_are_none(self, size):
        with pytest.raises((mo.ConfigError, mo.DTypeError), match="a text such as '12GiB'"):
            mt.MoesaicConfig(memory=size)

    def test_types_to_encode_in(self):
        with pytest.raises(mo.ConfigError, match="None beside memory="):
            mt.MoesaicConfig(memory=1, gate_up="Q4_K")

    def test_experts_of_a_folder(self, many, tmp_path):
        model, _, size = many
        model.save_pretrained(tmp_path)
        load = transformers.AutoModelForCausalLM.from_pretrained
        config = mt.MoesaicConfig(memory=size)
        ours = load(tmp_path, dtype=torch.float32, quantization_config=config)
        whole = load(tmp_path, dtype=torch.float32, quantization_config=mt.MoesaicConfig())
        experts = ours.model.layers[0].mlp.experts
        assert 1 <= experts._weights.pool.budget < 48
        with torch.no_grad():
            assert torch.equal(logits_of(ours), logits_of(whole))
        with pytest.raises(mo.UnsupportedError, match="read one by one"):
            ours.state_dict()
        x = torch.randn(1, 32, requires_grad=True)
        y = experts(x, torch.tensor([[1, 2]]), torch.ones(1, 2))
        with pytest.raises(mo.UnsupportedError):
            y.sum().backward()


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
        with pytest.raises(
            mo.FormatError, match=r"embed_tokens\.weight: .*token_embd\.weight.*experts="
        ):
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

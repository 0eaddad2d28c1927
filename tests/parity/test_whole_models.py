"""Whole models of transformers with their experts here, beside themselves."""

from typing import Any

import pytest
import torch
from models import MODELS, Model
from whole import PROMPT, distance, logits_of, make_model

import moesaic as mo
import moesaic.transformers as mt
from moesaic.transformers.layouts import is_experts

mt.register()
#: Classes without the interface of experts implementations: only ``convert`` takes them.
CONVERTED_ONLY = ("llama4", "longcat")
#: Models that generate() of transformers does not take in these configurations, whatever runs them.
NO_GENERATE = ("qwen4_exp", "nemotron_h", "glm5_next", "qwen3_vl_moe", "qwen3_omni_moe", "glm4v")
EXPERTS = [case for case in MODELS if not case.name.startswith(CONVERTED_ONLY)]


def named(name: str) -> Model:
    return next(case for case in MODELS if case.name == name)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_logits_and_tokens(case: Model):
    model = make_model(case)
    want = logits_of(model)
    generates = not case.name.startswith(NO_GENERATE)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(PROMPT[:, :8], **options) if generates else None
    if case in EXPERTS:
        model.set_experts_implementation("moesaic")
        assert distance(logits_of(model), want) < 1e-5
    pairs = mt.usage(model).counts.sum() if case in EXPERTS else 0
    assert mt.convert(model) is model
    assert distance(logits_of(model), want) < 1e-5
    if case in EXPERTS:  # the same pairs, counted anew
        assert mt.usage(model).counts.sum() == pairs > 0
    if generates:
        assert torch.equal(model.generate(PROMPT[:, :8], **options), tokens)


@pytest.mark.parametrize(
    "case", [case for case in EXPERTS if " " not in case.name], ids=lambda case: case.name
)
@torch.no_grad()
def test_bf16_is_nearer_to_f32(case: Model):
    """Of the experts alone: in a whole model a rounding decides which experts are chosen."""
    model = make_model(case).bfloat16()
    name, experts = next(
        (name, module) for name, module in model.named_modules() if is_experts(module)
    )
    width = experts.down_proj.shape[2 if getattr(experts, "is_transposed", False) else 1]
    x = torch.randn(40, width).bfloat16()
    ids = torch.rand(40, experts.num_experts).topk(3).indices
    weights = torch.rand(40, 3).bfloat16()
    exact = experts.float()(x.float(), ids, weights.float())
    eager = experts.bfloat16()(x, ids, weights)
    mt.convert(model)
    ours = model.get_submodule(name)(x, ids, weights)
    assert ours.dtype == eager.dtype == torch.bfloat16
    assert distance(ours.float(), exact) < 0.6 * distance(eager.float(), exact)


def test_encoded_experts():
    """As far from the model as its experts are from themselves."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 32}
    case = named("qwen3_moe")
    case = Model(case.name, case.config, {**case.changes, **wide})
    want = logits_of(make_model(case))
    model = mt.convert(make_model(case), gate_up="Q4_K", down="Q6_K")
    experts = model.model.layers[0].mlp.experts
    assert experts.stack.quants == {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"}
    assert 1e-4 < distance(logits_of(model), want) < 0.2
    # The same model with the decoded weights in torch: the encoding is all that differs.
    other = make_model(case)
    for ours, theirs in zip(model.model.layers, other.model.layers, strict=True):
        stack = ours.mlp.experts.stack
        parts = [torch.from_numpy(stack.dequantize(role)) for role in ("gate", "up", "down")]
        theirs.mlp.experts.gate_up_proj.data = torch.cat(parts[:2], 1)
        theirs.mlp.experts.down_proj.data = parts[2]
    with mo.tuning(precision="exact"):
        assert distance(logits_of(model), logits_of(other)) < 1e-3


class TestConvert:
    def test_progress_and_memory(self):
        model = make_model(named("qwen3_moe"))
        size = sum(p.numel() * 4 for n, p in model.named_parameters() if ".experts." in n)
        seen: list[mo.Progress] = []
        mt.convert(model, progress=seen.append)
        assert [one.done_bytes for one in seen] == [size // 3, 2 * size // 3, size]
        assert all(one.total_bytes == size for one in seen)
        assert seen[1].what == "model.layers.1.mlp.experts"
        assert not any(".experts." in name for name, _ in model.named_parameters())

    def test_cancelled_in_between(self):
        model = make_model(named("qwen3_moe"))
        want = logits_of(model)
        with pytest.raises(mo.OperationCancelled):
            mt.convert(model, progress=lambda progress: False)
        assert distance(logits_of(model), want) < 1e-5
        assert isinstance(model.model.layers[0].mlp.experts, mo.torch.Experts)
        assert not isinstance(model.model.layers[1].mlp.experts, mo.torch.Experts)

    def test_a_model_without_experts(self):
        with pytest.raises(mo.UnsupportedError, match="convert: Linear"):
            mt.convert(torch.nn.Linear(2, 2))

    def test_a_type_that_does_not_fit(self):
        model = make_model(named("qwen3_moe"))
        with pytest.raises(mo.ShapeError):
            mt.convert(model, gate_up="Q4_K")
        assert not isinstance(model.model.layers[0].mlp.experts, mo.torch.Experts)

    def test_weights_that_are_nowhere(self):
        with torch.device("meta"):
            model = named("qwen3_moe").make_whole()
        with pytest.raises(mo.UnsupportedError, match=r"Qwen3MoeExperts.*on the CPU.*meta"):
            mt.convert(model)


def experts_of(name: str) -> Any:
    return make_model(named(name)).model.layers[1].mlp.experts


class TestRefusals:
    """Nothing is run that is not known to be the same."""

    def test_a_norm_of_each_expert(self):
        model = make_model(named("qwen3_moe"))
        model.model.layers[2].mlp.experts.has_post_expert_norm = True
        with pytest.raises(mo.UnsupportedError, match=r"Qwen3MoeExperts.*a norm of each"):
            mt.convert(model)
        assert not isinstance(model.model.layers[0].mlp.experts, mo.torch.Experts)

    @pytest.mark.parametrize("activation", ["gelu", "tanh", "relu6"])
    def test_an_unknown_activation(self, activation):
        model = make_model(Model("", "Qwen3MoeConfig", {**named("qwen3_moe").changes,
                                                        "hidden_act": activation}))  # fmt: skip
        with pytest.raises(mo.UnsupportedError, match="Qwen3MoeExperts, the activation"):
            mt.convert(model)

    def test_an_unknown_gate(self):
        model = make_model(named("qwen3_moe"))
        kind = type(model.model.layers[0].mlp.experts)
        gate = kind._apply_gate
        kind._apply_gate = lambda self, both: gate(self, both) + 1e-3
        try:
            with pytest.raises(mo.UnsupportedError, match="Qwen3MoeExperts, the activation"):
                mt.convert(model)
        finally:
            kind._apply_gate = gate

    def test_a_class_that_nobody_describes(self):
        class MyExperts(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 8, 4))
                self.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))

        with pytest.raises(mo.UnsupportedError, match="MyExperts, the layout"):
            mt.convert(torch.nn.Sequential(MyExperts()))


class TestImplementation:
    def test_weights_that_change(self):
        model = make_model(named("mixtral"))
        model.set_experts_implementation("moesaic")
        before = logits_of(model)
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj.mul_(-1)
        after = logits_of(model)
        model.set_experts_implementation("eager")
        assert distance(after, logits_of(model)) < 1e-5 < distance(after, before)

    def test_weights_of_experts_get_no_gradients(self):
        model = make_model(named("mixtral"))
        model.set_experts_implementation("moesaic")
        loss = model(PROMPT, use_cache=False).logits.sum()
        with pytest.raises(mo.UnsupportedError, match="weights of experts"):
            loss.backward()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".experts." not in name)
        model(PROMPT, use_cache=False).logits.sum().backward()
        ours = model.model.embed_tokens.weight.grad.clone()
        model.zero_grad()
        model.set_experts_implementation("eager")
        model(PROMPT, use_cache=False).logits.sum().backward()
        assert distance(ours, model.model.embed_tokens.weight.grad) < 1e-4

    def test_ids_of_experts_elsewhere(self):
        """Ranks of an expert-parallel model know their own experts; E stands for all others."""
        experts = experts_of("qwen3_moe")
        x, weights = torch.randn(5, 32), torch.rand(5, 2)
        ids = torch.tensor([[0, 8], [8, 8], [3, 1], [8, 2], [7, 7]])
        experts.config._experts_implementation = "eager"
        want = experts(x, ids, weights)
        experts._is_expert_parallel = True
        experts.config._experts_implementation = "moesaic"
        assert distance(experts(x, ids, weights), want) < 1e-5

    def test_copies_and_pickles_of_a_model(self, tmp_path):
        import copy

        model = make_model(named("mixtral"))
        model.set_experts_implementation("moesaic")
        want = logits_of(model)
        assert torch.equal(logits_of(copy.deepcopy(model)), want)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(logits_of(again), want)
        model.save_pretrained(tmp_path / "saved")  # its weights are still torch's


def test_usage():
    model = make_model(named("glm4_moe"))
    with pytest.raises(mo.UnsupportedError, match="usage: Glm4MoeForCausalLM"):
        mt.usage(model)
    mt.convert(model)
    logits_of(model)
    profile = mt.usage(model)
    assert profile.layer_indices.tolist() == [1, 2]
    assert profile.counts.sum(axis=1).tolist() == [PROMPT.numel() * 3] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "temperature": 2.0},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["beams", "sampling", "static cache"],
)
def test_ways_to_generate(options):
    model = make_model(named("qwen3_moe"))
    options = {**options, "max_new_tokens": 8, "eos_token_id": None}

    def tokens() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(PROMPT[:, :6], **options)

    want = tokens()
    mt.convert(model)
    assert torch.equal(tokens(), want)

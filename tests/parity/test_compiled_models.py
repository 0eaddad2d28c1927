"""Whole models with their experts here, compiled and exported as one graph."""

from typing import Any

import pytest
import torch
from models import MODELS
from test_whole_gguf import made
from whole import PROMPT, distance, logits_of, make_model

import moesaic.transformers as mt

FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe"]


def converted(name: str) -> Any:
    model = make_model(next(case for case in MODELS if case.name == name))
    return mt.convert(model)


def calls_of(graph: torch.fx.Graph) -> int:
    return sum("moesaic.experts" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_compile(name):
    """In one graph, which has each layer's experts as one call."""
    torch._dynamo.reset()
    model = converted(name)
    layers = sum("Experts" in type(module).__name__ for module in model.modules())
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in (PROMPT, PROMPT[:, :7]):
        got = compiled(tokens, use_cache=False).logits
        assert distance(got, logits_of(model, tokens)) < 1e-6
    assert {calls_of(graph) for graph in graphs} == {layers}


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])
def test_compile_with_gradients(name):
    """As an adapter before the experts trains: the gradient of the embeddings."""
    torch._dynamo.reset()
    model = converted(name)
    embeddings = model.get_input_embeddings()(PROMPT).detach()

    def gradient(call: Any) -> torch.Tensor:
        x = embeddings.clone().requires_grad_()
        call(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
        return x.grad

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert distance(gradient(compiled), gradient(model)) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_export(name):
    model = converted(name)
    layers = sum("Experts" in type(module).__name__ for module in model.modules())
    program = torch.export.export(model, (), {"input_ids": PROMPT, "use_cache": False})
    assert calls_of(program.graph) == layers
    got = program.module()(input_ids=PROMPT, use_cache=False).logits
    assert distance(got, logits_of(model)) < 1e-6


@torch.no_grad()
def test_compile_of_a_gguf_file(tmp_path):
    """Whose projections, output and embedding run here too."""
    torch._dynamo.reset()
    kinds = ("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output")
    _, path = made("qwen3_moe", tmp_path, {f"{kind}.weight": "Q8_0" for kind in kinds})
    model = mt.from_gguf(path, dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(PROMPT, use_cache=False).logits
    assert distance(got, logits_of(model)) < 1e-6

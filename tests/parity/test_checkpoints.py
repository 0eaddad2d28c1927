"""Checkpoints as transformers saves them: router, experts and shared experts of one layer."""

import pytest
from comparison import compare
from models import MODELS, Model
from reference import make_reference

import moesaic as mo


@pytest.mark.parametrize(
    "model", [model for model in MODELS if model.saved], ids=lambda model: model.name
)
def test_saved_by_transformers(model: Model, tmp_path):
    reference = make_reference(model)
    reference.model.save_pretrained(tmp_path)
    call = {"token_ids": reference.tokens} if model.hashed else {}
    with mo.MoeLayer.from_safetensors(tmp_path, model.layer) as layer:
        compare(layer, reference, **call)

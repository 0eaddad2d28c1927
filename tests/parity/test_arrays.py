"""Layers from parts: MoeConfig.from_hf of the configuration object and the module's own arrays."""

import pytest
from arrays import layer_of
from comparison import compare
from models import MODELS, Model
from reference import make_reference

# Biases of experts come from files only.
PLAIN = [model for model in MODELS if model.arrays]


@pytest.mark.parametrize("model", PLAIN, ids=lambda model: model.name)
def test_from_parts(model: Model):
    reference = make_reference(model, seed=5)
    compare(layer_of(model, reference), reference)

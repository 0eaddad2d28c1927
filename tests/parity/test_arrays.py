"""Layers from parts: MoeConfig.from_hf of the configuration object and the module's own arrays."""

import pytest
from arrays import experts_of, latent_of, router_biases_of, router_weight_of, shared_of
from comparison import compare
from models import MODELS, Model
from reference import make_reference

import moesaic as mo

# Biases of experts come from files only.
PLAIN = [model for model in MODELS if model.arrays]


@pytest.mark.parametrize("model", PLAIN, ids=lambda model: model.name)
def test_from_parts(model: Model):
    reference = make_reference(model, seed=5)
    config = mo.MoeConfig.from_hf(reference.config, model.layer)
    config = config.replace(router=config.router.replace(**router_biases_of(reference)))
    experts, shared = experts_of(reference), shared_of(reference)
    stack = mo.ExpertStack.from_dense_stacks(experts.get("gate"), experts["up"], experts["down"])
    assert (config.shared != "none") == bool(shared)
    parts = {"latent": latent_of(reference)}
    if shared:
        roles = (shared.get(role) for role in ("gate", "up", "down"))
        parts["shared"] = mo.ExpertStack.from_dense_stacks(
            *(None if weights is None else weights[None] for weights in roles)
        )
        parts["shared_gate"] = shared.get("router")
    compare(mo.MoeLayer(stack, config, router_weight_of(reference), **parts), reference)

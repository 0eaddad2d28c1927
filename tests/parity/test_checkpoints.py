"""Checkpoints of one model in each form: router, experts and shared experts of one layer."""

from pathlib import Path
from typing import Any

import pytest
from comparison import compare
from models import MODELS, Model
from reference import make_reference
from safetensors.torch import save_file

import moesaic as mo


def _state_dict(model: Any, folder: Path) -> None:
    """The module's own names, as training scripts save them."""
    tensors = {name: values.contiguous().clone() for name, values in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    model.config.save_pretrained(folder)


#: Names and shapes of published checkpoints, of transformers 5, and of its modules.
FORMS = {
    "original": lambda model, folder: model.save_pretrained(folder),
    "v5": lambda model, folder: model.save_pretrained(folder, save_original_format=False),
    "state_dict": _state_dict,
}


@pytest.mark.parametrize(
    "model", [model for model in MODELS if model.saved], ids=lambda model: model.name
)
def test_saved_by_transformers(model: Model, tmp_path):
    reference = make_reference(model)
    call = {"token_ids": reference.tokens} if model.hashed else {}
    for form, save in FORMS.items():
        folder = tmp_path / form
        folder.mkdir()
        save(reference.model, folder)
        with mo.MoeLayer.from_safetensors(folder, model.layer) as layer:
            compare(layer, reference, **call)

"""Every tensor of a MoE block is read, is known to mean nothing, or is an error that names it."""

import numpy as np
import pytest
from files import write_checkpoint
from hf_experts import BASE, LAYER, E, H, I, codes, fp4, per_expert, weights, write
from int4_files import LAYER as INT4_LAYER
from int4_files import Model

import moesaic as mo
from moesaic.safetensors.reader import Checkpoint

SIZES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


def floats():
    return per_expert(*weights()), {}


def fp8():
    tensors, types = {}, {}
    for name, (n, k) in SIZES.items():
        for e in range(E):
            base = f"{BASE}.{e}.{name}"
            tensors |= {f"{base}.weight": codes((n, k), e)}
            tensors |= {f"{base}.weight_scale": np.ones((n, 1), np.float32)}
            types[f"{base}.weight"] = "F8_E4M3"
    return tensors, types


def mxfp4():
    tensors = {}
    for name, (n, k) in SIZES.items():
        for e in range(E):
            base = f"{BASE}.{e}.{name}"
            tensors[f"{base}.weight_packed"] = fp4(n, k, e)[0]
            tensors[f"{base}.weight_scale"] = np.full((n, k // 32), 127, np.uint8)
    return tensors, {}


def nvfp4():
    tensors, types = {}, {}
    for name, (n, k) in SIZES.items():
        for e in range(E):
            base = f"{BASE}.{e}.{name}"
            tensors[f"{base}.weight"] = fp4(n, k, e)[0]
            tensors[f"{base}.weight_scale"] = np.full((n, k // 16), 0x38, np.uint8)
            tensors[f"{base}.weight_scale_2"] = np.array(0.5, np.float32)
            types[f"{base}.weight_scale"] = "F8_E4M3"
    return tensors, types


FORMS = {"floats": floats, "fp8": fp8, "mxfp4": mxfp4, "nvfp4": nvfp4}
#: Tensors that change the values, whatever the form of the experts is.
MEANING = {
    "weight_scale_inv": np.ones(1, np.float32),
    "weight_scale_2": np.array(7, np.float32),
    "weight_global_scale": np.array([7], np.float32),
    "weight_g_idx": np.zeros(H, np.int32),
    "pre_quant_scale": np.full(H, 2, np.float32),
    "weight_zero_point": np.zeros((I, 1), np.float32),
    "weight_scale": np.ones((I, 1), np.float32),
    "lora_A.weight": np.zeros((4, H), np.float32),
    "weight_of_next_year": np.zeros(1, np.float32),
}
READ = {
    "floats": (),
    "fp8": ("weight_zero_point", "weight_scale"),
    "mxfp4": ("weight_scale",),
    "nvfp4": ("weight_scale_2", "weight_scale"),
}
HARMLESS = {
    "input_scale": np.array(0.5, np.float32),
    "input_scale_ub": np.array(0.5, np.float32),
    "input_global_scale": np.array([0.5], np.float32),
    "input_zero_point": np.zeros(1, np.int8),
    "activation_scale": np.array(0.5, np.float32),
    "output_scale": np.array(0.5, np.float32),
}


@pytest.mark.parametrize("extra", MEANING)
@pytest.mark.parametrize("form", FORMS)
def test_what_was_not_read_is_named(tmp_path, form, extra):
    if extra in READ[form]:
        return
    tensors, types = FORMS[form]()
    name = f"{BASE}.1.up_proj.{extra}"
    tensors[name] = MEANING[extra]
    with pytest.raises(mo.UnsupportedError, match=r"experts\.1\.up_proj\.") as error:
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    # Either of two scales of one kind may be the one that is left.
    assert extra in str(error.value) or extra == "weight_scale_inv"


@pytest.mark.parametrize("extra", MEANING)
def test_an_extra_tensor_of_a_gptq_matrix(tmp_path, extra):
    model = Model()
    name = f"model.layers.{INT4_LAYER}.mlp.experts.1.up_proj.{extra}"
    model.tensors[name] = MEANING[extra]
    with pytest.raises(mo.UnsupportedError, match=r"experts\.1\.up_proj\."):
        mo.ExpertStack.load_from_safetensors(model.write(tmp_path), INT4_LAYER)


@pytest.mark.parametrize("extra", ["qzeros", "scales", "g_idx"])
def test_parts_of_integers_beside_other_values(tmp_path, extra):
    tensors, types = fp8()
    tensors[f"{BASE}.1.up_proj.{extra}"] = np.zeros((3, 3), np.int32)
    with pytest.raises(mo.UnsupportedError, match=rf"experts\.1\.up_proj\.{extra}"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


@pytest.mark.parametrize("form", FORMS)
def test_scales_of_activations_are_harmless(tmp_path, form):
    tensors, types = FORMS[form]()
    plain = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    for suffix, values in HARMLESS.items():
        tensors |= {f"{BASE}.{e}.up_proj.{suffix}": values for e in range(E)}
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    for role in ("gate", "up", "down"):
        np.testing.assert_array_equal(stack.dequantize(role, 1), plain.dequantize(role, 1))


def read_names(folder, layer, monkeypatch):
    """The tensors whose values a load reads."""
    names, raw = set(), Checkpoint.raw

    def noted(self, name, index=None):
        names.add(name)
        return raw(self, name, index)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "raw", noted)
        mo.ExpertStack.load_from_safetensors(folder, layer)
    return names


@pytest.mark.parametrize("form", FORMS)
def test_what_counts_as_read_is_read(tmp_path, form, monkeypatch):
    """That no form claims a tensor and leaves it."""
    tensors, types = FORMS[form]()
    if form == "fp8":
        tensors |= {
            f"{BASE}.{e}.up_proj.weight_zero_point": np.zeros((I, 1), np.int8) for e in range(E)
        }
    tensors |= {f"{BASE}.{e}.up_proj.bias": np.ones(I, np.float32) for e in range(E)}
    folder = write(tmp_path, tensors, types=types)
    assert read_names(folder, LAYER, monkeypatch) == set(tensors)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq", "pack_quantized"])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "one expert in floats"])
def test_what_counts_as_read_of_integers_is_read(tmp_path, form, mixed, monkeypatch):
    model = Model(form=form)
    base = f"model.layers.{INT4_LAYER}.mlp.experts.1.up_proj"
    if mixed:
        for name in [name for name in model.tensors if name.startswith(base)]:
            del model.tensors[name]
        model.tensors[f"{base}.weight"] = np.ones((32, 64), np.float32)
    names = read_names(model.write(tmp_path), INT4_LAYER, monkeypatch)
    assert names == set(model.tensors)


LAYER_CONFIG = {
    "hidden_size": H, "num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": I,
    "norm_topk_prob": True, "num_hidden_layers": 3, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["mlp.gate.weight_scale", "mlp.experts.1.up_proj.weight_scale", "mlp.new.weight"]
)
def test_what_a_layer_did_not_read_is_named(tmp_path, name):
    tensors = per_expert(*weights()) | {
        f"model.layers.{LAYER}.mlp.gate.weight": np.ones((E, H), np.float32)
    }
    config = {"model_type": "qwen3_moe", **LAYER_CONFIG}
    mo.MoeLayer.from_safetensors(write_checkpoint(tmp_path, tensors, config), LAYER)
    tensors[f"model.layers.{LAYER}.{name}"] = np.ones((E, 1), np.float32)
    with pytest.raises(mo.UnsupportedError, match=name.replace(".", r"\.")):
        mo.MoeLayer.from_safetensors(write_checkpoint(tmp_path, tensors, config), LAYER)


@pytest.mark.parametrize(
    "suffixes",
    [("_packed", "_scale", "_shape"), ("_qdata", "_scale", "_zero"), ("_scale", "_zero", "_bias")],
)
@pytest.mark.parametrize("config", [None, 3, {}, {"quant_method": "compressed-tensors"}])
def test_stacked_tensors_of_unknown_forms_are_errors_of_this_package(tmp_path, suffixes, config):
    tensors = {
        f"{BASE}.{name}{suffix}": np.ones((E, 2, 2), np.int32)
        for name in ("gate_up_proj", "down_proj")
        for suffix in suffixes
    }
    folder = write(tmp_path, tensors, quantization_config=config)
    for load in (mo.ExpertStack.load_from_safetensors, mo.MoeLayer.from_safetensors):
        with pytest.raises(mo.Error):
            load(folder, LAYER)

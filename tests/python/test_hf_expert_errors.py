"""Experts in safetensors that are wrong in one place: the error names the tensor."""

import contextlib

import numpy as np
import pytest
from hf_experts import (
    BASE,
    LAYER,
    E,
    H,
    I,
    f32_scales,
    fp8_experts,
    fused_tensors,
    per_expert,
    weights,
    write,
)

import moesaic as mo


def fp8_tensors():
    tensors, _, types = fp8_experts((128, 128), f32_scales, "weight_scale_inv")
    return tensors, types


ONE = f"{BASE}.1.up_proj"
BAD_FLOATS = {
    "missing": (f"{ONE}.weight", None),
    "rows": (f"{ONE}.weight", lambda w: w[:-1]),
    "columns": (f"{ONE}.weight", lambda w: w[:, :-1]),
    "rank": (f"{ONE}.weight", lambda w: w[None]),
    "empty": (f"{ONE}.weight", lambda w: w[:0]),
    "integers": (f"{ONE}.weight", lambda w: w.astype(np.int32)),
    "bias": (f"{ONE}.bias", lambda w: np.zeros(I + 1, np.float32)),
}


@pytest.mark.parametrize("case", BAD_FLOATS)
def test_bad_floats_are_named(tmp_path, case):
    name, change = BAD_FLOATS[case]
    tensors = per_expert(*weights())
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    with pytest.raises(mo.FormatError, match=name.replace(".", r"\.")):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


def test_all_down_matrices_missing(tmp_path):
    tensors = {n: w for n, w in per_expert(*weights()).items() if "down_proj" not in n}
    with pytest.raises(mo.FormatError, match="down"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


def test_bias_of_some_experts_only(tmp_path):
    tensors = per_expert(*weights()) | {f"{ONE}.bias": np.zeros(I, np.float32)}
    with pytest.raises(mo.ShapeError, match="up bias"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("gate_up_proj", lambda w: w[:-1]),
        ("gate_up_proj", lambda w: w[:, :-1]),
        ("gate_up_proj", lambda w: w[:, :, :-1]),
        ("gate_up_proj", lambda w: w[0]),
        ("gate_up_proj", lambda w: w[:0]),
        ("down_proj", lambda w: w[:-1]),
        ("down_proj", lambda w: w.transpose(0, 2, 1)),
    ],
)
def test_bad_fused_shapes(tmp_path, part, change):
    tensors = fused_tensors()
    tensors[f"{BASE}.{part}"] = change(tensors[f"{BASE}.{part}"])
    with pytest.raises(mo.FormatError, match=r"gate_up_proj|down_proj"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


def test_fused_and_apart_at_once(tmp_path):
    with pytest.raises(mo.FormatError, match="one set of experts"):
        mo.ExpertStack.load_from_safetensors(
            write(tmp_path, fused_tensors() | per_expert(*weights())), LAYER
        )
    tensors = per_expert(*weights())
    tensors[f"{BASE}.0.gate_up_proj.weight"] = np.zeros((2 * I, H), np.float32)
    with pytest.raises(mo.FormatError, match="either fused or apart"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("weight_scale_inv", None),
        ("weight_scale_inv", lambda s: s[:, :0]),
        ("weight_scale_inv", lambda s: np.concatenate([s] * 80)),
        ("weight_scale_inv", lambda s: s.reshape(1, 1, -1)),
        ("weight_scale_inv", lambda s: s.astype(np.int32)),
        ("weight_scale_inv", lambda s: s * np.float32(np.nan)),
        ("weight_scale_inv", lambda s: s * np.float32(np.inf)),
        ("weight", lambda w: w | 0x7F),
    ],
)
def test_bad_fp8_is_named(tmp_path, tensor, change):
    tensors, types = fp8_tensors()
    name = f"{ONE}.{tensor}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    with pytest.raises(mo.FormatError, match=name.replace(".", r"\.")):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


def test_unknown_float8(tmp_path):
    tensors, types = fp8_tensors()
    types[f"{ONE}.weight"] = "F8_E8M0"
    with pytest.raises(mo.FormatError, match=r"1\.up_proj\.weight.*F8_E8M0"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


def test_rows_that_are_no_whole_blocks(tmp_path):
    """MXFP4 of gpt-oss says 32 columns in 16 bytes."""
    tensors = {
        f"{BASE}.gate_up_proj_blocks": np.zeros((E, 2 * I, 4, 15), np.uint8),
        f"{BASE}.gate_up_proj_scales": np.zeros((E, 2 * I, 4), np.uint8),
        f"{BASE}.down_proj_blocks": np.zeros((E, H, 2, 16), np.uint8),
        f"{BASE}.down_proj_scales": np.zeros((E, H, 2), np.uint8),
    }
    with pytest.raises(mo.FormatError, match="gate_up_proj_blocks"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, "gpt_oss"), LAYER)


@pytest.mark.parametrize("config", [{"num_experts": 1 << 40}, {}], ids=["configured", "named"])
def test_experts_without_end(tmp_path, config):
    """A count or a number of an expert takes no memory before there are tensors for it."""
    tensors = per_expert(*weights())
    if not config:
        tensors[f"{BASE}.{1 << 40}.up_proj.weight"] = np.zeros((I, H), np.float32)
    with pytest.raises(mo.FormatError, match=rf"experts\.{E}\."):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, **config), LAYER)


@pytest.mark.parametrize("place", ["text_config", "quantization_config"])
@pytest.mark.parametrize("value", [3, "x", [None], True, 1.5])
def test_a_part_of_the_configuration_that_is_no_object(tmp_path, place, value):
    """Nothing but this package's errors, from a layer and from a stack."""
    tensors, types = fp8_tensors()
    folder = write(tmp_path, tensors, types=types, **{place: value})
    for load in (mo.ExpertStack.load_from_safetensors, mo.MoeLayer.from_safetensors):
        with contextlib.suppress(mo.Error):
            load(folder, LAYER)

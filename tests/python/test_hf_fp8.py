"""FP8 experts from safetensors, with every shape of scales."""

import pytest
from hf_experts import LAYER, check, e8m0_scales, f32_scales, fp8_experts, write

import moesaic as mo


@pytest.mark.parametrize(
    ("block", "suffix", "shape", "config"),
    [
        ((128, 128), "weight_scale_inv", None, None),
        ((64, 32), "weight_scale_inv", None, [64, 32]),
        ((1, 0), "weight_scale", None, None),
        ((0, 0), "weight_scale", (), None),
    ],
    ids=["blocks", "other blocks", "rows", "tensor"],
)
def test_fp8(tmp_path, block, suffix, shape, config):
    tensors, values, types = fp8_experts(block, f32_scales, suffix, shape)
    quantization = {"quant_method": "fp8", "weight_block_size": config}
    folder = write(tmp_path, tensors, types=types, quantization_config=quantization)
    rounded = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    assert set(rounded.quants.values()) == {"BF16"}
    assert "F8_E4M3" in str(rounded.report)
    check(rounded, values, exact=2.0**-8)
    exact = mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32")
    check(exact, values, exact=2.0**-23)


def test_mxfp8_is_exact_in_bf16(tmp_path):
    tensors, values, types = fp8_experts((1, 32), e8m0_scales, "weight_scale_inv")
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    assert set(stack.quants.values()) == {"BF16"}
    check(stack, values)


def test_power_of_two_blocks(tmp_path):
    tensors, values, types = fp8_experts((128, 128), e8m0_scales, "scale")
    types |= {name: "F8_E8M0" for name in tensors if name.endswith(".scale")}
    check(
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER), values
    )

"""FP8 experts from safetensors, with every shape of scales."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hf_experts import BASE, LAYER, E, check, e4m3, e8m0_scales, f32_scales, fp8_experts, write
from oracle import rel_l2
from saved import assert_same
from values import normal, poisoned

import moesaic as mo
from moesaic.safetensors import read_header

#: Whole blocks of 128 columns, and rows that end in the middle of one of 128 x 128.
HIDDEN, INNER = 384, 256
KEPT = {
    "blocks": ((128, 128), "weight_scale_inv", None),
    "wide blocks": ((64, 256), "weight_scale_inv", None),
    "rows": ((1, 0), "weight_scale", None),
    "tensor": ((0, 0), "weight_scale", ()),
    "groups of columns": ((1, 128), "weight_scale", None),
}
ROLES = ("gate", "up", "down")


def kept_experts(case: str, hidden: int = HIDDEN, inner: int = INNER, scale_of=f32_scales):
    """The tensors, values and types of a checkpoint whose experts stay as they are."""
    block, suffix, shape = KEPT[case]
    return fp8_experts(block, scale_of, suffix, shape, hidden, inner)


def write_kept(folder: Path, case: str, **sizes) -> Path:
    """Its configuration is only read where a grid of scales could mean several blocks."""
    tensors, _, types = kept_experts(case, **sizes)
    rows, cols = KEPT[case][0]
    size = [rows, cols] if rows * cols > 1 else None
    config = {"quant_method": "fp8", "weight_block_size": size}
    return write(folder, tensors, types=types, quantization_config=config)


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


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("case", KEPT)
def test_codes_and_scales_stay(tmp_path, case):
    """Every weight is its code times its scale, rounded once."""
    _, values, _ = kept_experts(case)
    folder = write_kept(tmp_path, case)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    assert set(stack.quants.values()) == {"E4M3"}
    assert stack.nbytes == E * 3 * HIDDEN * INNER * 132 // 128
    report = stack.report.roles[0]
    assert (report.stored, report.kept, report.decision) == ("E4M3", "E4M3", "repacked")
    assert "F8_E4M3" in report.source
    for role, matrices in zip(ROLES, values, strict=True):
        for e in range(E):
            # Codes have 4 bits and scales 24, so that their product is exact in f64.
            np.testing.assert_array_equal(bits(stack.dequantize(role, e)), bits(matrices[e]))
            np.testing.assert_array_equal(stack.encoded(role, e), stack.encoded(role)[e])


@pytest.mark.parametrize("case", KEPT)
def test_products_with_kept_codes(tmp_path, case):
    folder = write_kept(tmp_path, case)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    decoded = mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32")
    logits = normal(70, E, seed=1)
    for tokens in (1, 3, 70):
        x = normal(tokens, HIDDEN, seed=tokens, scale=0.1)
        got, want = (
            mo.moe_forward(x, logits[:tokens], one, top_k=2, out=poisoned(tokens, HIDDEN))
            for one in (stack, decoded)
        )
        assert rel_l2(got, want) < 2e-6
    assert "gemm_e4m3" in str(mo.explain(layer_of(stack), num_tokens=1))


def test_other_floats_on_request(tmp_path):
    _, values, _ = kept_experts("blocks")
    folder = write_kept(tmp_path, "blocks")
    for name, exact in (("bf16", 2.0**-8), ("f32", True)):
        stack = mo.ExpertStack.load_from_safetensors(folder, LAYER, name)
        assert set(stack.quants.values()) == {name.upper()}
        check(stack, [[v.astype(np.float32) for v in role] for role in values], exact=exact)


def test_rows_that_blocks_do_not_fit(tmp_path):
    """The down matrices alone have rows of 192 columns."""
    folder = write_kept(tmp_path, "rows", inner=192)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    assert stack.quants == {"gate": "E4M3", "up": "E4M3", "down": "BF16"}
    decoded = mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32")
    x, logits = normal(5, HIDDEN, scale=0.1), normal(5, E)
    got, want = (mo.moe_forward(x, logits, one, top_k=2) for one in (stack, decoded))
    assert rel_l2(got, want) < 4e-3


def test_an_expert_without_scales_that_fit(tmp_path):
    """Experts of a role have one type: here the one of two that holds both."""
    tensors, _, types = kept_experts("rows")
    name = f"{BASE}.1.up_proj"
    fine = fp8_experts((1, 32), f32_scales, "weight_scale", None, HIDDEN, INNER)[0]
    tensors[f"{name}.weight_scale"] = fine[f"{name}.weight_scale"]
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    assert stack.quants == {"gate": "E4M3", "up": "BF16", "down": "E4M3"}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_nan_is_refused(tmp_path, case, code):
    tensors, _, types = kept_experts(case)
    tensors[f"{BASE}.2.down_proj.weight"][5, 7] = code
    with pytest.raises(mo.FormatError, match=r"2\.down_proj\.weight.*NaN"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)


def test_products_beyond_f32_are_refused(tmp_path):
    tensors, _, types = kept_experts("tensor")
    name = f"{BASE}.0.up_proj.weight"
    tensors[f"{name}_scale"] = np.float32(1e36).reshape(())
    with pytest.raises(mo.FormatError, match="products that f32 holds"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    small = np.minimum(tensors[name] & 0x7F, 0x38)  # 1 at most
    tensors[name] = small
    stack = mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, types=types), LAYER)
    np.testing.assert_array_equal(
        stack.dequantize("up", 0), e4m3(small).astype(np.float32) * np.float32(1e36)
    )


# --- stacks of E4M3 --------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path) -> mo.ExpertStack:
    return mo.ExpertStack.load_from_safetensors(write_kept(tmp_path, "blocks"), LAYER)


def test_layouts_share_bits(stack):
    roles = [(stack.encoded(role), "E4M3") for role in ROLES]
    in_rows = mo.ExpertStack.from_encoded(*roles, layout="file")
    x, logits = normal(9, HIDDEN), normal(9, E)
    want = mo.moe_forward(x, logits, stack, top_k=2)
    np.testing.assert_array_equal(mo.moe_forward(x, logits, in_rows, top_k=2), want)


def test_codes_of_nan_are_refused_where_weights_come_in(stack):
    rows = [stack.encoded(role) for role in ROLES]
    rows[2][1, 3, 132 + 4 + 5] = 0xFF
    match = "row 387, column 133: expected an E4M3 number"  # rows of all experts, 384 each
    with pytest.raises(mo.ConfigError, match=f"down at {match}"):
        mo.ExpertStack.from_encoded(*((data, "E4M3") for data in rows))
    with pytest.raises(mo.ConfigError, match="down at row 3"):
        stack.with_expert(1, down=(rows[2][1], "E4M3"))
    with pytest.raises(mo.ConfigError, match="data at row 3"):
        mo.QuantMatrix.from_encoded(rows[2][1], "E4M3")


def test_editing(stack):
    """A new expert is encoded; the others keep their bytes."""
    values = normal(INNER, HIDDEN, seed=4)
    changed = stack.with_expert(1, up=values)
    assert changed.quants == stack.quants
    np.testing.assert_array_equal(changed.encoded("up", 1), mo.quantize(values, "E4M3"))
    assert rel_l2(changed.dequantize("up", 1), values) < 0.03
    for e in (0, 2):
        np.testing.assert_array_equal(changed.encoded("up", e), stack.encoded("up", e))
    few = changed.select([2, 1])
    np.testing.assert_array_equal(few.encoded("up", 1), changed.encoded("up", 1))
    found = mo.compare(stack, changed)
    assert found.weights["up"][0] == 0 and found.weights["up"][1] > 0


def test_pickles_from_its_files(tmp_path):
    folder = write_kept(tmp_path, "blocks")
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    again = pickle.loads(pickle.dumps(stack))
    assert again.quants == stack.quants
    np.testing.assert_array_equal(again.encoded("down"), stack.encoded("down"))


def test_encoded_expert_positions(stack):
    with pytest.raises(mo.ShapeError, match="expected 0 to 2"):
        stack.encoded("up", 3)


# --- files -----------------------------------------------------------------------------------


def layer_of(stack: mo.ExpertStack) -> mo.MoeLayer:
    fields = {
        "model_type": "qwen3_moe", "hidden_size": HIDDEN, "num_hidden_layers": 4,
        "moe_intermediate_size": stack.intermediate_size, "num_experts": E,
        "num_experts_per_tok": 2, "norm_topk_prob": True,
    }  # fmt: skip
    return mo.MoeLayer(stack, mo.MoeConfig.from_hf(fields, 0), normal(E, HIDDEN, seed=8))


@pytest.mark.parametrize(
    ("case", "suffix", "shape"),
    [
        ("blocks", "weight_scale_inv", [3, 2]),
        ("tensor", "weight_scale_inv", [3, 2]),
        ("rows", "weight_scale", [384, 1]),
        ("groups of columns", "weight_scale", [384, 2]),
        ("wide blocks", "weight_scale", [384, 2]),
    ],
)
def test_checkpoints_come_back(tmp_path, case, suffix, shape):
    (tmp_path / "old").mkdir()
    stack = mo.ExpertStack.load_from_safetensors(write_kept(tmp_path / "old", case), LAYER)
    layer = layer_of(stack)
    mo.save_safetensors(tmp_path / "new", {3: layer}, model_type="qwen3_moe")
    header = read_header(tmp_path / "new" / "model.safetensors")
    name = "model.layers.3.mlp.experts.1.down_proj"
    assert header[f"{name}.weight"].dtype == "F8_E4M3"
    assert list(header[f"{name}.{suffix}"].shape) == shape
    assert_same(layer, mo.MoeLayer.from_safetensors(tmp_path / "new", 3))


def test_checkpoints_with_other_experts_beside(tmp_path):
    """BF16 where blocks do not fit, and a layer of floats."""
    (tmp_path / "old").mkdir()
    folder = write_kept(tmp_path / "old", "rows", inner=192)
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    config = layer_of(mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32"))
    layers = [config.replace(stack=stack), config]
    mo.save_safetensors(tmp_path / "new", layers, model_type="qwen3_moe")
    for number, layer in enumerate(layers):
        assert_same(layer, mo.MoeLayer.from_safetensors(tmp_path / "new", number))
    said = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.experts.0.down_proj" in said["ignore"]


def test_checkpoints_decode_on_request(tmp_path, stack):
    mo.save_safetensors(tmp_path / "new", layer_of(stack), model_type="qwen3_moe", dequantize="f32")
    again = mo.MoeLayer.from_safetensors(tmp_path / "new", 0)
    np.testing.assert_array_equal(again.stack.dequantize("up"), stack.dequantize("up"))
    assert again.stack.quants["up"] == "F32"


def test_a_file_of_gguf_refuses_it(tmp_path, stack):
    with pytest.raises(mo.UnsupportedError, match=r"gate: .*GGUF has, got E4M3.*save_safetensors"):
        layer_of(stack).save(tmp_path / "new.gguf")
    with pytest.raises(mo.ConfigError, match="gate_type: expected a type that GGUF has, got E4M3"):
        mo.testing.write_moe_gguf(tmp_path / "new.gguf", gate_type="E4M3")
    assert not (tmp_path / "new.gguf").exists()

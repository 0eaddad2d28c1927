"""GPTQ, AWQ and compressed-tensors checkpoints: every form, shards, configs, memory at load."""

import json
import sys

import numpy as np
import pytest
from files import bf16_bits, write_safetensors
from int4 import layer_f64
from int4_files import LAYER, MIXTRAL, SIZE, E, H, Model, expect_format_error
from load_memory import peak_of_load
from oracle import rel_l2
from values import normal, random_routing

import moesaic as mo


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"zeros": False},
        {"names": MIXTRAL, "zeros": False},
        {"fused": True},
        {"form": "gptq_v2"},
        {"form": "awq"},
        {"form": "awq", "fused": True},
        {"form": "pack_quantized"},
        {"form": "pack_quantized", "order": "shared", "fused": True},
        {"form": "pack_quantized", "group": -1, "zeros": False},
        {"order": "shared"},
        {"order": "per_expert", "fused": True},
        {"scale_type": np.float32},
        {"group": -1},
        {"inter": 40, "group": -1, "zeros": False},
    ],
    ids=str,
)
def test_checkpoints(tmp_path, recipe):
    Model(**recipe).check(Model(**recipe).write(tmp_path))


def test_shards_and_places(tmp_path):
    model = Model()
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    model.write(sharded, shards=3, in_config=False)
    model.check(sharded)
    model.check(str(sharded / "model.safetensors.index.json"))
    one = tmp_path / "one"
    one.mkdir()
    model.write(one, file="other-name.safetensors")
    model.check(one / "other-name.safetensors")
    two = tmp_path / "two"
    two.mkdir()
    model.write(two, shards=2)
    (two / "model.safetensors.index.json").unlink()
    model.check(two)


def test_awq_config_of_autoawq(tmp_path):
    model = Model(form="awq")
    model.config = {"zero_point": True, "q_group_size": SIZE, "w_bit": 4, "version": "GEMM"}
    folder = model.write(tmp_path, in_config=False)
    (folder / "quantize_config.json").rename(folder / "quant_config.json")
    model.check(folder)


def test_bf16_scales(tmp_path):
    model = Model()
    path = model.write(tmp_path) / "model.safetensors"
    scales = [name for name in model.tensors if name.endswith(".scales")]
    tensors = model.tensors | {name: bf16_bits(model.tensors[name]) for name in scales}
    write_safetensors(path, tensors, dict.fromkeys(scales, "BF16"))
    stack = mo.ExpertStack.load_from_safetensors(tmp_path, LAYER)
    for e in range(E):
        got = stack.dequantize("down", e)
        np.testing.assert_allclose(got, model.down.weights[e].T, rtol=2**-7)
    assert stack.marlin("down").unpack(0)["scales"].view(np.uint32).max() & 0xFFFF == 0


def test_biases(tmp_path):
    """Of zeros, they are left out; others keep the layer from being INT4, without a loss."""
    model = Model()
    names = [n for n in model.tensors if n.endswith("down_proj.qweight")]
    for i, name in enumerate(names):
        model.tensors[name.replace("qweight", "bias")] = np.zeros(H, np.float16)
        if i == 0:
            model.check(model.write(tmp_path))
    model.check(model.write(tmp_path))
    for i, name in enumerate(names):
        model.tensors[name.replace("qweight", "bias")][3] = i + 1
    stack = mo.ExpertStack.load_from_safetensors(model.write(tmp_path), LAYER)
    assert stack.kind == "stacked" and set(stack.quants.values()) == {"Q8_0"}
    x, routing = normal(5, H), random_routing(5, E, 2)
    want = layer_f64(model.gate_up, model.down, routing, x)
    want[:, 3] += ((routing.topk_ids + 1) * routing.topk_weights).sum(1)
    assert rel_l2(mo.moe_forward_cpu(x, routing, stack), want) < 1e-5


def test_dequantize_and_progress(tmp_path):
    model = Model()
    folder = model.write(tmp_path)
    seen = []
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32", progress=seen.append)
    assert stack.kind == "stacked"
    assert stack.marlin("down") is None
    assert len(seen) > E
    assert [p.done_bytes for p in seen[: 3 * E]] == sorted(p.done_bytes for p in seen[: 3 * E])
    with pytest.raises(mo.OperationCancelled):
        mo.ExpertStack.load_from_safetensors(folder, LAYER, progress=lambda p: False)

    def fail(progress):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mo.ExpertStack.load_from_safetensors(folder, LAYER, progress=fail)


def test_compressed_tensors_configs(tmp_path):
    model = Model(form="pack_quantized", zeros=False)
    for name in [n for n in model.tensors if n.endswith("weight_zero_point")]:
        del model.tensors[name]
    # Symmetric groups of 32 with f16 scales are blocks of Q4_0; other scales stay INT4.
    stack = model.check(model.write(tmp_path), kind="stacked")
    assert set(stack.quants.values()) == {"Q4_0"}
    scale = next(n for n in model.tensors if n.endswith("2.up_proj.weight_scale"))
    exact = model.tensors[scale]
    model.tensors[scale] = exact.astype(np.float32)
    model.tensors[scale][0, 0] *= 1 + 2**-20
    assert mo.ExpertStack.load_from_safetensors(model.write(tmp_path), LAYER).kind == "marlin"
    model.tensors[scale] = exact
    shape = next(n for n in model.tensors if n.endswith("up_proj.weight_shape"))
    model.tensors[shape] = model.tensors[shape][::-1]
    expect_format_error(model, tmp_path, r"up_proj\.weight_shape")
    model = Model(form="pack_quantized")
    model.config["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    expect_format_error(model, tmp_path, "at 8 bits")
    model.config["format"] = "int-quantized"
    expect_format_error(model, tmp_path, "format", "UnsupportedError")
    model.config["config_groups"]["group_1"] = {}
    expect_format_error(model, tmp_path, "config_groups", "UnsupportedError")
    model = Model(form="pack_quantized")
    name = next(n for n in model.tensors if n.endswith("down_proj.weight_zero_point"))
    del model.tensors[name]
    expect_format_error(model, tmp_path, r"down_proj\.weight_zero_point")


@pytest.mark.cost
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_at_load(tmp_path):
    """A load holds at most 1.2 times its result."""

    def write(folder, experts, hidden, inter):
        folder.mkdir()
        rng = np.random.default_rng(0)
        tensors = {}
        for e in range(experts):
            for part, k, n in (("w1", hidden, inter), ("w3", hidden, inter), ("w2", inter, hidden)):
                name = f"model.layers.0.block_sparse_moe.experts.{e}.{part}"
                tensors[f"{name}.qweight"] = rng.integers(-99, 99, (k // 8, n), np.int32)
                tensors[f"{name}.scales"] = rng.random((k // 128, n)).astype(np.float16)
                tensors[f"{name}.qzeros"] = np.full((k // 128, n // 8), 0x77777777, np.int32)
        write_safetensors(folder / "model.safetensors", tensors)
        config = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
        (folder / "quantize_config.json").write_text(json.dumps(config))
        return folder

    large = write(tmp_path / "large", 16, 2048, 1024)
    assert peak_of_load(large, write(tmp_path / "small", 2, 256, 128)) < 1.2

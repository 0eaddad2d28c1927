import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import moesaic as mo


def test_metadata(small):
    with mo.GgufFile(small.path) as f:
        assert isinstance(f.metadata, Mapping)
        assert f.metadata["general.architecture"] == "qwen3moe"
        assert f.metadata["qwen3moe.expert_count"] == small.num_experts
        assert set(f.metadata) == set(f.metadata.keys()) and len(f.metadata) == len(
            list(f.metadata)
        )
        assert "no.such.key" not in f.metadata and f.metadata.get("no.such.key", 7) == 7
        with pytest.raises(KeyError):
            f.metadata["no.such.key"]


def test_metadata_types(tmp_path):
    import gguf

    path = tmp_path / "types.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    values = {
        "u8": (writer.add_uint8, 255),
        "i8": (writer.add_int8, -128),
        "u64": (writer.add_uint64, 2**64 - 1),
        "i64": (writer.add_int64, -(2**63)),
        "f32": (writer.add_float32, 0.5),
        "f64": (writer.add_float64, 0.1),
        "yes": (writer.add_bool, True),
        "text": (writer.add_string, "größer"),
        "ints": (writer.add_array, [1, -2, 3]),
        "floats": (writer.add_array, [0.5, 1.5]),
        "flags": (writer.add_array, [True, False]),
        "texts": (writer.add_array, ["a", "", "ü"]),
    }
    for key, (add, value) in values.items():
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with mo.GgufFile(path) as f:
        for key, (_, value) in values.items():
            assert f.metadata[key] == value, key
            assert type(f.metadata[key]) is type(value), key
        json.dumps(dict(f.metadata.items()))


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors(small, mmap):
    with mo.GgufFile(small.path, mmap=mmap) as f:
        assert isinstance(f.tensors, Mapping) and len(f.tensors) == 8
        tensor = f.tensors["blk.1.ffn_down_exps.weight"]
        assert (tensor.name, tensor.quant) == ("blk.1.ffn_down_exps.weight", "Q6_K")
        shape = (small.num_experts, small.hidden, small.intermediate)
        assert tensor.shape == shape and tensor.nbytes == np.prod(shape) // 256 * 210
        data = tensor.data
        assert data.dtype == np.uint8 and not data.flags.writeable
        assert data.tobytes() == small.path.read_bytes()[tensor.offset :][: tensor.nbytes]
        got = mo.testing.dequantize(data, tensor.quant, shape)
        np.testing.assert_array_equal(got, small.weights[1].down)
        with pytest.raises(KeyError):
            f.tensors["blk.9.ffn_down_exps.weight"]
        del data
        assert (f.moe_layers, f.version, f.nbytes) == ([0, 1], 3, small.path.stat().st_size)
        assert f.shard_paths == [str(small.path)] and f.path == str(small.path)


def test_close(small):
    f = mo.GgufFile(small.path)
    data = f.tensors["blk.0.ffn_up_exps.weight"].data
    with pytest.raises(mo.DeviceError, match="close"):
        f.close()
    assert not f.closed and data[0] >= 0
    del data
    f.close()
    f.close()
    assert f.closed and "closed" in repr(f)
    with pytest.raises(mo.DeviceError, match="closed"):
        print(f.tensors["blk.0.ffn_up_exps.weight"].data)
    with pytest.raises(mo.DeviceError, match="closed"), f:
        pass
    assert f.metadata["general.architecture"] == "qwen3moe"


def test_an_exception_in_the_block_comes_out_as_itself(small):
    held = []
    with pytest.raises(KeyError), mo.GgufFile(small.path) as f:
        held.append(f.tensors["blk.0.ffn_up_exps.weight"].data)
        raise KeyError


def test_errors(tmp_path, small):
    with pytest.raises(FileNotFoundError) as missing:
        mo.GgufFile(tmp_path / "missing.gguf")
    assert missing.value.filename == str(tmp_path / "missing.gguf") and missing.value.errno == 2
    with pytest.raises(OSError):
        mo.GgufFile(tmp_path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGML" + bytes(64))
    with pytest.raises(mo.FormatError, match=r"broken\.gguf"):
        mo.GgufFile(broken)
    broken.write_bytes(small.path.read_bytes()[:5000])
    with pytest.raises(mo.FormatError):
        mo.GgufFile(broken)


def test_config(small):
    with mo.GgufFile(small.path) as f:
        config = mo.MoeConfig.from_gguf(f, 1)
        with pytest.raises(mo.Error, match="block 2"):
            mo.MoeConfig.from_gguf(f, 2)
    sizes = (config.hidden_size, config.intermediate_size, config.num_experts, config.top_k)
    assert sizes == (small.hidden, small.intermediate, small.num_experts, small.top_k)
    assert (config.architecture, config.layer, config.shared) == ("qwen3moe", 1, "none")
    assert config.activation == mo.Activation("swiglu")
    router = config.router
    assert (router.num_experts, router.top_k) == (small.num_experts, small.top_k)
    assert router.score == "softmax" and router.renormalize
    assert mo.RouterConfig(**router.to_dict()) == router != router.replace(score="sigmoid")
    assert config.replace(layer=2) != config == config.replace()
    with pytest.raises(AttributeError):
        config.top_k = 3


def test_unknown_architecture(tmp_path):
    mo.testing.write_moe_gguf(tmp_path / "m.gguf", arch="mamba")
    with mo.GgufFile(tmp_path / "m.gguf") as f, pytest.raises(mo.UnsupportedError, match="mamba"):
        mo.MoeConfig.from_gguf(f, 0)
    assert "qwen3moe" in mo.known_architectures()


def test_activation():
    assert mo.Activation()(2.0, 3.0) == pytest.approx(6 / (1 + np.exp(-2)), rel=1e-6)
    assert mo.Activation("relu_squared")(0.0, 3.0) == 9 and not mo.Activation("relu_squared").gated
    with pytest.raises(mo.ConfigError, match=r"activation: expected swiglu \|.*got 'swish'"):
        mo.Activation("swish")
    for bad in ({"limit": -1.0}, {"beta": 0.0}, {"linear_beta": float("nan")}):
        with pytest.raises(mo.ConfigError, match=next(iter(bad))):
            mo.Activation("situ", **bad)


@pytest.mark.parametrize(
    "arguments",
    [{"top_k": 9}, {"score": "tanh"}, {"num_groups": 3}, {"router_bias": [1.0]}],
)
def test_router_contradictions(arguments):
    with pytest.raises(mo.ConfigError):
        mo.RouterConfig(**{"num_experts": 8, "top_k": 2, **arguments})


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_stands_for_a_file(tmp_path, kind):
    path = tmp_path / "layer.gguf"
    mo.testing.write_moe_gguf(path, num_experts=4, top_k=2)
    x = np.ones((2, 256), np.float32)
    with mo.GgufFile(path) as file:
        want = mo.MoeLayer.from_gguf(file, 0)(x)
        config, kinds = mo.MoeConfig.from_gguf(file, 0), mo.layer_kinds(file)
    np.testing.assert_array_equal(mo.MoeLayer.from_gguf(kind(path), 0)(x), want)
    assert mo.MoeConfig.from_gguf(kind(path), 0) == config
    assert mo.layer_kinds(kind(path)) == kinds
    assert mo.ExpertStack.load_from_gguf(kind(path), 0).num_experts == 4
    assert mo.MoeExpertStore.from_gguf(kind(path)).num_layers == 1


@pytest.mark.parametrize("bad", [None, 3, b"x.gguf", ["x.gguf"]])
def test_other_objects_are_no_files(bad):
    calls = (
        lambda: mo.MoeLayer.from_gguf(bad, 0),
        lambda: mo.ExpertStack.load_from_gguf(bad, 0),
        lambda: mo.MoeExpertStore.from_gguf(bad),
        lambda: mo.MoeConfig.from_gguf(bad, 0),
        lambda: mo.layer_kinds(bad),
    )
    for call in calls:
        with pytest.raises(mo.DTypeError, match="file: expected a GgufFile, or a path"):
            call()


def test_a_path_to_nothing_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        mo.MoeLayer.from_gguf(tmp_path / "none.gguf", 0)

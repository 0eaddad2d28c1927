"""``moesaic convert``: what comes out, in which types, and that a killed one goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ZOO
from files import bf16_bits, write_checkpoint, write_small
from hf_experts import per_expert
from values import expert_weights, normal

import moesaic as mo
from moesaic.cli import main
from moesaic.saving.convert import Types, planned, run, write_plan
from moesaic.saving.tensors import Tensor

gguf = pytest.importorskip("gguf")

E, H, I, K = 3, 64, 96, 2
LAYERS = (1, 2)


def convert(source, target, types: Types, *, other=None, layers=None, architecture=None, **options):
    with planned(source, types, layers, other, architecture) as plan:
        write_plan(plan, Path(target), **options)
    return target


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def encoded(values: np.ndarray, type: str) -> np.ndarray:
    return mo.testing.quantize(np.ascontiguousarray(values, np.float32), type)


def expert_bytes(file: mo.GgufFile, name: str) -> np.ndarray:
    return np.array(file.tensors[name].data)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Two layers of 8 experts in Q8_0, with shared experts."""
    path = tmp_path_factory.mktemp("convert") / "source.gguf"
    write_small(
        path, layers=2, gate_type="Q8_0", down_type="F16", intermediate=256, arch="qwen2moe",
        shared_intermediate=64,
    )  # fmt: skip
    return path


# --- a GGUF file as the source


def test_experts_change_and_all_else_stays(source, tmp_path):
    types = Types(experts="Q4_K", down="Q6_K")
    target = convert(source, tmp_path / "target.gguf", types)
    with mo.GgufFile(source) as old, mo.GgufFile(target) as new:
        assert list(old.tensors) == list(new.tensors)
        assert dict(old.metadata) == dict(new.metadata)
        for name, tensor in old.tensors.items():
            if "_exps." not in name:
                assert new.tensors[name].quant == tensor.quant
                np.testing.assert_array_equal(new.tensors[name].data, tensor.data)
                continue
            type = "Q6_K" if "down" in name else "Q4_K"
            assert (new.tensors[name].quant, new.tensors[name].shape) == (type, tensor.shape)
            values = mo.testing.dequantize(tensor.data, tensor.quant, tensor.shape)
            want = encoded(values, type).reshape(-1)
            np.testing.assert_array_equal(new.tensors[name].data, want)
        for index in (0, 1):
            assert mo.MoeConfig.from_gguf(old, index) == mo.MoeConfig.from_gguf(new, index)
    assert leftovers(tmp_path) == []


def test_the_gguf_package_reads_what_was_written(source, tmp_path):
    target = convert(source, tmp_path / "target.gguf", Types(up="Q5_K"))
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(target)
    for name, entry in old.fields.items():
        if not name.startswith("GGUF."):
            assert new.fields[name].types == entry.types
            assert new.fields[name].contents() == entry.contents()
    types = {tensor.name: tensor.tensor_type.name for tensor in new.tensors}
    assert types["blk.1.ffn_up_exps.weight"] == "Q5_K"
    assert types["blk.1.ffn_gate_exps.weight"] == "Q8_0"  # asked for nothing, so as it is
    assert all(tensor.data_offset % 32 == 0 for tensor in new.tensors)


def test_other_layers_are_copied_or_left_out(source, tmp_path):
    types = Types(experts="Q4_0")
    some = convert(source, tmp_path / "some.gguf", types, layers=[1])
    with mo.GgufFile(some) as file:
        quants = [file.tensors[f"blk.{i}.ffn_up_exps.weight"].quant for i in (0, 1)]
    assert quants == ["Q8_0", "Q4_0"]
    only = convert(source, tmp_path / "only.gguf", types, layers=[1], other="omit")
    with mo.GgufFile(only) as file:
        assert file.moe_layers == [1] and file.metadata["moesaic.content"] == "moe_layers"
        assert all(name.startswith("blk.1.") for name in file.tensors)
        mo.MoeLayer.from_gguf(file, 1).close()


def test_metadata_keeps_its_types_and_bytes(tmp_path):
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "qwen3moe")
    for key, value in {
        "block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "expert_count": 2,
        "expert_used_count": 1, "expert_feed_forward_length": 32,
    }.items():  # fmt: skip
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_custom_alignment(64)
    writer.add_key_value("a.bytes", b"\xff\xfe", gguf.GGUFValueType.STRING)
    writer.add_array("a.list", [b"\xff", b"x"])
    writer.add_key_value("a.i8", -3, gguf.GGUFValueType.INT8)
    writer.add_key_value("a.f64", 0.1, gguf.GGUFValueType.FLOAT64)
    writer.add_key_value(
        "a.u16s", [1, 2], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType.UINT16
    )
    writer.add_uint32("general.file_type", 7)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", normal(2, 32))
    for role in ("gate", "up", "down"):
        writer.add_tensor(f"blk.0.ffn_{role}_exps.weight", normal(2, 32, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    new = gguf.GGUFReader(convert(source, tmp_path / "target.gguf", Types("Q8_0")))
    old = gguf.GGUFReader(source)
    # The type of most weights is another one.
    assert old.fields.keys() - new.fields.keys() == {"general.file_type"}
    for name, entry in new.fields.items():
        if not name.startswith("GGUF."):
            assert entry.types == old.fields[name].types, name
            for part, other in zip(entry.parts, old.fields[name].parts, strict=True):
                np.testing.assert_array_equal(part, other)
    assert all(tensor.data_offset % 64 == 0 for tensor in new.tensors)


def test_shards_and_one_tensor_per_expert(tmp_path):
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=3)
    for key, value in {
        "block_count": 1, "embedding_length": 32, "feed_forward_length": 32, "expert_count": 2,
        "expert_used_count": 1,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", rng.standard_normal((2, 32), np.float32))
    for role in ("gate", "up", "down"):
        for expert in range(2):
            matrix = rng.standard_normal((32, 32), np.float32)
            writer.add_tensor(f"blk.0.ffn_{role}.{expert}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = min(tmp_path.glob("m-*.gguf"))
    with mo.GgufFile(first) as old:
        assert len(old.shard_paths) > 1
        target = convert(first, tmp_path / "target.gguf", Types(experts="Q8_0"))
        with mo.GgufFile(target) as new:
            assert list(new.tensors) == list(old.tensors)
            assert not any(key.startswith("split.") for key in new.metadata)
            assert new.tensors["blk.0.ffn_down.1.weight"].quant == "Q8_0"
            mo.MoeLayer.from_gguf(new, 0).close()


# --- a checkpoint folder as the source


def checkpoint(folder: Path, extra: dict | None = None, **fields) -> Path:
    """Layers 1 and 2 of a model whose layer 0 is dense, with shared experts and attention."""
    tensors = {
        "model.embed_tokens.weight": normal(8, H), "lm_head.weight": normal(8, H),
        "model.norm.weight": bf16_bits(normal(H)), **(extra or {}),
    }  # fmt: skip
    for layer in LAYERS:
        block = f"model.layers.{layer}.mlp"
        matrices = expert_weights(E, H, I, seed=layer)
        tensors |= per_expert(*matrices, base=f"{block}.experts")
        shared = expert_weights(1, H, I, seed=10 + layer)
        for name, matrix in zip(("gate_proj", "up_proj", "down_proj"), shared, strict=True):
            tensors[f"{block}.shared_expert.{name}.weight"] = matrix[0].astype(np.float16)
        tensors[f"{block}.gate.weight"] = normal(E, H, seed=layer)
        tensors[f"{block}.shared_expert_gate.weight"] = normal(1, H, seed=layer)
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = normal(H, H)
    config = {
        "model_type": "qwen2_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
        "num_experts_per_tok": K, "num_hidden_layers": 3, "mlp_only_layers": [0],
        "decoder_sparse_step": 1, "shared_expert_intermediate_size": I, "norm_topk_prob": False,
        **fields,
    }  # fmt: skip
    return write_checkpoint(folder, tensors, config, {"model.norm.weight": "BF16"})


def test_a_folder_becomes_moe_layers(tmp_path):
    folder = checkpoint(tmp_path)
    types = Types(experts="Q8_0", down="Q4_0")
    target = convert(folder, tmp_path / "target.gguf", types)
    x = normal(4, H)
    with mo.GgufFile(target) as file:
        assert file.moe_layers == list(LAYERS)
        assert file.metadata["moesaic.content"] == "moe_layers"
        assert file.metadata["general.architecture"] == "qwen2moe"
        assert not any("attn" in name for name in file.tensors)
        for layer in LAYERS:
            gate, up, down = expert_weights(E, H, I, seed=layer)
            for role, matrix, type in (
                ("gate", gate, "Q8_0"), ("up", up, "Q8_0"), ("down", down, "Q4_0"),
            ):  # fmt: skip
                data = expert_bytes(file, f"blk.{layer}.ffn_{role}_exps.weight")
                np.testing.assert_array_equal(data, encoded(matrix, type).reshape(-1))
            old = mo.MoeLayer.from_safetensors(folder, layer, precision="exact")
            new = mo.MoeLayer.from_gguf(file, layer, precision="exact")
            assert new.config == old.config.replace(architecture="qwen2moe")
            np.testing.assert_array_equal(new.router_weight, old.router_weight)
            difference = np.linalg.norm(new(x) - old(x)) / np.linalg.norm(old(x))
            assert 0 < difference < 0.1
            new.close()


def test_kept_types_are_equal_bit_by_bit(tmp_path):
    """Also the shared experts, which are no routed ones."""
    folder = checkpoint(tmp_path)
    target = convert(folder, tmp_path / "target.gguf", Types(experts="F32"), layers=[2])
    x = normal(4, H)
    with mo.GgufFile(target) as file:
        assert file.tensors["blk.2.ffn_up_shexp.weight"].quant == "F16"
        layer = mo.MoeLayer.from_gguf(file, 2, precision="exact")
        want = mo.MoeLayer.from_safetensors(folder, 2, precision="exact")(x)
        np.testing.assert_array_equal(layer(x), want)
        layer.close()


def test_other_tensors_of_a_folder(tmp_path):
    folder = checkpoint(tmp_path)
    target = convert(folder, tmp_path / "target.gguf", Types("Q8_0"), other="copy")
    with mo.GgufFile(target) as file:
        assert file.metadata["moesaic.content"] == "tensors"
        q = file.tensors["blk.2.attn_q.weight"]
        assert (q.quant, q.shape) == ("F32", (H, H))
        np.testing.assert_array_equal(q.data.view(np.float32), normal(H, H).reshape(-1))
        assert {"token_embd.weight", "output.weight"} <= file.tensors.keys()
        assert file.tensors["output_norm.weight"].quant == "F32"  # BF16 in the checkpoint
        mo.MoeLayer.from_gguf(file, 1).close()
    with pytest.raises(mo.ConfigError, match="layers: expected all"):
        convert(folder, tmp_path / "t.gguf", Types("Q8_0"), other="copy", layers=[1])
    with pytest.raises(mo.UnsupportedError, match=r"other: expected omit.*'gpt-oss'"):
        (tmp_path / "oss").mkdir()
        oss = folder_of("gpt_oss", tmp_path / "oss")
        convert(oss, tmp_path / "t.gguf", Types("Q8_0"), other="copy")


def test_a_tensor_without_a_name_is_not_left_out(tmp_path):
    folder = checkpoint(tmp_path, extra={"model.layers.1.novelty.weight": normal(4, 4)})
    with pytest.raises(mo.UnsupportedError, match=r"model\.layers\.1\.novelty\.weight"):
        convert(folder, tmp_path / "t.gguf", Types("Q8_0"), other="copy")
    convert(folder, tmp_path / "t.gguf", Types("Q8_0"))


def folder_of(name: str, folder: Path, width: int = I) -> Path:
    """Checkpoints in other layouts: fused and interleaved with biases; FP8; NVFP4; INT4."""
    rng = np.random.default_rng(7)
    experts, types = {}, {}
    base, config = "model.layers.0.mlp.experts", {}
    router = {"model.layers.0.mlp.gate.weight": normal(E, H)}
    if name == "gpt_oss":
        gate, up, down = expert_weights(E, H, width)
        both = np.stack([gate, up], axis=2).reshape(E, 2 * width, H)
        experts = {
            f"{base}.gate_up_proj": both.transpose(0, 2, 1),
            f"{base}.down_proj": down.transpose(0, 2, 1),
            f"{base}.gate_up_proj_bias": normal(E, 2 * width),
            f"{base}.down_proj_bias": normal(E, H),
        }
        router = {
            "model.layers.0.mlp.router.weight": normal(E, H),
            "model.layers.0.mlp.router.bias": normal(E),
        }
        config = {
            "model_type": "gpt_oss",
            "num_local_experts": E,
            "intermediate_size": width,
        }
    for e in range(E):
        for part, (n, k) in (
            ("gate_proj", (width, H)), ("up_proj", (width, H)), ("down_proj", (H, width)),
        ):  # fmt: skip
            one = f"{base}.{e}.{part}"
            if name == "fp8":
                experts[f"{one}.weight"] = rng.integers(0, 0x78, (n, k)).astype(np.uint8)
                experts[f"{one}.weight_scale_inv"] = np.full((1, 1), 0.01 + e, np.float32)
                types[f"{one}.weight"] = "F8_E4M3"
            if name == "nvfp4":
                experts[f"{one}.weight"] = rng.integers(0, 256, (n, k // 2)).astype(np.uint8)
                experts[f"{one}.weight_scale"] = rng.integers(40, 60, (n, k // 16)).astype(np.uint8)
                experts[f"{one}.weight_scale_2"] = np.array(0.25 * (e + 1), np.float32)
                types[f"{one}.weight_scale"] = "F8_E4M3"
            if name == "int4":
                words = rng.integers(0, 2**31, (k // 8, n)).astype(np.int32)
                experts[f"{one}.qweight"] = words
                experts[f"{one}.scales"] = (1 + rng.random((k // 32, n))).astype(np.float16)
                experts[f"{one}.qzeros"] = np.full((k // 32, n // 8), 0x77777777, np.int32)
    if name == "int4":
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        }  # fmt: skip
    base_config = {
        "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": width,
        "num_experts": E, "num_experts_per_tok": K, "num_hidden_layers": 1, "norm_topk_prob": True,
    }  # fmt: skip
    return write_checkpoint(folder, {**experts, **router}, {**base_config, **config}, types)


@pytest.mark.parametrize(
    ("name", "type"),
    [("gpt_oss", "F32"), ("fp8", "F32"), ("nvfp4", "F32"), ("nvfp4", "NVFP4"), ("int4", "F32"),
     ("int4", "Q4_0")],
)  # fmt: skip
def test_every_layout(tmp_path, name, type):
    # Rows of NVFP4 are multiples of 64 columns.
    folder = folder_of(name, tmp_path, 128 if name == "nvfp4" else I)
    target = convert(folder, tmp_path / "target.gguf", Types(experts=type))
    hidden = mo.MoeConfig.from_hf(folder).hidden_size
    x = normal(4, hidden)
    want = mo.MoeLayer.from_safetensors(folder, 0, "f32", precision="exact")
    with mo.GgufFile(target) as file:
        layer = mo.MoeLayer.from_gguf(file, 0, precision="exact")
        assert layer.stack.quants["down"] == type
        assert name != "gpt_oss" or "blk.0.ffn_up_exps.bias" in file.tensors
        assert (type == "NVFP4") == ("blk.0.ffn_up_exps.scale" in file.tensors)
        for role in ("gate", "up", "down"):
            for e in range(E):
                np.testing.assert_allclose(
                    layer.stack.dequantize(role, e), want.stack.dequantize(role, e), rtol=1e-6
                )
        np.testing.assert_allclose(layer(x), want(x), rtol=1e-4, atol=1e-4 * np.abs(want(x)).max())
        layer.close()


def test_factors_on_the_outputs_of_experts(tmp_path):
    """Gemma 4 keeps them beside its router; GGUF has them as scales of the down matrices."""
    factors = np.array([0.5, 1.7, -3], np.float32)
    gate, up, down = expert_weights(E, H, I)
    layer = "model.layers.0"
    tensors = {
        f"{layer}.router.proj.weight": normal(E, H),
        f"{layer}.router.scale": normal(H, seed=1),
        f"{layer}.router.per_expert_scale": factors,
        f"{layer}.pre_feedforward_layernorm_2.weight": normal(H, seed=2),
        f"{layer}.experts.gate_up_proj": np.concatenate([gate, up], axis=1),
        f"{layer}.experts.down_proj": down,
    }
    config = {
        "model_type": "gemma4_text", "hidden_size": H, "num_experts": E, "top_k_experts": K,
        "moe_intermediate_size": I, "num_hidden_layers": 1, "enable_moe_block": True,
        "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    folder = write_checkpoint(tmp_path, tensors, config)
    target = convert(folder, tmp_path / "t.gguf", Types("F32"))
    old = mo.MoeLayer.from_safetensors(folder, 0, precision="exact")
    with mo.GgufFile(target) as file:
        new = mo.MoeLayer.from_gguf(file, 0, precision="exact")
        np.testing.assert_array_equal(new.stack.scales["down"], factors)
        x = normal(3, H)
        np.testing.assert_array_equal(new(x), old(x))
        new.close()


def test_a_folder_that_gguf_cannot_say_is_refused(tmp_path):
    folder = checkpoint(tmp_path, norm_topk_prob=True)
    with pytest.raises(mo.UnsupportedError, match=r"router\.renormalize: expected True.*qwen2moe"):
        convert(folder, tmp_path / "target.gguf", Types("Q8_0"))
    assert leftovers(tmp_path) == [] and not (tmp_path / "target.gguf").exists()
    convert(folder, tmp_path / "target.gguf", Types("Q8_0"), architecture="qwen3next")


# --- refused before work starts

MISTAKES = [
    (["--experts", "q4_k"], "expected Q4_K, got 'q4_k'"),
    (["--experts", "IQ9"], "IQ9"),
    (["--down", "Q8_1"], "down: expected a type with an encoder"),
    ([], "experts: expected a type such as Q4_K, got none"),
    (["--experts", "Q8_0", "--layers", "7"], "layers: expected layers with experts, 0 to 1, got 7"),
    (["--experts", "Q8_0", "--architecture", "llama"], "architecture: expected none"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_are_one_line(source, tmp_path, capsys, options, message):
    assert main(["convert", str(source), str(tmp_path / "t.gguf"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 250
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks_are_named(tmp_path, capsys):
    source = tmp_path / "source.gguf"
    write_small(source, intermediate=96, gate_type="F16", down_type="F16")
    assert main(["convert", str(source), str(tmp_path / "t.gguf"), "--experts", "Q4_K"]) == 2
    error = capsys.readouterr().err
    assert "blk.0.ffn_down_exps.weight" in error and "256 elements (Q4_K), got 96" in error
    types = ["--experts", "Q4_K", "--down", "Q8_0", "--quiet"]
    assert main(["convert", str(source), str(tmp_path / "t.gguf"), *types]) == 0
    assert "1 MoE layers" in capsys.readouterr().out


def test_two_types_for_a_fused_tensor_are_refused(tmp_path):
    source = tmp_path / "source.gguf"
    write_small(source, gate_type="F16", fused_gate_up=True)
    with pytest.raises(mo.ConfigError, match=r"ffn_gate_up_exps.*one type.*Q8_0 and F16"):
        convert(source, tmp_path / "t.gguf", Types(gate="Q8_0"))
    target = convert(source, tmp_path / "t.gguf", Types(experts="Q8_0"))
    with mo.GgufFile(target) as file:
        assert file.tensors["blk.0.ffn_gate_up_exps.weight"].quant == "Q8_0"


def test_bad_options_exit_with_2(source, tmp_path):
    for options in (["--layers", "3-1"], ["--layers", "a"], ["--threads", "0"], ["--other", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(source), str(tmp_path / "t.gguf"), "--experts", "Q8_0", *options])
        assert caught.value.code == 2


def test_a_file_that_is_there_is_kept(source, tmp_path):
    target = tmp_path / "target.gguf"
    target.write_text("old")
    with pytest.raises(mo.ConfigError, match="overwrite"):
        convert(source, target, Types("Q8_0"))
    assert target.read_text() == "old" and leftovers(tmp_path) == []
    convert(source, target, Types("Q8_0"), overwrite=True)
    assert mo.GgufFile(target).moe_layers == [0, 1]


# --- resuming


@pytest.fixture
def often(monkeypatch):
    """A record of the journal for each unit."""
    monkeypatch.setattr(run, "RECORD_EVERY", 1)


def stopped(source: Path, target: Path, after: int, types: Types) -> None:
    """A conversion that ends after some steps, of which the disk lost what was not recorded."""
    seen: list[mo.Progress] = []

    def progress(step: mo.Progress) -> bool:
        seen.append(step)
        return len(seen) < after

    with pytest.raises(mo.OperationCancelled):
        convert(source, target, types, progress=progress)
    first, *records = target.with_name(f".{target.name}.journal").read_text().splitlines()
    with planned(source, types) as plan:
        units = [tensor for tensor in plan.tensors for _ in range(tensor.units)]
        done = sum(tensor.nbytes // tensor.units for tensor in units[: int(records[-1])])
        assert 0 < done < sum(tensor.nbytes for tensor in plan.tensors)
    partial = target.with_name(f".{target.name}.partial")
    kept = int(first.split()[1]) + done  # tensors here leave no gaps between them
    data = bytearray(partial.read_bytes())
    data[kept:] = bytes(len(data) - kept)
    partial.write_bytes(data)


def test_a_stopped_conversion_goes_on(source, tmp_path, often):
    types = Types("Q4_0", down="Q8_0")
    whole = convert(source, tmp_path / "whole.gguf", types).read_bytes()
    target = tmp_path / "target.gguf"
    stopped(source, target, 20, types)
    assert sorted(leftovers(tmp_path)) == [".target.gguf.journal", ".target.gguf.partial"]
    steps: list[mo.Progress] = []
    convert(source, target, types, resume=True, progress=steps.append)
    assert target.read_bytes() == whole and leftovers(tmp_path) == []
    assert steps[0].done_bytes > steps[0].total_bytes // 10
    assert steps[-1].done_bytes == steps[-1].total_bytes


def test_a_record_that_was_being_written_does_not_count(source, tmp_path, often):
    types = Types("Q4_0")
    whole = convert(source, tmp_path / "whole.gguf", types).read_bytes()
    target = tmp_path / "target.gguf"
    stopped(source, target, 20, types)
    with (tmp_path / ".target.gguf.journal").open("a") as journal:
        journal.write("9999")
    convert(source, target, types, resume=True)
    assert target.read_bytes() == whole


def test_another_conversion_is_not_gone_on_with(source, tmp_path, often):
    target = tmp_path / "target.gguf"
    stopped(source, target, 20, Types("Q4_0"))
    with pytest.raises(mo.ConfigError, match="the rest of the same conversion"):
        convert(source, target, Types("Q8_0"), resume=True)
    whole = convert(source, tmp_path / "whole.gguf", Types("Q8_0")).read_bytes()
    convert(source, target, Types("Q8_0"))  # starts anew
    assert target.read_bytes() == whole and leftovers(tmp_path) == []


def test_two_conversions_of_one_name(source, tmp_path):
    target = tmp_path / "target.gguf"

    def meanwhile(_: mo.Progress) -> None:
        with pytest.raises(mo.ConfigError, match="no other process"):
            convert(source, target, Types("Q8_0"))

    convert(source, target, Types("Q8_0"), progress=meanwhile)
    assert mo.GgufFile(target).moe_layers == [0, 1]


def test_a_killed_conversion_goes_on(source, tmp_path):
    types = Types("Q5_K", down="Q6_K")
    whole = convert(source, tmp_path / "whole.gguf", types).read_bytes()
    target = tmp_path / "target.gguf"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from moesaic.saving.convert import Types, planned, run, write_plan\n"
        "run.RECORD_EVERY = 1\n"
        "with planned(sys.argv[1], Types('Q5_K', down='Q6_K')) as plan:\n"
        "    write_plan(plan, Path(sys.argv[2]), progress=lambda p: time.sleep(0.02))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(source), str(target)])
    journal = tmp_path / ".target.gguf.journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        if journal.exists() and len(journal.read_text().splitlines()) > 5:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not target.exists() and journal.exists()
    assert main(["convert", str(source), str(target), "--experts", "Q5_K", "--down", "Q6_K",
                 "--resume"]) == 0  # fmt: skip
    assert target.read_bytes() == whole and leftovers(tmp_path) == []


def test_threads_do_not_change_bytes(source, tmp_path):
    types = Types("Q4_K")
    files = [
        convert(source, tmp_path / f"{count}.gguf", types, threads=count).read_bytes()
        for count in (1, 3)
    ]
    assert files[0] == files[1]


def test_units_are_made_a_few_ahead(source, tmp_path):
    """Not all at once, which would take the memory of a model."""
    made: list[int] = []
    written: list[mo.Progress] = []

    def counted(tensor: Tensor) -> Tensor:
        def read(unit: int) -> np.ndarray:
            made.append(unit)
            assert len(made) - len(written) <= 2 + 2 + 1  # in work, waiting, being written
            return tensor.read(unit)

        return replace(tensor, read=read)

    with planned(source, Types("Q8_0")) as plan:
        units = sum(tensor.units for tensor in plan.tensors)
        plan.tensors[:] = map(counted, plan.tensors)
        write_plan(plan, tmp_path / "t.gguf", progress=written.append, threads=2)
    assert len(made) == len(written) == units


@pytest.mark.parametrize("path", sorted(ZOO.parent.glob("zoo-*.gguf")), ids=lambda path: path.stem)
def test_zoo_files_keep_all_bits(path, tmp_path):
    """A type that holds what is there: all experts of all layers of every file."""
    with mo.GgufFile(path) as old:
        target = convert(path, tmp_path / "target.gguf", Types(experts="F32"))
        with mo.GgufFile(target) as new:
            assert new.moe_layers == old.moe_layers
            for index in old.moe_layers:
                want = mo.MoeLayer.from_gguf(old, index, precision="exact")
                got = mo.MoeLayer.from_gguf(new, index, precision="exact")
                assert want.config == got.config
                for role in want.stack.quants:
                    for e in range(want.stack.num_experts):
                        np.testing.assert_array_equal(
                            got.stack.dequantize(role, e), want.stack.dequantize(role, e)
                        )
                for layer in (want, got):
                    layer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["target.gguf"]

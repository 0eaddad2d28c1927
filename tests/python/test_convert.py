"""``moesaic convert`` from a GGUF file: what comes out, and what is refused before work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ZOO
from converting import convert, encoded, leftovers, small_source
from files import write_small
from values import normal

import moesaic as mo
from moesaic.cli import main
from moesaic.saving.convert import Types

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return small_source(tmp_path_factory.mktemp("convert") / "source.gguf")


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


# --- refused before work starts

MISTAKES = [
    (["--experts", "q4_k"], "expected Q4_K, got 'q4_k'"),
    (["--experts", "IQ9"], "IQ9"),
    (["--down", "Q8_1"], "down: expected a type with an encoder"),
    (["--down", "E4M3"], "got 'E4M3', which GGUF has not"),
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

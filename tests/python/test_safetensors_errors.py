"""GPTQ and AWQ checkpoints that are wrong in one place, and damaged files of tensors."""

import contextlib
import json
import struct

import numpy as np
import pytest
from int4_files import LAYER, QWEN, E, Model, expect_format_error

import moesaic as mo

NAME = f"{QWEN[0]}.2.up_proj"


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("qweight", None),
        ("scales", None),
        ("qzeros", None),
        ("qweight", lambda t: t[:-1]),
        ("qweight", lambda t: t[:, :-8]),
        ("qweight", lambda t: t.astype(np.int64)),
        ("qweight", lambda t: t[None]),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t[:, :-1]),
        ("scales", lambda t: t.astype(np.float64)),
        ("qzeros", lambda t: t[:, :-1]),
        ("qzeros", lambda t: t.astype(np.float32)),
        ("g_idx", lambda t: t[:-1]),
        ("g_idx", lambda t: t + 1),
        ("g_idx", lambda t: t - 1),
        ("g_idx", lambda t: t[::-1]),  # desc_act is false
    ],
)
def test_bad_tensor_is_named(tmp_path, tensor, change):
    model = Model()
    name = f"{NAME}.{tensor}"
    if change is None:
        del model.tensors[name]
    else:
        model.tensors[name] = change(model.tensors[name])
    expect_format_error(model, tmp_path, name.replace(".", r"\."))


def test_an_order_is_there_where_it_is_said(tmp_path):
    model = Model(order="shared")
    del model.tensors[f"{NAME}.g_idx"]
    expect_format_error(model, tmp_path, r"2\.up_proj\.g_idx.*desc_act")


def test_missing_expert(tmp_path):
    model = Model()
    for name in [n for n in model.tensors if f"experts.{E - 1}." in n]:
        del model.tensors[name]
    expect_format_error(model, tmp_path, rf"experts\.{E - 1}\.")


def test_sym_is_verified(tmp_path):
    model = Model(config={"sym": True})
    expect_format_error(model, tmp_path, r"\.qzeros")


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"bits": 8}, "FormatError", "bits"),
        ({"bits": "4"}, "FormatError", "bits"),
        ({"group_size": 0}, "FormatError", "group_size"),
        ({"group_size": 64}, "FormatError", "groups of 64"),
        ({"quant_method": "fp8"}, "UnsupportedError", "quant_method"),
        ({"checkpoint_format": "marlin"}, "UnsupportedError", "checkpoint_format"),
        ({"desc_act": 1}, "FormatError", "desc_act"),
    ],
)
def test_bad_config(tmp_path, config, error, match):
    expect_format_error(Model(config=config), tmp_path, match, error)


def test_bad_awq_version(tmp_path):
    expect_format_error(
        Model(form="awq", config={"version": "gemv_fast"}), tmp_path, "version", "UnsupportedError"
    )


def test_missing_things(tmp_path):
    with pytest.raises(FileNotFoundError):
        mo.ExpertStack.load_from_safetensors(tmp_path / "nowhere", 0)
    with pytest.raises(FileNotFoundError):
        mo.ExpertStack.load_from_safetensors(tmp_path, 0)
    model = Model()
    folder = model.write(tmp_path)
    with pytest.raises(mo.FormatError, match="layer 7"):
        mo.ExpertStack.load_from_safetensors(folder, 7)
    with pytest.raises(mo.FormatError, match=r"down_proj|gate_proj"):
        mo.ExpertStack.load_from_safetensors(folder, 13)  # not quantised
    (folder / "config.json").unlink()
    with pytest.raises(mo.FormatError, match="quantize_config"):
        mo.ExpertStack.load_from_safetensors(folder, LAYER)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "", 3, "absent.safetensors", "a\\b.safetensors", ".."],
)
def test_shards_stay_in_their_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    Model().write(tmp_path)
    (folder / "config.json").write_text((tmp_path / "config.json").read_text())
    names = dict.fromkeys(Model().tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(mo.FormatError):
        mo.ExpertStack.load_from_safetensors(folder, LAYER)


def test_malformed_headers(tmp_path):
    """Truncation anywhere and changed bytes in the header give FormatError or a good load."""
    model = Model()
    folder = model.write(tmp_path)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    cuts = [0, 1, 7, 8, 9, 8 + length // 2, 8 + length, 8 + length + 1, len(data) - 1]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(mo.FormatError):
            mo.ExpertStack.load_from_safetensors(folder, LAYER)
    headers = [
        b"", b"[]", b"{", b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400000000]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": true, "data_offsets": [0, 4]}}',
        b'{"a": {}, "a": {}}', b"[" * 100000, b"\xff\xfe{}",
    ]  # fmt: skip
    for header in headers:
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
        with pytest.raises(mo.FormatError):
            mo.ExpertStack.load_from_safetensors(folder, LAYER)
    path.write_bytes(struct.pack("<Q", 1 << 63) + data[8:])
    with pytest.raises(mo.FormatError):
        mo.ExpertStack.load_from_safetensors(folder, LAYER)
    rng = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        for at in rng.integers(0, 8 + length, 3):
            changed[at] = rng.integers(0, 256)
        path.write_bytes(changed)
        with contextlib.suppress(mo.FormatError, mo.UnsupportedError):
            mo.ExpertStack.load_from_safetensors(folder, LAYER)

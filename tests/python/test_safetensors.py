"""GPTQ and AWQ checkpoints on disk: names, configs, shards, and what is wrong with bad ones."""

import contextlib
import json
import struct
import subprocess
import sys

import numpy as np
import pytest

mo = pytest.importorskip("moesaic")
writer = pytest.importorskip("safetensors.numpy")

from test_marlin import Checkpoint, layer_f64, rel  # noqa: E402

E, H, INTER, SIZE, LAYER = 4, 64, 32, 32, 3
QWEN = (
    f"model.layers.{LAYER}.mlp.experts",
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "gate_up": "gate_up_proj"},
)
MIXTRAL = (
    f"model.layers.{LAYER}.block_sparse_moe.experts",
    {"gate": "w1", "up": "w3", "down": "w2"},
)


class Model:
    """The tensors of one layer by name, its config, and the same as Checkpoints."""

    def __init__(self, *, names=QWEN, fused=False, config=None, inter=INTER, group=SIZE, **recipe):
        self.gate_up = Checkpoint(E, H, 2 * inter, group, seed=1, **recipe)
        down_recipe = recipe | ({"order": "per_expert"} if recipe.get("order") else {})
        self.down = Checkpoint(E, inter, H, min(group, inter), seed=2, **down_recipe)
        assert group in (-1, self.down.group_size)
        form = self.gate_up.form
        self.config = {"bits": 4, "group_size": group}
        if form == "awq":
            self.config |= {"quant_method": "awq", "zero_point": True, "version": "gemm"}
        elif form == "pack_quantized":
            scheme = {
                "num_bits": 4,
                "type": "int",
                "symmetric": recipe.get("zeros") is False,
                "strategy": "channel" if group == -1 else "group",
                "group_size": None if group == -1 else group,
                "actorder": "group" if "order" in recipe else None,
            }
            self.config = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": scheme, "targets": ["Linear"]}},
            }
        else:
            self.config |= {
                "quant_method": "gptq",
                "desc_act": "order" in recipe,
                "sym": recipe.get("zeros") is False,
                "checkpoint_format": form,
            }
        self.config |= config or {}
        prefix, spelling = names
        halves = (
            {"gate_up": slice(None)}
            if fused
            else {"gate": slice(0, inter), "up": slice(inter, 2 * inter)}
        )
        self.tensors = {}
        for e in range(E):
            for part, cols in halves.items():
                self.put(f"{prefix}.{e}.{spelling[part]}", self.gate_up, e, cols)
            self.put(f"{prefix}.{e}.{spelling['down']}", self.down, e, slice(None))

    def put(self, name, c, e, cols):
        words = slice(None) if cols == slice(None) else slice(cols.start // 8, cols.stop // 8)
        qweight, scales, qzeros, g_idx = "qweight", "scales", "qzeros", "g_idx"
        if c.form == "pack_quantized":
            qweight, scales, qzeros, g_idx = (
                f"weight_{kind}" for kind in ("packed", "scale", "zero_point", "g_idx")
            )
            self.tensors[f"{name}.{qweight}"] = c.qweight[e][cols]
            self.tensors[f"{name}.{scales}"] = c.stored_scales[e][cols]
            self.tensors[f"{name}.{qzeros}"] = c.qzeros[e][words]
            shape = (len(range(c.N)[cols]), c.K)
            self.tensors[f"{name}.weight_shape"] = np.array(shape, np.int64)
        else:
            self.tensors[f"{name}.{qweight}"] = c.qweight[e][:, words if c.form == "awq" else cols]
            self.tensors[f"{name}.{scales}"] = c.scales[e][:, cols]
            self.tensors[f"{name}.{qzeros}"] = c.qzeros[e][:, words]
        if c.form.startswith("gptq") or c.g_idx is not None:
            plain = np.arange(c.K, dtype=np.int32) // (c.K if c.group_size == -1 else c.group_size)
            order = plain if c.g_idx is None else c.g_idx if c.g_idx.ndim == 1 else c.g_idx[e]
            self.tensors[f"{name}.{g_idx}"] = order

    def write(self, folder, *, shards=1, in_config=True, file="model.safetensors"):
        tensors = {name: np.ascontiguousarray(t) for name, t in self.tensors.items()}
        # Other tensors of a model are no concern of the loader.
        tensors[f"model.layers.{LAYER}.mlp.gate.weight"] = np.zeros((E, H), np.float16)
        tensors["model.layers.13.mlp.experts.0.gate_proj.weight"] = np.zeros((2, 2), np.float16)
        if in_config:
            (folder / "config.json").write_text(
                json.dumps({"num_experts": E, "quantization_config": self.config})
            )
        else:
            (folder / "quantize_config.json").write_text(json.dumps(self.config))
        if shards == 1:
            writer.save_file(tensors, folder / file)
            return folder
        index = {}
        for i in range(shards):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {n: t for k, (n, t) in enumerate(tensors.items()) if k % shards == i}
            writer.save_file(part, folder / shard)
            index |= dict.fromkeys(part, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    def check(self, path, kind="marlin"):
        stack = mo.ExpertStack.load_from_safetensors(path, LAYER)
        assert (stack.num_experts, stack.hidden_size) == (E, H)
        assert stack.kind == kind
        for e in range(E):
            gate, up = np.split(self.gate_up.weights[e].T, 2)
            np.testing.assert_allclose(stack.dequantize("gate", e), gate, rtol=2e-7)
            np.testing.assert_allclose(stack.dequantize("up", e), up, rtol=2e-7)
            np.testing.assert_allclose(
                stack.dequantize("down", e), self.down.weights[e].T, rtol=2e-7
            )
        rng = np.random.default_rng(5)
        x = rng.standard_normal((5, H)).astype(np.float32)
        ids = np.stack([rng.permutation(E)[:2] for _ in range(5)]).astype(np.int32)
        weights = rng.random((5, 2)).astype(np.float32)
        want = layer_f64(self.gate_up, self.down, x, ids, weights)
        assert rel(mo.moe_forward_cpu(x, mo.Routing(ids, weights), stack), want) < 1e-5
        return stack


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
    # The package's numpy face has no bf16: cut the f32 scales in the file's own bytes.
    tensors = {}
    for c in (model.gate_up, model.down):
        bits = c.scales.astype(np.float32).view(np.uint32) >> 16
        c.bits = bits.astype(np.uint16)
    for name, t in model.tensors.items():
        tensors[name] = t
        if name.endswith(".scales"):
            tensors[name] = (t.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    writer.save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    stack = mo.ExpertStack.load_from_safetensors(tmp_path, LAYER)
    for e in range(E):
        got = stack.dequantize("down", e)
        np.testing.assert_allclose(got, model.down.weights[e].T, rtol=2**-7)
    assert stack.marlin("down").unpack(0)["scales"].view(np.uint32).max() & 0xFFFF == 0


def test_zero_bias_is_accepted(tmp_path):
    model = Model()
    name = next(n for n in model.tensors if n.endswith("down_proj.qweight"))
    bias = name.replace("qweight", "bias")
    model.tensors[bias] = np.zeros(H, np.float16)
    model.check(model.write(tmp_path))
    model.tensors[bias][3] = 1
    with pytest.raises(mo.UnsupportedError, match=r"down_proj\.bias"):
        mo.ExpertStack.load_from_safetensors(model.write(tmp_path), LAYER)


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


def expect_format_error(model, folder, match, error="FormatError"):
    with pytest.raises(getattr(mo, error), match=match):
        mo.ExpertStack.load_from_safetensors(model.write(folder), LAYER)


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


def test_orders_of_gate_and_up_must_agree(tmp_path):
    model = Model(order="shared")
    model.tensors[f"{NAME}.g_idx"] = model.tensors[f"{NAME}.g_idx"][::-1]
    expect_format_error(model, tmp_path, r"2\.up_proj\.g_idx")
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
        ({"group_size": 64}, "FormatError", "g_idx"),
        ({"quant_method": "fp8"}, "UnsupportedError", "quant_method"),
        ({"checkpoint_format": "marlin"}, "UnsupportedError", "checkpoint_format"),
        ({"desc_act": 1}, "FormatError", "desc_act"),
    ],
)
def test_bad_config(tmp_path, config, error, match):
    expect_format_error(Model(config=config), tmp_path, match, error)


def test_bad_awq_version(tmp_path):
    expect_format_error(
        Model(form="awq", config={"version": "gemv"}), tmp_path, "version", "UnsupportedError"
    )


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
    expect_format_error(model, tmp_path, "num_bits")
    model.config["format"] = "int-quantized"
    expect_format_error(model, tmp_path, "format", "UnsupportedError")
    model.config["config_groups"]["group_1"] = {}
    expect_format_error(model, tmp_path, "config_groups", "UnsupportedError")
    model = Model(form="pack_quantized")
    name = next(n for n in model.tensors if n.endswith("down_proj.weight_zero_point"))
    del model.tensors[name]
    expect_format_error(model, tmp_path, r"down_proj\.weight_zero_point")


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


MEASURE = """
import resource, sys
import moesaic as mo
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
with mo.tuning(threads=1):
    mo.ExpertStack.load_from_safetensors(sys.argv[2], 0)   # code, buffers, imports
    before = peak()
    stack = mo.ExpertStack.load_from_safetensors(sys.argv[1], 0)
size = stack.marlin("gate_up").nbytes + stack.marlin("down").nbytes
print((peak() - before) / size)
"""


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
        writer.save_file(tensors, folder / "model.safetensors")
        config = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
        (folder / "quantize_config.json").write_text(json.dumps(config))
        return folder

    large = write(tmp_path / "large", 16, 2048, 1024)
    small = write(tmp_path / "small", 2, 256, 128)
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), str(small)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert float(out) < 1.2

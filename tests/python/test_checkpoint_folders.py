"""Which files of a folder are the checkpoint: as transformers chooses, or an error."""

import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from files import write_safetensors

import moesaic as mo

E, H, I, LAYER = 4, 32, 64, 1
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
    "num_experts_per_tok": 2, "num_hidden_layers": 3, "norm_topk_prob": True,
}  # fmt: skip


def layer_tensors(seed: int, prefix: str = "model.", layer: int = LAYER) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    block = f"{prefix}layers.{layer}.mlp."
    tensors = {f"{block}gate.weight": rng.standard_normal((E, H), dtype=np.float32)}
    for e in range(E):
        for part, shape in (("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I))):
            name = f"{block}experts.{e}.{part}.weight"
            tensors[name] = rng.standard_normal(shape, dtype=np.float32)
    return tensors


RIGHT, OTHER = layer_tensors(1), layer_tensors(2)


def whole(folder, name="model.safetensors", tensors=RIGHT):
    write_safetensors(folder / name, tensors)


def shards(folder, name="model", tensors=RIGHT, count=3, index=".safetensors.index.json"):
    """Tensors of other layers in the shards before and behind."""
    parts = [layer_tensors(9, layer=0), tensors, layer_tensors(9, layer=2)][:count]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"{name}-{i:05}-of-{count:05}.safetensors"
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / (name + index)).write_text(text)


def folder_of(tmp_path, *makers, config=CONFIG):
    for make in makers:
        make(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def assert_right(path, want=RIGHT):
    with mo.MoeLayer.from_safetensors(path, LAYER) as layer:
        down = next(name for name in want if name.endswith("experts.2.down_proj.weight"))
        np.testing.assert_array_equal(layer.stack.dequantize("down", 2), want[down])


def without_shards(folder):
    """Two of three shards are links to what was not downloaded."""
    for number in (1, 3):
        file = folder / f"model-{number:05}-of-00003.safetensors"
        file.unlink()
        if number == 3:
            file.symlink_to(folder / "blobs" / "absent")


FOLDERS = {
    "one file": [whole],
    "shards": [shards],
    "shards without an index": [lambda f: shards(f, index=None)],
    "one file beside shards": [whole, lambda f: shards(f, tensors=OTHER)],
    "shards beside the maker's": [shards, lambda f: shards(f, "consolidated", OTHER)],
    "one file beside the maker's": [whole, lambda f: whole(f, "consolidated.safetensors", OTHER)],
    "a variant": [whole, lambda f: whole(f, "model.fp16.safetensors", OTHER)],
    "a variant in shards": [
        shards,
        lambda f: shards(f, "model.fp16", OTHER, index=None),
        lambda f: (f / "model.safetensors.index.fp16.json").write_text("{}"),
    ],
    "an adapter": [
        lambda f: shards(f, index=None),
        lambda f: whole(f, "adapter_model.safetensors", OTHER),
    ],
    "the maker's alone": [lambda f: whole(f, "consolidated.safetensors")],
    "a variant alone": [lambda f: whole(f, "model.fp16.safetensors")],
    "some name": [lambda f: whole(f, "weights.safetensors")],
    "some names": [
        lambda f: whole(f, "b.safetensors"),
        lambda f: whole(f, "a.safetensors", layer_tensors(9, layer=0)),
    ],
    "two of three shards absent": [shards, without_shards],
    "weights of torch beside": [whole, lambda f: (f / "pytorch_model.bin").write_bytes(b"PK")],
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path, case):
    assert_right(folder_of(tmp_path, *FOLDERS[case]))


def test_the_file_that_config_names(tmp_path):
    config = CONFIG | {"transformers_weights": "mine.safetensors"}
    folder = folder_of(
        tmp_path,
        lambda f: whole(f, tensors=OTHER),
        lambda f: whole(f, "mine.safetensors"),
        config=config,
    )
    assert_right(folder)
    for bad in ("../mine.safetensors", "absent.safetensors"):
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": bad}))
        with pytest.raises(mo.FormatError, match="transformers_weights"):
            mo.MoeLayer.from_safetensors(folder, LAYER)


def test_a_file_or_an_index_by_its_path(tmp_path):
    folder = folder_of(tmp_path, whole, lambda f: shards(f, "consolidated", OTHER))
    assert_right(folder / "consolidated.safetensors.index.json", OTHER)
    assert_right(str(folder / "model.safetensors"))
    assert_right(bytes(folder / "model.safetensors"))


def torch_only(folder):
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")


def ranks(folder):
    for rank in range(2):
        part = {n: t for n, t in RIGHT.items() if f"experts.{rank}." in n or "gate.weight" in n}
        write_safetensors(folder / f"model{rank}-mp2.safetensors", part)


def ranks_of_vllm(folder):
    for rank in range(2):
        write_safetensors(folder / f"model-rank-{rank}-part-0.safetensors", RIGHT)


REFUSED = {
    "nothing": ([], FileNotFoundError, "safetensors"),
    "torch alone": ([torch_only], mo.UnsupportedError, r"pytorch_model.*\.bin.*save_pretrained"),
    "gguf alone": (
        [lambda f: (f / "q4.gguf").write_bytes(b"GGUF")],
        mo.UnsupportedError,
        r"q4\.gguf.*from_gguf",
    ),
    "ranks": ([ranks], mo.UnsupportedError, "2 ranks.*model0-mp2.*split"),
    "ranks of vllm": ([ranks_of_vllm], mo.UnsupportedError, "2 ranks"),
    "the same in two files": (
        [lambda f: whole(f, "a.safetensors"), lambda f: whole(f, "b.safetensors")],
        mo.FormatError,
        "a name that no other file has.*ranks",
    ),
    "two whole models": (
        [
            lambda f: whole(f, "consolidated.safetensors"),
            lambda f: whole(f, "model.bf16.safetensors"),
        ],
        mo.FormatError,
        "consolidated, model.bf16.*path",
    ),
    "the shard of the layer is absent": (
        [shards, lambda f: (f / "model-00002-of-00003.safetensors").unlink()],
        mo.FormatError,
        "model-00002-of-00003.*no such file",
    ),
    "an index of another kind": (
        [lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}')],
        mo.FormatError,
        "weight_map",
    ),
    "an index without names": (
        [lambda f: (f / "model.safetensors.index.json").write_text('{"model_type": "mixtral"}')],
        mo.FormatError,
        "a weight_map.*open the folder",
    ),
    "an index of other values": (
        [
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors", "c": ["b.safetensors"]}}'
            )
        ],
        mo.FormatError,
        "'c'.*a file name",
    ),
    "a path in the index": (
        [
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../b.safetensors"}}'
            )
        ],
        mo.FormatError,
        r"\.\./b",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_folders(tmp_path, case):
    makers, error, match = REFUSED[case]
    folder = folder_of(tmp_path, *makers)
    for load in (mo.MoeLayer.from_safetensors, mo.ExpertStack.load_from_safetensors):
        with pytest.raises(error, match=match):
            load(folder, LAYER)


def test_files_of_another_form(tmp_path):
    for name in ("pytorch_model.bin", "model.gguf"):
        (tmp_path / name).write_bytes(b"PK")
        with pytest.raises(mo.UnsupportedError, match=name):
            mo.ExpertStack.load_from_safetensors(tmp_path / name, LAYER)


def test_only_what_the_layer_needs_is_opened(tmp_path, monkeypatch):
    """Headers of its shards, the index and config.json, each once."""
    from moesaic import _files
    from moesaic.safetensors import parsing, reader

    folder = folder_of(tmp_path, shards)
    opened = []

    def counting(path):
        opened.append(path.name)
        return _files.descriptor_of(path)

    monkeypatch.setattr(reader, "descriptor_of", counting)
    read = _files.read_text_bytes
    monkeypatch.setattr(parsing, "read_text_bytes", lambda p: (opened.append(p.name), read(p))[1])
    assert_right(folder)
    wanted = ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"]
    assert sorted(set(opened) - {"quantize_config.json", "quant_config.json"}) == wanted
    assert len(opened) == len(set(opened))
    shutil.rmtree(folder)


def test_an_index_is_read_once(tmp_path, monkeypatch):
    """A layer after the other reads the same; a file that has changed since is read anew."""
    from moesaic import _files
    from moesaic.safetensors import parsing

    folder = folder_of(tmp_path, shards)
    index = folder / "model.safetensors.index.json"
    an_hour_ago = index.stat().st_mtime - 3600
    read, seen = _files.read_text_bytes, []
    monkeypatch.setattr(parsing, "read_text_bytes", lambda p: (seen.append(p.name), read(p))[1])

    def reads() -> int:
        seen.clear()
        assert_right(folder)
        return seen.count(index.name)

    assert [reads(), reads()] == [1, 1], "young files may change without a trace"
    os.utime(index, (an_hour_ago, an_hour_ago))
    assert [reads(), reads(), reads()] == [1, 0, 0]
    text = index.read_text()
    index.write_text(text.replace("00002-of-00003", "00001-of-00003"))
    os.utime(index, (an_hour_ago + 1, an_hour_ago + 1))
    with pytest.raises(mo.FormatError, match="00001-of-00003"):
        assert_right(folder)
    index.write_text(text)
    os.utime(index, (an_hour_ago, an_hour_ago))
    assert reads() <= 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are listed on Linux")
def test_files_are_closed_behind_a_load(tmp_path):
    folder = folder_of(tmp_path, shards)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        assert_right(folder)
        with pytest.raises(mo.Error):
            mo.ExpertStack.load_from_safetensors(folder, 7)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before

"""Damaged and hostile checkpoints: an error of this package, soon, and with little memory."""

import json
import os
import sys
import time
import tracemalloc

import numpy as np
import pytest

import moesaic as mo
from moesaic.safetensors import read_header

E, H, I = 4, 32, 64
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "norm_topk_prob": True,
}  # fmt: skip
BLOCK = "model.layers.0.mlp."
LOADS = (mo.MoeLayer.from_safetensors, mo.ExpertStack.load_from_safetensors)


def tensors() -> dict[str, np.ndarray]:
    made = {f"{BLOCK}gate.weight": np.ones((E, H), np.float32)}
    for e in range(E):
        for part, shape in (("gate_proj", (I, H)), ("up_proj", (I, H)), ("down_proj", (H, I))):
            made[f"{BLOCK}experts.{e}.{part}.weight"] = np.ones(shape, np.float32)
    return made


def header_of(made: dict[str, np.ndarray]) -> dict:
    header, at = {}, 0
    for name, values in made.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [at, at + values.nbytes],
        }
        at += values.nbytes
    return header


def write(folder, header=None, config=CONFIG, raw=None):
    """One file of ``header`` (or of the ``raw`` text of one) and the data of ``tensors``."""
    made = tensors()
    text = raw if raw is not None else json.dumps(header or header_of(made)).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in made.values():
            file.write(values.tobytes())
    if config is not None:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "config.json").write_bytes(text)
    return folder


def add(name, entry):
    header = header_of(tensors())
    header[name] = entry
    return header


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
FIRST = header_of(tensors())[f"{BLOCK}experts.0.gate_proj.weight"]

#: What a file claims beyond what it holds, and where the message points.
CLAIMS = {
    "an expert of a high number": (add(f"{BLOCK}experts.999999.gate_proj.weight", EMPTY), None),
    "a number of nine digits": (add(f"{BLOCK}experts.999999999.gate_proj.weight", EMPTY), None),
    "a number of many digits": (
        add(f"{BLOCK}experts.{'9' * 3000}.gate_proj.weight", EMPTY),
        CONFIG,
    ),
    "bytes of another tensor": (add("other", FIRST), CONFIG),
    "experts that config.json claims": (None, CONFIG | {"num_experts": 1_000_000}),
    "experts beyond all models": (None, CONFIG | {"num_experts": 1 << 60}),
    "a rank of nine": (add("a", EMPTY | {"shape": [0] * 9}), CONFIG),
    "a size beyond 64 bits": (
        add(f"{BLOCK}experts.0.up_proj.weight", EMPTY | {"shape": [0, 1 << 63]}),
        CONFIG,
    ),
    "a long name": (add("a" * 5000, EMPTY), CONFIG),
    "half a character": (add("a\ud800", EMPTY), CONFIG),
    "a text model that is none": (None, CONFIG | {"text_config": "x"}),
}


@pytest.mark.parametrize("case", CLAIMS)
@pytest.mark.parametrize("load", LOADS, ids=["layer", "stack"])
def test_claims(tmp_path, case, load):
    header, config = CLAIMS[case]
    folder = write(tmp_path, header, config)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(mo.FormatError):
        load(folder, 0)
    took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took < 2
    assert peak < 20 << 20


def many(count: int, entry: str) -> bytes:
    return ("{" + ",".join(entry.format(i) for i in range(count)) + "}").encode()


#: Headers whose size doubles: texts of 10^5 parts, read in linear time.
LARGE = {
    "the last name twice": many(100_000, '"n{0}":1') [:-1] + b',"z":1,"z":2}',
    "a rank of 50,000": b'{"a":{"dtype":"F32","shape":['
    + b",".join([b"2305843009213693951"] * 50_000)
    + b'],"data_offsets":[0,4]}}',
    "an integer of 10^5 digits": b'{"a":{"dtype":"F32","shape":[' + b"1" * 100_000 + b"]}}",
    "depth": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a name of layers": b'{"' + b"layers.1." * 40_000 + b'":1}',
    "names of dots": many(1000, '"' + "." * 1000 + '{0}":1'),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_nothing_is_quadratic(tmp_path, case):
    folder = write(tmp_path, raw=LARGE[case])
    start = time.process_time()
    with pytest.raises(mo.FormatError):
        mo.ExpertStack.load_from_safetensors(folder, 0)
    assert time.process_time() - start < 2


@pytest.mark.cost
def test_a_hundred_thousand_tensors(tmp_path):
    entry = '"model.layers.7.mlp.experts.{0}.up_proj.weight":'
    entry += '{{"dtype":"F32","shape":[0,8],"data_offsets":[0,0]}}'
    folder = write(tmp_path, raw=many(100_000, entry))
    start = time.process_time()
    assert len(read_header(folder / "model.safetensors")) == 100_000
    with pytest.raises(mo.FormatError, match="layer 0"):
        mo.ExpertStack.load_from_safetensors(folder, 0)
    assert time.process_time() - start < 3  # two readings, also on a slow machine


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    "name",
    ["b.safetensors", "model.safetensors", "model.safetensors.index.json", "config.json"],
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_special_files(tmp_path, name, make):
    folder = write(tmp_path)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    for load in LOADS:
        with pytest.raises(OSError, match="regular"):
            load(folder, 0)
    with pytest.raises(OSError, match="regular"):
        if name == "config.json":
            mo.MoeConfig.from_hf(folder)
        else:
            mo.ExpertStack.load_from_safetensors(folder / name, 0)


#: config.json texts after which Python has an error of its own in store.
CONFIGS = {
    "not UTF-8": b"\xff\xfe{}",
    "a lone half": b'{"model_type": "\\ud800"}',
    "depth": b'{"a":' * 100_000,
    "digits": b'{"hidden_size":' + b"1" * 10_000 + b"}",
    "nan": json.dumps(CONFIG | {"rms_norm_eps": float("nan")}).encode(),
    "overflow": json.dumps(CONFIG | {"rms_norm_eps": 10**400}).encode(),
    "a list": b"[]",
    "empty": b"",
    "experts in a list": json.dumps(CONFIG | {"num_experts": [4]}).encode(),
    "layers in a list": json.dumps(CONFIG | {"mlp_only_layers": {"a": 1}}).encode(),
    "quantisation in a list": json.dumps(CONFIG | {"quantization_config": [1]}).encode(),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(tmp_path, case):
    folder = write(tmp_path, config=CONFIGS[case])
    for load in LOADS:
        try:
            load(folder, 0)
        except mo.Error as error:
            str(error).encode()


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of names in Unicode")
@pytest.mark.parametrize("as_type", [bytes, os.fsdecode])
def test_paths_that_are_not_utf8(tmp_path, as_type):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    path = as_type(bytes(folder))
    with pytest.raises(FileNotFoundError):
        mo.ExpertStack.load_from_safetensors(path, 0)
    write(folder)
    with mo.MoeLayer.from_safetensors(path, 0) as layer:
        assert layer.config.num_experts == E
    write(folder, raw=b"[]")
    for load in LOADS:
        with pytest.raises(mo.FormatError, match=r"\\xff") as caught:
            load(path, 0)
        assert str(caught.value).encode()


@pytest.mark.parametrize("path", [3, None, ["a"]])
def test_a_path_that_is_none(path):
    for load in LOADS:
        with pytest.raises(TypeError):
            load(path, 0)


def test_an_error_of_progress_stays_what_it_is(tmp_path):
    def fail(progress):
        raise IndexError("mine")

    folder = write(tmp_path)
    for load in LOADS:
        with pytest.raises(IndexError, match="mine"):
            load(folder, 0, progress=fail)


def test_changed_bytes(tmp_path):
    """Whatever a few bytes of a header or of config.json become: a load, or our error."""
    folder = write(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("model.safetensors", "config.json"):
        data = (folder / name).read_bytes()
        length = min(len(data), 3000)
        for _ in range(150):
            changed = bytearray(data)
            for at in rng.integers(0, length, rng.integers(1, 4)):
                changed[at] = rng.choice(np.frombuffer(b'0123456789[]{}",:.-eE\xff\\ntf', np.uint8))
            (folder / name).write_bytes(changed)
            for load in LOADS:
                try:
                    load(folder, 0)
                except mo.Error as error:
                    assert str(error).encode()
        (folder / name).write_bytes(data)

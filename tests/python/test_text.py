"""Names and texts of files that are not UTF-8: values keep the bytes, messages show them."""

import os
import re
import sys

import numpy as np
import pytest
from files import write_small

import moesaic as mo

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems allow no such names of files"
)


@pytest.fixture
def odd(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.gguf"
    write_small(tmp_path / "small.gguf", layers=1)
    os.rename(tmp_path / "small.gguf", path)  # noqa: PTH104
    return path


def test_values_keep_the_bytes(odd):
    file = mo.GgufFile(odd)
    assert os.fsencode(file.path) == odd
    assert [os.fsencode(p) for p in file.shard_paths] == [odd]
    assert "\udcff.gguf" in repr(file)
    for name, tensor in file.tensors.items():
        assert file.tensors[tensor.name].name == name
        assert name in repr(tensor)


def closed(path):
    file = mo.GgufFile(path)
    tensor = next(iter(file.tensors.values()))
    file.close()
    return tensor.data


@pytest.mark.parametrize(
    ("call", "error", "shown"),
    [
        (lambda p: mo.MoeLayer.from_gguf(mo.GgufFile(p), 9), mo.ShapeError, r"\xff"),
        (closed, mo.DeviceError, r"\xff"),
        # Errors of Python itself are in its own words.
        (lambda p: mo.GgufFile(p + b"x"), FileNotFoundError, r"\udcff"),
        (lambda p: mo.Profile().save_chrome_trace(p + b"/x"), NotADirectoryError, r"\udcff"),
    ],
)
def test_messages_show_the_bytes(odd, call, error, shown):
    with pytest.raises(error, match=re.escape(f"{shown}.gguf")):
        call(odd)


SPEC = ("F32", "from \udcff", "kept", "why \udcff")


def builder():
    made = mo._core.StackBuilder(1, 32, 32, gate=None, up=SPEC, down=SPEC)
    for role in ("up", "down"):
        made.add(role, 0, np.zeros((32, 32), np.float32))
    return made


def test_fields_keep_the_bytes(monkeypatch):
    config = mo.MoeConfig(32, 32, 4, 2, architecture="of \udcff")
    assert config.architecture == "of \udcff"
    assert config.replace(layer=3).architecture == "of \udcff"
    assert mo.MoeConfig.from_dict(config.to_dict()) == config
    assert "\\udcff" in repr(config)

    steps = []
    monkeypatch.setattr(
        "moesaic.safetensors.gather_experts",
        lambda path, layer, step, *_: [step("at \udcff", 1, 2), builder()][1],
    )
    stack = mo.ExpertStack.load_from_safetensors("x", 0, progress=steps.append)
    assert steps[0].what == "at \udcff"
    assert r"at \xff" in repr(steps[0])
    role = stack.report.roles[0]
    assert (role.source, role.decision, role.reason) == ("from \udcff", "repacked", role.reason)
    assert r"from \xff" in repr(role)
    assert r"from \xff" in str(stack.report)


def test_texts_of_no_bytes_are_escaped():
    assert mo.MoeConfig(32, 32, 4, 2, architecture="\ud800").architecture == r"\ud800"


def test_keys_may_be_such_texts(odd):
    file = mo.GgufFile(odd)
    for mapping in (file.tensors, file.metadata):
        assert "\udcfe" not in mapping
        with pytest.raises(KeyError):
            mapping["\udcfe"]


@pytest.mark.parametrize("word", ["\udcff", "\ud800"])
@pytest.mark.parametrize(
    "call",
    [
        lambda w: mo.Tuning(gemm=w),
        lambda w: mo.Tuning(threads=w),
        lambda w: mo.Tuning().replace(**{w: 1}),
        lambda w: mo.MoeConfig(8, 8, 2, 1, activation=w),
    ],
)
def test_words_that_are_no_utf8(word, call):
    with pytest.raises(mo.ConfigError, match=r"\\xff|\\ud800"):
        call(word)

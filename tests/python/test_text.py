"""Names and texts of files that are not UTF-8: values keep the bytes, messages show them."""

import os
import sys

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
    ("call", "error"),
    [
        (lambda p: mo.MoeLayer.from_gguf(mo.GgufFile(p), 9), mo.ShapeError),
        (lambda p: mo.GgufFile(p + b"x"), FileNotFoundError),
        (closed, mo.DeviceError),
        (lambda p: mo.Profile().save_chrome_trace(p + b"/x"), NotADirectoryError),
    ],
)
def test_messages_show_the_bytes(odd, call, error):
    with pytest.raises(error, match=r"\\xff\.gguf"):
        call(odd)


def test_keys_may_be_such_texts(odd):
    file = mo.GgufFile(odd)
    for mapping in (file.tensors, file.metadata):
        assert "\udcfe" not in mapping
        with pytest.raises(KeyError):
            mapping["\udcfe"]

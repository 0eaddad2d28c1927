"""Each bad input: the right class, and a message with operation, what, expected and got."""

import numpy as np
import pytest

import moesaic as mo

X = np.ones((2, 24), np.float32)
LOGITS = np.zeros((2, 5), np.float32)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ShapeError", ValueError),
        ("FormatError", ValueError),
        ("WorkspaceError", ValueError),
        ("ConfigError", ValueError),
        ("DTypeError", TypeError),
        ("ArgumentError", TypeError),
        ("UnsupportedError", NotImplementedError),
        ("DeviceError", RuntimeError),
        ("CaptureError", RuntimeError),
        ("OutOfMemoryError", MemoryError),
        ("OperationCancelled", Exception),
    ],
)
def test_family(name, builtin):
    error = getattr(mo, name)
    assert issubclass(error, mo.Error) and issubclass(error, builtin)
    assert error.__module__ == "moesaic" and error.__doc__


BAD = {
    "x columns": (lambda s: forward(s, x=X[:, :23]), mo.ShapeError, ["x", "24", "23"]),
    "x rank": (lambda s: forward(s, x=X[0]), mo.ShapeError, ["x", "[T, 24]", "[24]"]),
    "x dtype": (lambda s: forward(s, x=X.astype("f8")), mo.DTypeError, ["x", "f32", "f64"]),
    "logits rows": (lambda s: forward(s, logits=LOGITS[:1]), mo.ShapeError, ["logits", "2", "1"]),
    "logits columns": (
        lambda s: forward(s, logits=np.zeros((2, 6), np.float32)),
        mo.ShapeError,
        ["logits", "5", "6"],
    ),
    "logits dtype": (
        lambda s: forward(s, logits=LOGITS.astype("f8")),
        mo.DTypeError,
        ["router_logits", "f32", "f64"],
    ),
    "no router": (lambda s: mo.moe_forward(X, LOGITS, s), mo.ConfigError, ["top_k"]),
    "top_k": (lambda s: forward(s, top_k=6), mo.ConfigError, ["top_k", "6"]),
    "both routers": (
        lambda s: forward(s, router=mo.RouterConfig(5, 2)),
        mo.ConfigError,
        ["router", "both"],
    ),
    "id too large": (lambda s: routed(s, 5), mo.ShapeError, ["ids", "5"]),
    "id too small": (lambda s: routed(s, -2), mo.ShapeError, ["ids", "-2"]),
    "routing rows": (
        lambda s: forward(s, logits=None, top_k=None, routing=routing_of(3, 0)),
        mo.ShapeError,
        ["rout", "2", "3"],
    ),
    "workspace": (
        lambda s: forward(s, workspace=mo.Workspace(64)),
        mo.WorkspaceError,
        ["workspace", "64"],
    ),
    "stream": (lambda s: forward(s, stream=7), mo.DeviceError, ["stream", "None", "int"]),
    "gemm": (
        lambda s: mo.moe_forward_bucketed(X, LOGITS, s, top_k=2, gemm="blocks"),
        mo.ConfigError,
        ["gemm", "auto | bucketed | aligned", "'blocks'"],
    ),
    "stack": (lambda s: forward(None), mo.DTypeError, ["stack", "ExpertStack", "NoneType"]),
    "activation": (
        lambda s: forward(s, activation="tanh"),
        mo.ConfigError,
        ["activation", "swiglu", "'tanh'"],
    ),
    "gemv ids": (
        lambda s: s.gemv_up(X, np.full((2, 1), 9, np.int32)),
        mo.ShapeError,
        ["gemv", "ids", "9"],
    ),
    "gemv x": (
        lambda s: s.gemv_up(X[:, :5], np.zeros((2, 1), np.int32)),
        mo.ShapeError,
        ["gemv", "x", "24", "5"],
    ),
    "dense shapes": (
        lambda s: mo.ExpertStack.from_dense_stacks(
            np.zeros((5, 4, 8), np.float32),
            np.zeros((5, 4, 8), np.float32),
            np.zeros((5, 8, 3), np.float32),
        ),
        mo.ShapeError,
        ["down", "4", "3"],
    ),
    "dense dtype": (
        lambda s: mo.ExpertStack.from_dense_stacks(*[np.zeros((1, 4, 4), np.int32)] * 3),
        mo.DTypeError,
        ["gate", "f32", "i32"],
    ),
    "device": (
        lambda s: mo.ExpertStack.from_dense_stacks(
            *[np.zeros((1, 4, 4), np.float32)] * 3, device="tpu"
        ),
        mo.ConfigError,
        ["tpu"],
    ),
    "absent backend": (
        lambda s: mo.ExpertStack.from_dense_stacks(
            *[np.zeros((1, 4, 4), np.float32)] * 3, device="metal"
        ),
        mo.DeviceError,
        ["metal"],
    ),
    "knob value": (lambda s: mo.Tuning(block_size=12), mo.ConfigError, ["block_size", "16", "12"]),
    "knob name": (lambda s: mo.Tuning().replace(blocksize=8), mo.ConfigError, ["block_size"]),
    "quant type": (lambda s: mo.testing.quantize(X, "Q9"), mo.ConfigError, ["type", "Q4_K", "Q9"]),
    "quant columns": (lambda s: mo.testing.quantize(X, "Q8_0"), mo.ShapeError, ["32", "24"]),
    "conversion": (
        lambda s: mo.asarray(X, "bf16", copy=False),
        mo.ConfigError,
        ["copy", "None or True", "False"],
    ),
}


def forward(stack, x=X, logits=LOGITS, **arguments):
    return mo.moe_forward(x, logits, stack, **{"top_k": 2, **arguments})


def routing_of(tokens, value):
    return mo.Routing(np.full((tokens, 1), value), np.ones((tokens, 1), np.float32))


def routed(stack, value):
    return mo.moe_forward(X, None, stack, routing=routing_of(2, value))


@pytest.mark.parametrize("name", BAD)
def test_message(stack, name):
    call, error, words = BAD[name]
    with pytest.raises(error) as raised:
        call(stack)
    assert type(raised.value) is error
    message = str(raised.value)
    assert ": " in message
    for word in words:
        assert word in message, message


def test_nothing_is_written_on_an_error(stack):
    out = np.full((2, 24), 7, np.float32)
    for name in ("id too large", "logits columns", "workspace"):
        arguments = {
            "id too large": {"logits": None, "top_k": None, "routing": routing_of(2, 5)},
            "logits columns": {"logits": np.zeros((2, 6), np.float32)},
            "workspace": {"workspace": mo.Workspace(64)},
        }[name]
        with pytest.raises(mo.Error):
            forward(stack, out=out, **arguments)
        np.testing.assert_array_equal(out, 7)


def test_a_file_without_experts(tmp_path):
    import gguf

    path = tmp_path / "dense.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with mo.GgufFile(path) as f:
        assert f.moe_layers == []
        with pytest.raises(mo.FormatError, match="expert"):
            mo.ExpertStack.load_from_gguf(f, 0)
        with pytest.raises(mo.Error):
            mo.MoeLayer.from_gguf(f, 0)
    with pytest.raises(FileNotFoundError):
        mo.ExpertStack.open_and_load(tmp_path / "missing.gguf", 0)


def test_wrong_classes_are_type_errors(stack):
    with pytest.raises(TypeError):
        mo.moe_forward(X, None, stack, routing=np.zeros((2, 1), np.int32))
    with pytest.raises(TypeError):
        mo.BucketPlan.build(np.zeros((2, 1), np.int32), 5)

"""Run by test_emulated_gpu.py: calls on ``cuda:0``, which is the emulator."""

import ctypes
import os
import sys
import types
import typing

import numpy as np

import moesaic as mo

KEEP = []  # what capsules point to


class Tensor(ctypes.Structure):
    """DLTensor, DLPack 1."""

    _fields_: typing.ClassVar = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class Array:
    """An array of the package ``fakecuda``: emulated device memory with numpy's shape and dtype."""

    streams: typing.ClassVar[list] = []

    def __init__(self, values):
        values = np.ascontiguousarray(values)
        self.dtype, self.shape = values.dtype, values.shape
        self.address = allocate(max(values.nbytes, 1))
        ctypes.memmove(self.address, values.ctypes.data, values.nbytes)

    def numpy(self):
        out = np.empty(self.shape, self.dtype)
        ctypes.memmove(out.ctypes.data, self.address, out.nbytes)
        return out

    def new_empty(self, shape, dtype):
        return Array(np.full(shape, -1, dtype))

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None, max_version=None):
        Array.streams.append(stream)
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        codes = {"f": 2, "i": 0}
        managed = ctypes.create_string_buffer(ctypes.sizeof(Tensor) + 16)
        tensor = Tensor.from_buffer(managed)
        tensor.data, tensor.device_type, tensor.ndim = self.address, 2, len(self.shape)
        tensor.code, tensor.bits = codes[self.dtype.kind], self.dtype.itemsize * 8
        tensor.lanes, tensor.shape = 1, ctypes.cast(sizes, ctypes.c_void_p).value
        KEEP.append((sizes, managed, tensor))
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(managed), b"dltensor", None)


def allocate(nbytes):
    """Memory of the emulated GPU, from the plug-in that the library has opened."""
    make = ctypes.CDLL(os.environ["MOESAIC_CUDA_PLUGIN"]).emulated_gpu_allocate
    make.restype, make.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    return make(nbytes)


def on_host_memory(x, logits, stack):
    mo.moe_forward(x, logits, stack, top_k=2, workspace=mo.Workspace(1 << 20))


def marlin(rng, k, n, group, act_order):
    """Three random GPTQ experts [K, N]; act-order differs from expert to expert."""
    words = rng.integers(-(2**31), 2**31, (3, k // 8, n), dtype=np.int64).astype(np.int32)
    scales = (rng.random((3, k // group, n)) * 0.02 + 0.01).astype(np.float16)
    zeros = np.full((3, k // group, n // 8), 0x53535353, np.int32)
    order = None
    if act_order:
        order = np.stack([rng.permutation(np.arange(k) // group) for _ in range(3)])
    return mo.MarlinExpertStack.from_gptq(
        words,
        scales,
        zeros,
        g_idx=None if order is None else order.astype(np.int32),
        group_size=group,
    )


def check_int4(close):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((9, 64), np.float32)
    logits = rng.standard_normal((9, 3), np.float32)
    for group in (32, 64):
        for act_order in (False, True):
            parts = {
                "gate_up": marlin(rng, 64, 2 * 64, group, act_order),
                "down": marlin(rng, 64, 64, group, act_order),
            }
            host = mo.ExpertStack.from_marlin(**parts)
            stack = mo.ExpertStack.from_marlin(**parts, device="cuda:0")
            routing = mo.route(logits, top_k=2)
            want = mo.moe_forward_cpu(x, routing, host)
            close(mo.moe_forward(Array(x), Array(logits), stack, top_k=2, precision="exact"), want)


def main():
    package = types.ModuleType("fakecuda")
    package.float32, package.int32 = np.float32, np.int32
    package.cuda = types.SimpleNamespace(
        current_stream=lambda index: types.SimpleNamespace(cuda_stream=0x90 + index)
    )
    sys.modules["fakecuda"] = package
    Array.__module__ = "fakecuda"

    gpu = next(b for b in mo.backends() if b.name == "cuda")
    assert gpu.available and "emulated" in gpu.detail, gpu

    rng = np.random.default_rng(1)
    shapes = ((5, 48, 64), (5, 48, 64), (5, 64, 48))
    gate, up, down = (rng.standard_normal(s, np.float32) * 0.2 for s in shapes)
    host = mo.ExpertStack.from_dense_stacks(gate, up, down)
    stack = mo.ExpertStack.from_dense_stacks(gate, up, down, device="cuda:0")
    x = rng.standard_normal((7, 64), np.float32)
    logits = rng.standard_normal((7, 5), np.float32)
    want = mo.moe_forward(x, logits, host, top_k=2, precision="exact")

    def close(got, expected):
        assert isinstance(got, Array), type(got)
        error = np.linalg.norm(got.numpy() - expected) / np.linalg.norm(expected)
        assert error < 1e-4, error

    xd, ld = Array(x), Array(logits)
    close(mo.moe_forward(xd, ld, stack, top_k=2, precision="exact"), want)
    assert set(Array.streams) == {-1}, Array.streams  # all of it on the package's current stream
    Array.streams.clear()
    close(mo.moe_forward(xd, ld, stack, top_k=2, precision="exact", stream=0x1234), want)
    assert 0x1234 in Array.streams

    workspace = mo.Workspace.for_stack(stack, 2, 7)
    out = xd.new_empty((7, 64), np.float32)
    assert (
        mo.moe_forward(xd, ld, stack, top_k=2, precision="exact", out=out, workspace=workspace)
        is out
    )
    close(out, want)

    routing = mo.route(logits, top_k=2)
    on_gpu = mo.Routing(Array(routing.topk_ids), Array(routing.topk_weights))
    assert on_gpu.num_tokens == 7 and on_gpu.top_k == 2 and "cuda:0" in repr(on_gpu)
    for given in (routing, on_gpu):
        close(mo.moe_forward(xd, None, stack, routing=given, precision="exact"), want)
    config = mo.MoeConfig(64, 48, 5, 2)
    layer = mo.MoeLayer(stack, config)
    y, chosen = layer(xd, ld, return_routing=True, precision="exact")
    close(y, want)
    np.testing.assert_array_equal(chosen.topk_ids.numpy(), routing.topk_ids)
    assert "cuda:0" in repr(layer)

    ids = np.array([[0, 4], [1, -1], [2, 2], [3, 0], [4, 1], [0, 0], [1, 3]], np.int32)
    h = host.gemv_gate_up_silu(x, np.maximum(ids, 0), precision="exact") * (ids >= 0)[..., None]
    close(stack.gemv_gate_up_silu(xd, Array(ids), precision="exact"), h)

    check_int4(close)

    refusals = [
        (mo.DeviceError, lambda: mo.moe_forward(x, None, stack, routing=on_gpu)),
        (mo.DeviceError, lambda: mo.moe_forward(xd, logits, stack, top_k=2)),
        (mo.DeviceError, lambda: mo.moe_forward(xd, ld, host, top_k=2)),
        (mo.DeviceError, lambda: mo.moe_forward(x, None, host, routing=on_gpu)),
        (mo.DeviceError, lambda: mo.moe_forward(x, logits, host, top_k=2, stream=1)),
        (mo.DTypeError, lambda: mo.moe_forward(xd, ld, stack, top_k=2, stream="main")),
        (mo.DTypeError, lambda: stack.gemv_gate(xd, Array(ids.astype(np.int64)))),
        (mo.WorkspaceError, lambda: on_host_memory(xd, ld, stack)),
        (mo.UnsupportedError, lambda: stack.dequantize("up", 0)),
    ]  # fmt: skip
    for error, call in refusals:
        try:
            call()
        except error:
            continue
        raise AssertionError(f"no {error.__name__}")
    close(mo.moe_forward(xd, ld, stack, top_k=2, precision="exact"), want)


if __name__ == "__main__":
    main()

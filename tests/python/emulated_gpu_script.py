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


class CurrentDevice:
    """The current device of ``fakecuda``, which exports arrays of that one only, as torch does."""

    number = 0

    def __init__(self, number):
        self.wanted = number

    def __enter__(self):
        self.before, CurrentDevice.number = CurrentDevice.number, self.wanted

    def __exit__(self, *error):
        CurrentDevice.number = self.before


class Memory:
    """Emulated device memory with numpy's shape and dtype."""

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

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None, max_version=None):
        if CurrentDevice.number != 0:
            raise BufferError("Can't export tensors on a different CUDA device index")
        Memory.streams.append(stream)
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


class Array(Memory):
    """An array of the package ``fakecuda``."""

    def new_empty(self, shape, dtype):
        return Array(np.full(shape, -1, dtype))


class Frozen(Memory):
    """An array of the package ``fakejax``, whose arrays cannot be written to."""


def from_dlpack(producer):
    """``fakejax.from_dlpack``: a copy of what the producer exports."""
    assert producer.__dlpack_device__() == (2, 0)
    capsule = producer.__dlpack__(stream=1)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = Tensor.from_address(get(capsule, b"dltensor"))
    assert (tensor.device_type, tensor.device_id, tensor.code, tensor.bits) == (2, 0, 2, 32)
    shape = (ctypes.c_int64 * tensor.ndim).from_address(tensor.shape)
    values = np.empty(tuple(shape), np.float32)
    ctypes.memmove(values.ctypes.data, tensor.data + tensor.byte_offset, values.nbytes)
    return Frozen(values)


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


def check_phases(close):
    """Products of a Marlin stack, with dispatches and aligned routings in host memory."""
    rng = np.random.default_rng(3)
    host = marlin(rng, 64, 192, 32, True)
    gpu = host.to("cuda:0")
    assert (host.device, gpu.device) == ("cpu", "cuda:0") and "cuda:0" in repr(gpu)
    weights = np.stack([host.dequantize(e) for e in range(3)])  # [E, N, K]
    np.testing.assert_array_equal(gpu.dequantize(1), weights[1])
    x = rng.standard_normal((6, 64), np.float32)
    xd = Array(x)

    dispatches = [(2, 0, 3, 2), (0, 4, 0, 1)]
    want = np.zeros((5, 192), np.float32)
    want[3:5], want[0] = x[0:2] @ weights[2].T, x[4] @ weights[0].T
    close(gpu.gemm_phase_batched(xd, dispatches, precision="exact"), want)
    out = Array(np.full((5, 192), 7, np.float32))
    assert gpu.gemm_phase_batched(xd, dispatches, out=out, precision="exact") is out
    want[1:3] = 7
    close(out, want)

    ids = np.array([[0, 1], [-1, 2], [1, 0], [-1, -1], [0, -1], [2, 1]], np.int32)
    aligned = mo.align_block_size(mo.Routing(ids, np.ones((6, 2), np.float32)), 3, 8)
    pairs = np.zeros((12, 192), np.float32)
    for p, e in enumerate(ids.ravel()):
        if e >= 0:
            pairs[p] = weights[e] @ x[p // 2]
    Memory.streams.clear()
    close(gpu.gemm_phase_vllm(xd, aligned, 2, precision="exact", stream=0x1234), pairs)
    assert 0x1234 in Memory.streams

    bias = rng.standard_normal(128).astype(np.float32)
    linear = gpu.make_expert_linear(1, 64, bias=bias)
    close(linear(xd, precision="exact"), x @ weights[1, 64:].T + bias)


def check_operations(close):
    """Operations over a host plan, with a routing on the host or on the device."""
    rng = np.random.default_rng(5)
    weights = [
        rng.standard_normal(s, np.float32) * 0.2 for s in ((4, 48, 64), (4, 48, 64), (4, 64, 48))
    ]
    stack = mo.ExpertStack.from_dense_stacks(*weights, device="cuda:0")
    host = mo.ExpertStack.from_dense_stacks(*weights)
    x = rng.standard_normal((5, 64), np.float32)
    ids = np.array([[0, 1], [-1, 2], [1, 0], [-1, -1], [3, -1]], np.int32)
    weight = rng.random((5, 2), np.float32)
    routing, on_gpu = mo.Routing(ids, weight), mo.Routing(Array(ids), Array(weight))
    plan = mo.BucketPlan.build(routing, 4)
    rows = mo.gather_rows(x, plan)
    close(mo.gather_rows(Array(x), plan), rows)
    with mo.tuning(precision="exact"):
        up = host.gemm_up(x, plan)
        close(stack.gemm_gate(Array(x), plan), host.gemm_gate(x, plan))
        close(stack.gemm_up(Array(x), plan, stream=0x1234), up)
        close(stack.gemm_down(Array(up), plan), host.gemm_down(up, plan))
    close(mo.silu_mul(Array(up)), mo.silu_mul(up))
    pairs = rng.standard_normal((5, 2, 64), np.float32)
    for given in (routing, on_gpu):
        close(mo.combine(Array(rows), plan, given), mo.combine(rows, plan, routing))
        close(mo.weighted_sum(Array(pairs), given), mo.weighted_sum(pairs, routing))
    out = Array(np.ones((5, 64), np.float32))
    mo.weighted_sum(Array(pairs), on_gpu, out=out, accumulate=True)
    close(out, 1 + mo.weighted_sum(pairs, routing))

    refused = [
        lambda: mo.BucketPlan.build(on_gpu, 4),
        lambda: mo.align_block_size(on_gpu, 4, 8),
        lambda: plan.rebuild(on_gpu),
        lambda: mo.route(x, top_k=2, out=on_gpu),
        lambda: mo.weighted_sum(pairs, on_gpu),
        lambda: mo.combine(rows, plan, routing, out=Array(rows[:5])),
        lambda: stack.gemm_up(x, plan),
    ]
    for call in refused:
        try:
            call()
        except mo.DeviceError:
            continue
        raise AssertionError("no DeviceError")


def parts_of(rng, kind):
    """Config facts and arrays of a layer [64, 48] of 5 experts, and what its calls bring."""

    def ones(n):
        return 1 + rng.standard_normal(n, np.float32) * 0.2

    facts, arrays, call = {}, {}, {}
    router = mo.RouterConfig(5, 2)
    if kind == "norms":
        facts = {"input_norm": True, "router_input": "norm", "norm_eps": 1e-3}
        arrays = {"input_norm": ones(64), "router_norm": ones(64)}
    if kind == "latent":
        facts = {"latent_size": 32, "latent_norm": True}
        arrays = {
            "latent": (
                rng.standard_normal((32, 64), np.float32) * 0.1,
                rng.standard_normal((64, 32), np.float32) * 0.1,
            ),
            "latent_norm": ones(32),
        }
    if kind == "identity":
        router = mo.RouterConfig(8, 2, identity_experts=3)
    if kind == "input_weights":
        router = mo.RouterConfig(5, 2, score="sigmoid", renormalize=False, weight_on="input")
    if kind in ("table", "given"):
        router = mo.RouterConfig(5, 2, score="sigmoid", select_on="given")
        table = np.array([[0, 1], [2, 4], [3, 0]], np.int32)
        tokens = np.array([2, 0, 1, 1, 0, 2, 1], np.int32)
        if kind == "table":
            facts, arrays, call = {"vocab_size": 3}, {"token_experts": table}, {"token_ids": tokens}
        else:
            call = {"topk_ids": table[tokens]}
    return mo.MoeConfig(64, 48, 5, 2, router=router, **facts), arrays, call


def check_parts(close):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((7, 64), np.float32)
    for kind in ("norms", "latent", "identity", "input_weights", "table", "given"):
        config, arrays, call = parts_of(rng, kind)
        hidden = config.latent_size or 64
        weights = [
            rng.standard_normal(s, np.float32) * 0.2
            for s in ((5, 48, hidden), (5, 48, hidden), (5, hidden, 48))
        ]
        router_weight = rng.standard_normal((config.router.num_experts, 64), np.float32) * 0.3
        host, gpu = (
            mo.MoeLayer(
                mo.ExpertStack.from_dense_stacks(*weights, device=device),
                config, router_weight, **arrays,
            )
            for device in ("cpu", "cuda:0")
        )  # fmt: skip
        want, chosen = host(x, return_routing=True, precision="exact", **call)
        on_gpu = {name: Array(ids) for name, ids in call.items()}
        y, routing = gpu(Array(x), return_routing=True, precision="exact", **on_gpu)
        close(y, want)
        np.testing.assert_array_equal(routing.topk_ids.numpy(), chosen.topk_ids)
    with mo.profile("sync") as p:
        close(gpu(Array(x), precision="exact", **on_gpu), want)
    assert {"sync", "router", "gate_up", "down"} <= set(p.zones), p.zones


def main():
    package = types.ModuleType("fakecuda")
    package.float32, package.int32 = np.float32, np.int32
    package.cuda = types.SimpleNamespace(
        current_stream=lambda index: types.SimpleNamespace(cuda_stream=0x90 + index),
        current_device=lambda: CurrentDevice.number,
        device=CurrentDevice,
    )
    sys.modules["fakecuda"] = package
    Array.__module__ = "fakecuda"
    sys.modules["fakejax"] = types.ModuleType("fakejax")
    sys.modules["fakejax"].from_dlpack = from_dlpack
    Frozen.__module__ = "fakejax"

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

    def close(got, expected, kind=Array):
        assert type(got) is kind, type(got)
        error = np.linalg.norm(got.numpy() - expected) / np.linalg.norm(expected)
        assert error < 1e-4, error

    xd, ld = Array(x), Array(logits)
    close(mo.moe_forward(xd, ld, stack, top_k=2, precision="exact"), want)
    assert set(Memory.streams) == {-1}, Memory.streams  # all of it on the package's current stream
    Memory.streams.clear()
    close(mo.moe_forward(xd, ld, stack, top_k=2, precision="exact", stream=0x1234), want)
    assert 0x1234 in Memory.streams

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

    # An array of a GPU that is not the current one, which stays so.
    CurrentDevice.number = 1
    close(mo.moe_forward(xd, ld, stack, top_k=2, precision="exact"), want)
    assert CurrentDevice.number == 1
    CurrentDevice.number = 0

    # Arrays that cannot be written to: results are handed over.
    frozen = Frozen(x)
    close(mo.moe_forward(frozen, Frozen(logits), stack, top_k=2, precision="exact"), want, Frozen)
    close(mo.moe_forward(frozen, None, stack, routing=routing, precision="exact"), want, Frozen)

    check_int4(close)
    check_phases(close)
    check_operations(close)
    check_parts(close)

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
        (mo.UnsupportedError, lambda: layer(frozen, Frozen(logits), return_routing=True)),
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

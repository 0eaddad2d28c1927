#!/usr/bin/env python3
"""Whether two builds compute the same, bit by bit.

``python tests/same_bits.py record FILE`` runs every weight format on every path, instruction set
and number of threads, the parts by name, routers, activations, Marlin stacks, offloaded layers and,
where ``EMULATED_GPU_FOLDER`` is set, emulated CUDA kernels, and writes a digest of each output.
``compare FILE`` runs them again and names every output that changed. Record with the build before
a change that must not touch results, compare with the one after it. ``--data FOLDER`` adds the
layers of that folder's GGUF files.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import moesaic as mo

E, H, I, TOP_K = 6, 512, 256, 2
TOKENS = (1, 3, 17, 70)
ACTIVATIONS = (
    *("swiglu", "swiglu_clamp_input", "swiglu_clamp_output", "swiglu_oai", "geglu_tanh"),
    *("reglu", "gelu_tanh", "relu_squared", "situ"),
)

Outputs = Iterator[tuple[str, typing.Any]]


def random_bytes(rng: np.random.Generator, quant: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of a tensor whose blocks all decode to moderate numbers, whatever the codes in them."""
    facts = mo.testing.quant_types()[quant]
    elems, nbytes = facts["block_elems"], facts["block_bytes"]
    count = int(np.prod(shape)) // elems
    if quant in ("F32", "F16", "BF16"):
        return mo.testing.quantize(rng.standard_normal(shape, np.float32), quant).ravel()
    blocks = rng.integers(0, 256, (count, nbytes), np.uint8)
    for _ in range(200):
        values = mo.testing.dequantize(blocks.ravel(), quant, (count, elems))
        with np.errstate(invalid="ignore"):
            bad = ~(np.abs(values).max(axis=1) < 100)
        if not bad.any():
            return blocks.ravel()
        blocks[bad] = rng.integers(0, 256, (int(bad.sum()), nbytes), np.uint8)
    raise RuntimeError(f"no moderate blocks of {quant}")


def stack_of(
    quant: str, seed: int = 0, down: str | None = None, gated: bool = True, **options: str
) -> mo.ExpertStack:
    rng = np.random.default_rng(seed)
    shapes = ((quant, (E, I, H)), (quant, (E, I, H)), (down or quant, (E, H, I)))
    roles = [(random_bytes(rng, t, shape), t, shape) for t, shape in shapes]
    return mo.ExpertStack.from_encoded(roles[0] if gated else None, *roles[1:], **options)


def formats() -> list[str]:
    types = mo.testing.quant_types()
    return [t for t in types if types[t]["decodes"] and t not in ("F64", "INT4")]


def instruction_sets() -> list[str]:
    found = []
    for isa in ("scalar", "avx2", "avxvnni", "avx512vnni", "amx", "neon"):
        try:
            with mo.tuning(cpu_isa=isa):
                mo.moe_forward(*tiny(), top_k=1)
        except mo.Error:
            continue
        found.append(isa)
    return found


def tiny() -> tuple[np.ndarray, np.ndarray, mo.ExpertStack]:
    w = np.ones((2, 32, 32), np.float32)
    return (
        np.ones((1, 32), np.float32),
        np.ones((1, 2), np.float32),
        mo.ExpertStack.from_dense_stacks(w, w, w),
    )


def inputs(tokens: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, tokens))
    return (
        rng.standard_normal((tokens, H), np.float32),
        rng.standard_normal((tokens, E), np.float32),
    )


def forwards(isas: list[str]) -> Outputs:
    paths = [
        *({"gemm": "auto"}, {"gemm": "bucketed"}),
        *({"gemm": "aligned", "row_space": r} for r in ("token_pairs", "packed_rows")),
    ]
    for quant, isa in itertools.product(formats(), isas):
        with mo.tuning(cpu_isa=isa):
            stack = stack_of(quant)
            options = itertools.product(("exact", "fast"), (1, 2), paths, TOKENS)
            for precision, threads, path, tokens in options:
                if isa == "scalar" and tokens == TOKENS[-1]:
                    continue  # slow, and no other code than at fewer tokens
                x, logits = inputs(tokens)
                with mo.tuning(cpu_isa=isa, precision=precision, threads=threads, **path):
                    y = mo.moe_forward(x, logits, stack, top_k=TOP_K)
                yield f"{quant} {isa} {precision} {threads} {path} {tokens}", y
    for isa in isas:
        with mo.tuning(cpu_isa=isa):
            yield from mixed(isa)


def mixed(isa: str) -> Outputs:
    """Two types in a layer, element types of x, activations, layouts, references."""
    for quant, down in (("Q4_K", "Q6_K"), ("IQ4_XS", "F16"), ("MXFP4", "Q8_0")):
        for layout in ("auto", "file"):
            stack = stack_of(quant, 3, down, layout=layout)
            for tokens, dtype in itertools.product(TOKENS, (np.float32, np.float16)):
                x, logits = inputs(tokens)
                y = mo.moe_forward(x.astype(dtype), logits, stack, top_k=TOP_K)
                yield f"mixed {isa} {quant} {layout} {tokens} {np.dtype(dtype).name}", y
        x, logits = inputs(17)
        y = mo.moe_forward_cpu(x, mo.route(logits, top_k=TOP_K), stack)
        yield f"reference {isa} {quant}", y
    for kind in ACTIVATIONS:
        stack = stack_of("Q4_K", 4, gated=mo.Activation(kind).gated)
        x, logits = inputs(17)
        activation = mo.Activation(kind, limit=1.5, beta=2.0, linear_beta=3.0)
        y = mo.moe_forward(x, logits, stack, top_k=TOP_K, activation=activation)
        yield f"activation {isa} {kind}", y


def parts(isas: list[str]) -> Outputs:
    for isa, quant in itertools.product(isas, ("Q4_K", "IQ2_S", "Q8_0", "BF16")):
        with mo.tuning(cpu_isa=isa):
            stack = stack_of(quant, 5)
            x, logits = inputs(9)
            routing = mo.route(logits, top_k=TOP_K)
            plan = mo.BucketPlan.build(routing, E)
            ids = routing.topk_ids
            at = f"part {isa} {quant}"
            hidden = stack.gemv_gate_up_silu(x, ids)
            yield f"{at} gemv_gate", stack.gemv_gate(x, ids)
            yield f"{at} gemv_up", stack.gemv_up(x, ids)
            yield f"{at} gemv_gate_up_silu", hidden
            yield f"{at} gemv_down", stack.gemv_down(hidden, ids)
            rows = stack.gemm_up(x, plan)
            yield f"{at} gemm_gate", stack.gemm_gate(x, plan)
            yield f"{at} gemm_up", rows
            yield f"{at} gemm_down", stack.gemm_down(rows, plan)
    yield "gather_rows", mo.gather_rows(x, plan)
    yield "silu_mul", mo.silu_mul(rows)
    pairs = np.random.default_rng(6).standard_normal((9, TOP_K, H), np.float32)
    yield "weighted_sum", mo.weighted_sum(pairs, routing)
    yield "combine", mo.combine(pairs.reshape(-1, H), plan, routing)
    for name in ("expert_offsets", "row_token", "row_pair", "pair_row"):
        yield f"plan {name}", getattr(plan, name)
    for block, space in itertools.product((8, 16, 64), ("token_pairs", "packed_rows")):
        aligned = mo.align_block_size(routing, E, block, space)
        yield f"aligned {block} {space} ids", aligned.sorted_ids
        yield f"aligned {block} {space} experts", aligned.block_experts


def routers() -> Outputs:
    rng = np.random.default_rng(7)
    logits = rng.standard_normal((64, 16), np.float32) * 3
    logits[3, 5], logits[4], logits[5, 2] = np.nan, -np.inf, np.inf
    logits[6, :] = logits[6, 0]
    bias = rng.standard_normal(16).tolist()
    choices = itertools.product(
        ("softmax", "softmax_selected", "sigmoid", "sqrt_softplus"),
        (False, True),
        ("scores", "logits"),
        ((1, 1), (4, 2)),
        ("top2_sum", "max"),
        ("minus_infinity", "zero"),
        ([], bias),
    )
    for number, (score, renormalize, on, groups, reduce, mask, select) in enumerate(choices):
        try:
            router = mo.RouterConfig(
                *(16, 4),
                score=score,
                renormalize=renormalize,
                guard=("none", "add_eps", "clamp_min")[number % 3],
                guard_eps=1e-3,
                scale=(1.0, 2.5)[number % 2],
                select_on=on,
                num_groups=groups[0],
                groups_used=groups[1],
                group_reduce=reduce,
                group_mask=mask,
                router_bias=bias if number % 5 == 0 else [],
                selection_bias=select,
            )
        except mo.ConfigError:
            continue
        routing = mo.route(logits, router)
        facts = json.dumps(router.to_dict(), sort_keys=True)
        at = f"route {hashlib.sha256(facts.encode()).hexdigest()[:12]}"
        yield f"{at} ids", routing.topk_ids
        yield f"{at} weights", routing.topk_weights


def gptq(rng: np.random.Generator, k: int, n: int, group: int, act_order: bool, sym: bool):
    """Three random experts [K, N]; the order of columns differs from expert to expert."""
    words = rng.integers(-(2**31), 2**31, (3, k // 8, n), dtype=np.int64).astype(np.int32)
    scales = (rng.random((3, k // group, n)) * 0.02 + 0.01).astype(np.float16)
    zeros = rng.integers(0, 2**31, (3, k // group, n // 8), np.int32) & 0x77777777  # at most 8
    order = None
    if act_order:
        order = np.stack([rng.permutation(np.arange(k) // group) for _ in range(3)])
        order = order.astype(np.int32)
    return mo.MarlinExpertStack.from_gptq(
        words, scales, None if sym else zeros, g_idx=order, group_size=group
    )


def marlin(isas: list[str]) -> Outputs:
    for isa, group, act_order, sym in itertools.product(
        isas, (32, 128), (False, True), (False, True)
    ):
        rng = np.random.default_rng(8)
        with mo.tuning(cpu_isa=isa):
            gate_up = gptq(rng, 256, 512, group, act_order, sym)
            down = gptq(rng, 256, 256, group, act_order, sym)
            stack = mo.ExpertStack.from_marlin(gate_up=gate_up, down=down)
            at = f"marlin {isa} {group} {act_order} {sym}"
            yield f"{at} dequantize", gate_up.dequantize(1)
            for tokens, precision in itertools.product((1, 5, 40), ("exact", "fast")):
                x = rng.standard_normal((tokens, 256), np.float32)
                logits = rng.standard_normal((tokens, 3), np.float32)
                y = mo.moe_forward(x, logits, stack, top_k=2, precision=precision)
                yield f"{at} {tokens} {precision}", y
            aligned = mo.align_block_size(mo.route(logits, top_k=2), 3, 16)
            yield f"{at} batched", gate_up.gemm_phase_batched(x, [(2, 0, 3, 3), (0, 3, 0, 2)])
            yield f"{at} vllm", gate_up.gemm_phase_vllm(x, aligned, 2)
            yield f"{at} linear", gate_up.make_expert_linear(1, 64)(x)
            for layout in ("marlin", "p4"):
                try:
                    packed = down.repack(layout, 1)
                except mo.UnsupportedError:
                    continue
                for name, value in sorted(packed.items()):
                    if hasattr(value, "shape"):
                        yield f"{at} {layout} {name}", value


def files(folder: Path) -> Outputs:
    """Layers of real files: with their routers, and offloaded with half of the experts in slots."""
    for path in sorted(folder.glob("*.gguf")):
        try:
            file = mo.GgufFile(path)
        except mo.Error as error:
            yield f"file {path.name}", np.frombuffer(type(error).__name__.encode(), np.uint8)
            continue
        with file:
            for layer in file.moe_layers:
                yield from file_layer(file, f"file {path.name} {layer}", layer)


def file_layer(file: mo.GgufFile, at: str, index: int) -> Outputs:
    try:
        layer = mo.MoeLayer.from_gguf(file, index)
    except mo.Error as error:
        yield at, np.frombuffer(type(error).__name__.encode(), np.uint8)
        return
    for tokens, precision in itertools.product((1, 17), ("exact", "fast")):
        rng = np.random.default_rng(tokens)
        x = rng.standard_normal((tokens, layer.config.hidden_size), np.float32)
        try:
            y, routing = layer(x, precision=precision, return_routing=True)
        except mo.Error as error:
            yield at, np.frombuffer(type(error).__name__.encode(), np.uint8)
            return
        yield f"{at} {tokens} {precision}", y
        yield f"{at} {tokens} {precision} ids", routing.topk_ids
        yield f"{at} {tokens} {precision} weights", routing.topk_weights


def offloaded() -> Outputs:
    rng = np.random.default_rng(9)
    shapes = ((E, H, I), (E, H, I), (E, I, H))
    store = mo.MoeExpertStore.from_arrays(
        [tuple(rng.standard_normal(s, np.float32) * 0.05 for s in shapes)]
    )
    config = mo.MoeConfig(H, I, E, TOP_K)
    for miss, tokens in itertools.product(("compute", "stage"), (1, 17)):
        pool = mo.ExpertPool(E, E // 2, mo.RefreshPolicy.manual())
        with mo.MoeLayer.from_store(store, 0, pool=pool, on_miss=miss, config=config) as layer:
            pool.apply_target([0, 2, 4])
            store.apply([pool])
            x, logits = inputs(tokens)
            y = layer(x, logits)
        yield f"offload {miss} {tokens}", y


class Tensor(ctypes.Structure):
    """DLTensor of DLPack 1.0."""

    _fields_: typing.ClassVar = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class GpuArray:
    """An array in memory of the emulated GPU."""

    kept: typing.ClassVar[list] = []  # what capsules point to

    def __init__(self, values):
        values = np.ascontiguousarray(values)
        self.dtype, self.shape = values.dtype, values.shape
        library = ctypes.CDLL(os.environ["MOESAIC_CUDA_PLUGIN"])
        library.emulated_gpu_allocate.restype = ctypes.c_void_p
        library.emulated_gpu_allocate.argtypes = [ctypes.c_size_t]
        self.address = library.emulated_gpu_allocate(max(values.nbytes, 1))
        ctypes.memmove(self.address, values.ctypes.data, values.nbytes)

    def numpy(self):
        out = np.empty(self.shape, self.dtype)
        ctypes.memmove(out.ctypes.data, self.address, out.nbytes)
        return out

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, *, stream=None, max_version=None):
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        managed = ctypes.create_string_buffer(ctypes.sizeof(Tensor) + 16)
        tensor = Tensor.from_buffer(managed)
        tensor.data, tensor.device_type, tensor.ndim = self.address, 2, len(self.shape)
        tensor.code, tensor.bits = {"f": 2, "i": 0}[self.dtype.kind], self.dtype.itemsize * 8
        tensor.lanes, tensor.shape = 1, ctypes.cast(sizes, ctypes.c_void_p).value
        self.kept.append((sizes, managed, tensor))
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(managed), b"dltensor", None)


def emulated_gpu() -> Outputs:
    """Small layers on the emulated GPU: every format, and every path of two."""
    global E, H, I
    E, H, I = 4, 256, 256
    for quant in formats():
        try:
            stack = stack_of(quant, 10, device="cuda:0")
        except mo.UnsupportedError:
            continue
        paths = [{"gemm": "auto"}]
        if quant in ("Q4_K", "F16"):
            paths += [
                {"gemm": "aligned", "row_space": r} for r in ("token_pairs", "packed_rows")
            ] + [{"gemm": "bucketed"}]
        sizes = (1, 5) if quant != "Q4_K" else (1, 5, 40)
        for path, tokens, dtype in itertools.product(paths, sizes, (np.float32, np.float16)):
            x, logits = inputs(tokens)
            out = GpuArray(np.full((tokens, H), 7, dtype))
            with mo.tuning(**path):
                mo.moe_forward(
                    GpuArray(x.astype(dtype)), GpuArray(logits), stack, top_k=TOP_K, out=out
                )
            yield f"cuda {quant} {path} {tokens} {np.dtype(dtype).name}", out.numpy()
    rng = np.random.default_rng(11)
    for group, act_order, sym in itertools.product((32, 128), (False, True), (False, True)):
        parts = {
            "gate_up": gptq(rng, 128, 256, group, act_order, sym),
            "down": gptq(rng, 128, 128, group, act_order, sym),
        }
        stack = mo.ExpertStack.from_marlin(**parts, device="cuda:0")
        x = rng.standard_normal((5, 128), np.float32)
        logits = rng.standard_normal((5, 3), np.float32)
        out = GpuArray(np.full((5, 128), 7, np.float32))
        mo.moe_forward(GpuArray(x), GpuArray(logits), stack, top_k=2, out=out)
        yield f"cuda INT4 {group} {act_order} {sym}", out.numpy()


def outputs(data: Path | None) -> Outputs:
    isas = instruction_sets()
    yield from parts(isas)
    yield from routers()
    yield from marlin(isas)
    yield from offloaded()
    if data is not None:
        yield from files(data)
    yield from forwards(isas)
    if "MOESAIC_CUDA_PLUGIN" in os.environ:
        yield from emulated_gpu()


def digest(value: typing.Any) -> str:
    array = np.ascontiguousarray(value)
    head = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()[:24]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    arguments.add_argument("command", choices=("record", "compare"))
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--data", type=Path, help="a folder with GGUF files")
    options = arguments.parse_args()
    folder = os.environ.get("EMULATED_GPU_FOLDER")
    if folder and "MOESAIC_CUDA_PLUGIN" not in os.environ:
        # The loader reads its path at the start of a process only.
        plugin = str(Path(folder) / "libmoesaic_cuda_emulated.so")
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "MOESAIC_CUDA_PLUGIN": plugin}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    found = {name: digest(value) for name, value in outputs(options.data)}
    if options.command == "record":
        options.file.write_text(json.dumps(found, indent=0, sort_keys=True))
        print(f"recorded {len(found)} outputs")
        return 0
    before = json.loads(options.file.read_text())
    changed = [name for name in before if found.get(name) != before[name]]
    for name in changed:
        print("missing" if name not in found else "changed", name)
    new = len(found.keys() - before.keys())
    print(f"{len(before) - len(changed)} outputs equal, {len(changed)} not, {new} new")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Arguments that another thread changes during a call: wrong numbers at most, never a crash.

The stub says which functions take arrays, routings or plans; each of those arguments is overwritten
with numbers that checks refuse while calls run, in a process of its own.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic as mo

PRELUDE = """
import os, sys, tempfile, threading, time
import numpy as np
import moesaic as mo
from moesaic import _core
path = os.path.join(tempfile.mkdtemp(), "small.gguf")
mo.testing.write_moe_gguf(path, num_experts=8, top_k=3, hidden=256, intermediate=256)
file = mo.GgufFile(path)
layer = mo.MoeLayer.from_gguf(file, 0)
stack, T = layer.stack, 600
floats = lambda *shape: np.ones(shape, np.float32)
words = lambda *shape: np.zeros(shape, np.int32)
x, ids, weights, logits = floats(T, 256), words(T, 3), floats(T, 3), floats(T, 8)
routing = mo.route(logits, top_k=3)
plan = mo.BucketPlan.build(routing, 8)
aligned = mo.align_block_size(routing, 8, 16)
small = [mo.route(floats(n, 8), top_k=3) for n in (0, 1, 40, 900)]
given = mo.RouterConfig(8, 3, select_on="given")
by_token = mo.MoeConfig(
    16, 16, 8, 2, router=mo.RouterConfig(8, 2, select_on="given"), vocab_size=50)
gate, up, down = floats(8, 16, 16), floats(8, 16, 16), floats(8, 16, 16)
dense = mo.ExpertStack.from_dense_stacks(gate, up, down)
by_given = mo.MoeLayer(dense, mo.MoeConfig(16, 16, 8, 3, router=given))
table, tokens, narrow = words(50, 2), words(T), floats(T, 16)
by_ids = mo.MoeLayer(dense, by_token, token_experts=table)
coded = mo.testing.quantize(floats(8, 256, 256), "Q4_K")
role = (coded, "Q4_K", (8, 256, 256))
qweight, scales, qzeros = words(2, 16, 64), np.ones((2, 1, 64), np.float16), words(2, 1, 8)
g_idx = words(128)
marlin = mo.MarlinExpertStack.from_gptq(qweight, scales, group_size=128)
linear = marlin.make_expert_linear(0)
pool = mo.ExpertPool(8, 4)
store = mo.MoeExpertStore.from_gguf(file)
bias, packed = floats(64), floats(T, 128)
rows, pairs, hidden = floats(T * 3, 256), floats(T * 3, 256), floats(T * 3, 256)
blocks, by_column = floats(2, 256, 256), np.abs(floats(2, 256))
spec = ("F32", "a", "b", "c")
y, yp = floats(T, 256), floats(T * 3, 256)
def builder():
    return _core.StackBuilder(1, 32, 32, gate=None, up=spec, down=spec)
part, part_bias = floats(32, 32), floats(32)
factors, bias4, low, high = floats(8), floats(256), floats(8, 2, 16), floats(8, 16, 2)
one = mo.ExpertStack.from_dense_stacks(floats(1, 8, 8), floats(1, 8, 8), floats(1, 8, 8))
stack_bias, importance, order = floats(8, 16), floats(256), np.arange(8, dtype=np.int32)
y16, out16, out256, wide = floats(T, 16), floats(T, 3, 256), floats(T, 3, 256), floats(T * 3, 256)
marlin_out, halves = floats(T, 64), mo.MarlinExpertStack.from_gptq(
    words(2, 16, 256), np.ones((2, 1, 256), np.float16), group_size=128)
pair_out, marlin_factors = floats(T * 3, 64), floats(2)
norms = mo.MoeConfig(16, 16, 8, 3, shared="sigmoid_gated", shared_intermediate_size=16,
    latent_size=16, latent_norm=True, input_norm=True, router_input="norm")
plain = mo.MoeConfig(16, 16, 8, 3, shared="sigmoid_gated", shared_intermediate_size=16)
shared = mo.ExpertStack.from_dense_stacks(
    floats(1, 16, 16), floats(1, 16, 16), floats(1, 16, 16))
router, shared_gate, down_in, up_out = floats(8, 16), floats(16), floats(16, 16), floats(16, 16)
latent_norm, input_norm, router_norm = floats(16), floats(16), floats(16)
own_store = mo.MoeExpertStore.from_arrays([(gate, up, down)])
router_rows, biases, bias2 = floats(T, 16), floats(8, 256), floats(2, 128)
halves_down = mo.MarlinExpertStack.from_gptq(
    words(2, 16, 128), np.ones((2, 1, 128), np.float16), group_size=128)
separate = mo.MoeLayer(dense, mo.MoeConfig(16, 16, 8, 3, router_input="separate"), router)
matrix = mo.QuantMatrix.from_encoded(coded[0], "Q4_K")
folder, kept = tempfile.mkdtemp(), np.arange(5, dtype=np.int32)
mo.save_safetensors(folder, layer, dequantize="bf16")
"""

# What to call, the arrays that change, and what other objects do meanwhile.
CALLS = {
    "asarray": ("mo.asarray(x, copy=True)", "x"),
    "route": ("mo.route(logits, given, topk_ids=ids, out=routing)", "logits ids"),
    "align_block_size": ("mo.align_block_size(routing, 8, 16)", ""),
    "pick_block_size": ("mo.pick_block_size(plan)", ""),
    "gather_rows": ("mo.gather_rows(x, plan, out=yp)", "x yp"),
    "silu_mul": ("mo.silu_mul(x, out=packed)", "x packed"),
    "combine": ("mo.combine(rows, plan, routing, out=y)", "rows y"),
    "weighted_sum": ("mo.weighted_sum(pairs, routing, out=y)", "pairs y"),
    "moe_forward": ("mo.moe_forward(x, None, stack, routing=routing, out=y)", "x y"),
    "moe_forward with logits": ("mo.moe_forward(x, logits, stack, top_k=3)", "x logits"),
    "moe_forward_bucketed": ("mo.moe_forward_bucketed(x, logits, stack, top_k=3)", "x logits"),
    "moe_forward_bucketed with a routing": (
        "mo.moe_forward_bucketed(x, None, stack, routing=routing, out=y)",
        "x y",
    ),
    "moe_forward_cpu": ("mo.moe_forward_cpu(narrow, routing, dense, out=y16)", "narrow y16"),
    "quantize": ("mo.testing.quantize(x, 'Q4_K', weights=importance)", "x importance"),
    "dequantize": ("mo.testing.dequantize(coded, 'Q4_K', (8, 256, 256))", "coded"),
    "MarlinLinear.__call__": ("linear(packed, out=marlin_out)", "packed marlin_out"),
    "MarlinExpertStack.from_gptq": (
        "mo.MarlinExpertStack.from_gptq(qweight, scales, qzeros, g_idx, group_size=128)",
        "qweight scales qzeros g_idx",
    ),
    "MarlinExpertStack.gemm_phase_batched": (
        "marlin.gemm_phase_batched(packed, [(0, 0, 0, 300), (1, 300, 300, 300)], out=marlin_out)",
        "packed marlin_out",
    ),
    "MarlinExpertStack.gemm_phase_vllm": (
        "marlin.gemm_phase_vllm(packed, mo.align_block_size(mo.Routing(ids, weights), 2, 16), 3, "
        "out=pair_out)",
        "packed pair_out",
    ),
    "MarlinExpertStack.make_expert_linear": ("marlin.make_expert_linear(0, bias=bias)", "bias"),
    "MarlinStackBuilder.__init__": (
        "_core.MarlinStackBuilder(2, 128, 64, 128, 'gptq', g_idx=g_idx)",
        "g_idx",
    ),
    "MarlinStackBuilder.add": (
        "_core.MarlinStackBuilder(2, 128, 64, 128, 'gptq').add(0, 0, qweight[0], scales[0], "
        "qzeros[0], 'one')",
        "qweight scales qzeros",
    ),
    "StackBuilder.add": ("builder().add('up', 0, part, 1.0, part_bias)", "part part_bias"),
    "ExpertStack.from_dense_stacks": (
        "mo.ExpertStack.from_dense_stacks(gate, up, down, biases={'up': stack_bias}, "
        "scales={'down': factors})",
        "gate up down stack_bias factors",
    ),
    "ExpertStack.from_dense_stacks encoded": (
        "mo.ExpertStack.from_dense_stacks(None, blocks, blocks, quant='Q4_K', "
        "weights={'up': by_column})",
        "blocks by_column",
    ),
    "ExpertStack.from_marlin": (
        "mo.ExpertStack.from_marlin(halves, halves_down, biases={'up': bias2}, "
        "scales={'down': marlin_factors})",
        "bias2 marlin_factors",
    ),
    "ExpertStack.from_encoded": (
        "mo.moe_forward(x, None, mo.ExpertStack.from_encoded(role, role, role, layout='file'), "
        "routing=routing)",
        "coded",
    ),
    "ExpertStack.from_encoded with biases": (
        "mo.ExpertStack.from_encoded(role, role, role, biases={'up': biases}, "
        "scales={'down': factors})",
        "biases factors",
    ),
    **{
        f"ExpertStack.{name}": (f"mo.ExpertStack.{name}({source}, 0, experts=kept)", "kept")
        for name, source in (
            ("load_from_gguf", "file"),
            ("open_and_load", "path"),
            ("load_from_safetensors", "folder"),
        )
    },
    "ExpertStack.select": ("dense.select(ids[:, 0])", "ids"),
    "ExpertStack.permute": ("dense.permute(order)", "order"),
    "ExpertStack.with_expert": (
        "stack.with_expert(3, gate=x[:256], up=(coded[2], 'Q4_K'), down=wide[:256], "
        "biases={'down': bias4})",
        "x coded wide bias4",
    ),
    "ExpertStack.with_deltas": (
        "mo.moe_forward(narrow, None, dense.with_deltas({'up': (low, high, 2)}), routing=routing)",
        "low high",
    ),
    "SharedExperts.__init__": ("mo.SharedExperts(one, factors)", "factors"),
    "QuantMatrix.from_dense": (
        "mo.QuantMatrix.from_dense(x, 'Q4_0', weights=bias4, bias=narrow[:, 0])",
        "x bias4 narrow",
    ),
    "QuantMatrix.from_encoded": (
        "mo.QuantMatrix.from_encoded(coded[0], 'Q4_K', layout='file', bias=bias4)(x)",
        "coded bias4",
    ),
    "QuantMatrix.__call__": ("matrix(x, out=y, accumulate=True)", "x y"),
    **{
        f"ExpertStack.gemv_{name}": (f"stack.gemv_{name}(x, ids, out=out256)", "x ids out256")
        for name in ("gate", "up", "gate_up_silu")
    },
    "ExpertStack.gemv_down": (
        "stack.gemv_down(hidden.reshape(T, 3, 256), ids, out=out256)",
        "hidden ids out256",
    ),
    **{
        f"ExpertStack.gemm_{name}": (f"stack.gemm_{name}(x, plan, out=wide)", "x wide")
        for name in ("gate", "up")
    },
    "ExpertStack.gemm_down": ("stack.gemm_down(hidden, plan, out=wide)", "hidden wide"),
    "MoeLayer.__init__": (
        "mo.MoeLayer(dense, by_token, token_experts=table)(narrow, logits, "
        "token_ids=ids[:, 0] % 50)",
        "table",
    ),
    "MoeLayer.__init__ with all parts": (
        "mo.MoeLayer(dense, norms, router, shared=shared, shared_gate=shared_gate, "
        "latent=(down_in, up_out), latent_norm=latent_norm, input_norm=input_norm, "
        "router_norm=router_norm)(narrow)",
        "router shared_gate down_in up_out latent_norm input_norm router_norm",
    ),
    "MoeLayer.from_store": (
        "mo.MoeLayer.from_store(own_store, 0, config=plain, router_weight=router, shared=shared, "
        "shared_gate=shared_gate)(narrow)",
        "router shared_gate",
    ),
    "MoeLayer.from_gguf": ("mo.MoeLayer.from_gguf(file, 0, experts=kept)", "kept"),
    "MoeLayer.from_safetensors": (
        "mo.MoeLayer.from_safetensors(folder, 0, experts=kept)",
        "kept",
    ),
    "MoeLayer.select_experts": ("layer.select_experts(order[:4])", "order"),
    "MoeLayer.permute_experts": ("layer.permute_experts(order)", "order"),
    "MoeLayer.__call__": (
        "by_given(narrow, logits, topk_ids=ids, out=y16)",
        "narrow logits ids y16",
    ),
    "MoeLayer.__call__ with a router's input": (
        "separate(narrow, router_input=router_rows)",
        "narrow router_rows",
    ),
    "MoeLayer.__call__ with a routing": ("layer(x, routing=routing)", "x"),
    "MoeLayer.route": ("layer.route(x, logits)", "x logits"),
    "MoeLayer.route with ids": ("by_given.route(narrow, logits, topk_ids=ids)", "narrow ids"),
    "MoeLayer.route with token ids": ("by_ids.route(narrow, logits, token_ids=tokens)", "tokens"),
    "MoeLayer.route with a router's input": (
        "separate.route(narrow, router_input=router_rows)",
        "narrow router_rows",
    ),
    "MoeLayer.expert_rows": ("layer.expert_rows(x, routing, out=yp)", "x yp"),
    "MoeLayer.finish": ("layer.finish(rows, routing, x, out=y)", "rows x y"),
    "MoeLayer.__call__ with logits": ("layer(x, logits, return_routing=True)", "x logits"),
    "MoeLayer.__call__ with token ids": (
        "by_ids(narrow, logits, token_ids=tokens)",
        "tokens",
    ),
    "ExpertPool.observe": ("pool.observe(ids)", "ids"),
    "ExpertPool.refresh_from_indices": ("pool.refresh_from_indices(ids)", "ids"),
    "ExpertPool.apply_target": ("pool.apply_target(ids[0, :1])", "ids"),
    "ExpertPool.stage": ("pool.stage(ids[0])", "ids"),
    "MoeExpertStore.from_arrays": (
        "mo.MoeExpertStore.from_arrays([(gate, up, down)])",
        "gate up down",
    ),
    "MoeExpertStore.prefetch": ("store.prefetch(0, ids)", "ids"),
    "MoeExpertStore.refresh_pools": ("store.refresh_pools([pool], [ids], 0)", "ids"),
    "Routing.__init__": ("layer(x, routing=mo.Routing(ids, weights))", "ids weights"),
    "BucketPlan.build": ("mo.BucketPlan.build(routing, 8)", ""),
    "BucketPlan.rebuild": ("plan.rebuild(routing)", ""),
}


STUB = ast.parse((Path(mo.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
# Objects that reuse() fills anew.
REUSED = {"routing", "plan"}


def words_of(node):
    return set(re.findall(r"\w+", ast.unparse(node)))


def types_that_change():
    """Routing, BucketPlan, and all names of the stub for arrays and for what contains them."""
    names, known = {"Routing", "BucketPlan", "Buffer", "_DLPack", "NDArray"}, 0
    while known != len(names):
        known = len(names)
        for node in STUB.body:
            if isinstance(node, ast.AnnAssign) and node.value and names & words_of(node.value):
                names.add(node.target.id)
            elif isinstance(node, ast.Assign) and names & words_of(node.value):
                names.add(node.targets[0].id)
    return names


def functions():
    """(class or "", name, positional parameters, parameters that another thread can change)."""
    types = types_that_change()
    scopes = [("", STUB.body)]
    scopes += [(node.name, node.body) for node in STUB.body if isinstance(node, ast.ClassDef)]
    for scope, body in scopes:
        for node in body if not scope.startswith("_") else []:
            if isinstance(node, ast.FunctionDef):
                by_place = [*node.args.posonlyargs, *node.args.args]
                annotated = [a for a in by_place + node.args.kwonlyargs if a.annotation]
                changing = {a.arg for a in annotated if types & words_of(a.annotation)}
                yield scope, node.name, [a.arg for a in by_place if a.arg != "self"], changing


def parameters_tried(scope, name, places):
    """The parameters of a function that an entry of CALLS gives something that changes."""
    # What is made of an array that changes, without a copy.
    parts = {
        node.targets[0].id: words_of(node.value)
        for node in ast.parse(PRELUDE).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        and isinstance(node.targets[0], ast.Name)
    }  # fmt: skip
    entry = f"{scope}.{name}" if scope else name
    for key, (code, arrays) in CALLS.items():
        if key.partition(" ")[0] != entry:
            continue
        changing = REUSED | set(arrays.split())
        changing |= {one for one, made_of in parts.items() if made_of & changing}
        for call in ast.walk(ast.parse(code)):
            if not isinstance(call, ast.Call):
                continue
            called = ast.unparse(call.func).rpartition(".")[2]
            wanted = {"__init__": called == scope, "__call__": not hasattr(mo, called)}
            if wanted.get(name, called == name):
                given = list(zip(places, call.args, strict=False))
                given += [(one.arg, one.value) for one in call.keywords]
                yield from (one for one, value in given if words_of(value) & changing)


def test_every_argument_that_is_an_array_is_changed():
    missing = {}
    for scope, name, places, changing in functions():
        left = changing - set(parameters_tried(scope, name, places))
        if left:
            missing[f"{scope}.{name}" if scope else name] = left
    assert not missing


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_change_during_a_call(name):
    code, arrays = CALLS[name]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PRELUDE
            + """
code, arrays = compile(sys.argv[1], "call", "eval"), [globals()[n] for n in sys.argv[2].split()]
eval(code)  # as it is meant
done = False
def overwrite(array):
    flat, random = array.reshape(-1).view(np.uint8), np.random.default_rng(0)
    kept, noise = flat.copy(), random.integers(0, 256, flat.size, np.uint8)
    while not done:
        flat[:] = noise
        flat[:] = kept
def reuse():
    # Other sizes in the same objects, as a caller that runs several threads may do.
    while not done:
        for other in small:
            mo.route(floats(other.num_tokens, 8), top_k=3, out=routing)
            plan.rebuild(other)
def call():
    while not done:
        try:
            eval(code)
        except (mo.Error, ValueError):
            pass
threads = [threading.Thread(target=overwrite, args=(a,)) for a in arrays]
threads += [threading.Thread(target=reuse), threading.Thread(target=call)]
for thread in threads:
    thread.start()
time.sleep(0.5)
done = True
for thread in threads:
    thread.join()
""",
            code,
            arrays,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr, done.stderr[-2000:]

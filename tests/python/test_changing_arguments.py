"""Arguments that another thread changes during a call: wrong numbers at most, never a crash.

The stub says which functions take arrays, routings or plans; each of those arguments is overwritten
with numbers that checks refuse while calls run, in a process of its own.
"""

import ast
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
spec = ("F32", "a", "b", "c")
y, yp = floats(T, 256), floats(T * 3, 256)
def builder():
    return _core.StackBuilder(1, 32, 32, gate=None, up=spec, down=spec)
part, part_bias = floats(32, 32), floats(32)
factors, bias4, low, high = floats(8), floats(256), floats(8, 2, 16), floats(8, 16, 2)
one = mo.ExpertStack.from_dense_stacks(floats(1, 8, 8), floats(1, 8, 8), floats(1, 8, 8))
"""

# What to call, the arrays that change, and what other objects do meanwhile.
CALLS = {
    "asarray": ("mo.asarray(x, copy=True)", "x"),
    "route": ("mo.route(logits, given, topk_ids=ids, out=routing)", "logits ids"),
    "align_block_size": ("mo.align_block_size(routing, 8, 16)", ""),
    "pick_block_size": ("mo.pick_block_size(plan)", ""),
    "gather_rows": ("mo.gather_rows(x, plan, out=yp)", "x yp"),
    "silu_mul": ("mo.silu_mul(x, out=floats(T, 128))", "x"),
    "combine": ("mo.combine(rows, plan, routing, out=y)", "rows y"),
    "weighted_sum": ("mo.weighted_sum(pairs, routing, out=y)", "pairs y"),
    "moe_forward": ("mo.moe_forward(x, None, stack, routing=routing, out=y)", "x y"),
    "moe_forward_bucketed": ("mo.moe_forward_bucketed(x, logits, stack, top_k=3)", "x logits"),
    "moe_forward_cpu": ("mo.moe_forward_cpu(x[:40], small[2], stack)", "x"),
    "quantize": ("mo.testing.quantize(x, 'Q4_K')", "x"),
    "dequantize": ("mo.testing.dequantize(coded, 'Q4_K', (8, 256, 256))", "coded"),
    "MarlinLinear.__call__": ("linear(packed, out=floats(T, 64))", "packed"),
    "MarlinExpertStack.from_gptq": (
        "mo.MarlinExpertStack.from_gptq(qweight, scales, qzeros, g_idx, group_size=128)",
        "qweight scales qzeros g_idx",
    ),
    "MarlinExpertStack.gemm_phase_batched": (
        "marlin.gemm_phase_batched(packed, [(0, 0, 0, 300), (1, 300, 300, 300)])",
        "packed",
    ),
    "MarlinExpertStack.gemm_phase_vllm": (
        "marlin.gemm_phase_vllm(packed, mo.align_block_size(mo.Routing(ids, weights), 2, 16), 3)",
        "packed",
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
        "mo.ExpertStack.from_dense_stacks(gate, up, down)",
        "gate up down",
    ),
    "ExpertStack.from_encoded": (
        "mo.moe_forward(x, None, mo.ExpertStack.from_encoded(role, role, role, layout='file'), "
        "routing=routing)",
        "coded",
    ),
    "ExpertStack.from_encoded with biases": (
        "mo.ExpertStack.from_encoded(role, role, role, biases={'up': floats(8, 256)}, "
        "scales={'down': factors})",
        "factors",
    ),
    "ExpertStack.select": ("dense.select(ids[:, 0])", "ids"),
    "ExpertStack.with_expert": (
        "stack.with_expert(3, gate=x[:256], up=(coded[2], 'Q4_K'), biases={'down': bias4})",
        "x coded bias4",
    ),
    "ExpertStack.with_deltas": (
        "mo.moe_forward(narrow, None, dense.with_deltas({'up': (low, high, 2)}), routing=routing)",
        "low high",
    ),
    "SharedExperts.__init__": ("mo.SharedExperts(one, factors)", "factors"),
    **{
        f"ExpertStack.gemv_{name}": (f"stack.gemv_{name}(x, ids)", "x ids")
        for name in ("gate", "up", "gate_up_silu")
    },
    "ExpertStack.gemv_down": ("stack.gemv_down(hidden.reshape(T, 3, 256), ids)", "hidden ids"),
    **{f"ExpertStack.gemm_{name}": (f"stack.gemm_{name}(x, plan)", "x") for name in ("gate", "up")},
    "ExpertStack.gemm_down": ("stack.gemm_down(hidden, plan)", "hidden"),
    "MoeLayer.__init__": (
        "mo.MoeLayer(dense, by_token, token_experts=table)(narrow, logits, "
        "token_ids=ids[:, 0] % 50)",
        "table",
    ),
    "MoeLayer.from_store": (
        "mo.MoeLayer.from_store(store, 0, config=layer.config, router_weight=floats(8, 256))",
        "",
    ),
    "MoeLayer.__call__": ("by_given(narrow, logits, topk_ids=ids)", "narrow logits ids"),
    "MoeLayer.__call__ with a routing": ("layer(x, routing=routing)", "x"),
    "MoeLayer.__call__ with logits": ("layer(x, logits, return_routing=True)", "x logits"),
    "MoeLayer.__call__ with token ids": (
        "by_ids(narrow, logits, token_ids=tokens)",
        "tokens",
    ),
    "ExpertPool.observe": ("pool.observe(ids)", "ids"),
    "ExpertPool.refresh_from_indices": ("pool.refresh_from_indices(ids)", "ids"),
    "ExpertPool.apply_target": ("pool.apply_target(ids[0, :1])", "ids"),
    "ExpertPool.stage": ("pool.stage(ids[0])", "ids"),
    "MoeExpertStore.from_arrays": ("mo.MoeExpertStore.from_arrays([(gate, up, down)])", "gate up"),
    "MoeExpertStore.refresh_pools": ("store.refresh_pools([pool], [ids], 0)", "ids"),
    "Routing.__init__": ("layer(x, routing=mo.Routing(ids, weights))", "ids weights"),
    "BucketPlan.build": ("mo.BucketPlan.build(routing, 8)", ""),
    "BucketPlan.rebuild": ("plan.rebuild(routing)", ""),
}


def functions_with_arrays():
    stub = ast.parse((Path(mo.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
    scopes = [("", stub.body)]
    scopes += [(f"{n.name}.", n.body) for n in stub.body if isinstance(n, ast.ClassDef)]
    for scope, body in scopes:
        for node in body if not scope.startswith("_") else []:
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            annotations = " ".join(ast.unparse(a.annotation) for a in arguments if a.annotation)
            if any(word in annotations for word in ("Array", "Routing", "BucketPlan")):
                yield scope + node.name


def test_every_function_that_takes_arrays_is_tried():
    assert set(functions_with_arrays()) <= {name.partition(" ")[0] for name in CALLS}


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

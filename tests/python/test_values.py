"""Values are values: a class pickles, copies, compares, hashes and becomes JSON, or refuses.

The classes are those that the module has; a new one fails here until it is in one of the two lists.
"""

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from files import write_checkpoint, write_small
from values import expert_weights, normal

import moesaic as mo
from moesaic import _core
from moesaic.simulate import Trace

BASE = mo.Tuning.__mro__[1]
CLASSES = {n for n, c in vars(_core).items() if isinstance(c, type) and issubclass(c, BASE)}
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

ROUTING = mo.Routing(
    np.array([[0, 2], [1, -1], [2, 0]]), np.array([[0.1, 0.9], [1.7, 0], [1, 3]], np.float32)
)


def pool_that_ran(coactivation=True):
    pool = mo.ExpertPool(4, 2, coactivation=coactivation)
    for step in ([0, 2], [1, 2], [2, 3]):
        pool.stage(np.array([step], np.int32))
        pool.refresh_from_indices(np.array(step, np.int32))
    return pool


@pytest.fixture(scope="module")
def run_layer(small):
    """A layer of the small file, what its load reported, and the profile of a call."""
    steps = []
    loaded = mo.MoeLayer.from_gguf(small.path, 0, progress=lambda p: steps.append(p))
    with mo.profile() as profile:
        loaded(normal(3, small.hidden))
    return loaded, steps, profile


#: An object or several of each value class, of a layer that ran.
VALUES = {
    "Activation": lambda _: [mo.Activation(), mo.Activation("situ", beta=0.1, linear_beta=3)],
    "RouterConfig": lambda _: [
        mo.RouterConfig(4, 2),
        mo.RouterConfig(2, 1, score="sigmoid", scale=1.702, selection_bias=[0.1, -3e-8]),
    ],
    "MoeConfig": lambda run: [
        run[0].config,
        mo.MoeConfig(8, 4, 2, 1, activation=mo.Activation("swiglu_oai"), norm_eps=3e-7),
    ],
    "Tuning": lambda _: [mo.Tuning(), mo.Tuning(block_size=32, threads=2, strict=True)],
    "ConfigEntry": lambda _: mo.show_config()[:2],
    "Routing": lambda _: [
        ROUTING,
        mo.Routing(np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32)),
    ],
    "BucketPlan": lambda _: [mo.BucketPlan.build(ROUTING, 4)],
    "AlignedRouting": lambda _: [
        mo.align_block_size(ROUTING, 4, 8, space) for space in ("token_pairs", "packed_rows")
    ],
    "RefreshPolicy": lambda _: [
        mo.RefreshPolicy.every_forward(),
        mo.RefreshPolicy.every_decode_steps(4),
        mo.RefreshPolicy.every_steps(2),
        mo.RefreshPolicy.manual(),
    ],
    "RefreshResult": lambda _: [pool_that_ran().refresh_from_indices([0, 1])],
    "PoolStats": lambda _: [pool_that_ran().stats],
    "ExpertUsage": lambda _: [pool_that_ran().usage, pool_that_ran(False).usage],
    "Progress": lambda run: run[1][:2],
    "RoleReport": lambda run: run[0].report.roles,
    "LoadReport": lambda run: [run[0].report],
    "ZoneTotal": lambda run: list(run[2].zones.values()),
    "BackendInfo": lambda _: mo.backends(),
    "KernelInfo": lambda _: mo.backends()[0].kernels[:3],
}
CHANGE = {"Routing", "BucketPlan"}
MADE_OF_DICTS = {
    "Activation", "RouterConfig", "MoeConfig", "Tuning", "Routing", "RefreshPolicy",
}  # fmt: skip
#: Those that pickle when they came from files.
FROM_FILES = {"GgufFile", "MoeLayer", "ExpertStack", "MoeExpertStore", "QuantMatrix"}
REFUSED = {
    "Array", "ExpertPool", "ExpertRole", "GgufMetadata", "GgufTensor", "GgufTensors",
    "LayerMoeWeights", "MarlinExpertStack", "MarlinLinear", "MarlinStackBuilder",
    "Profile", "SharedExperts", "StackBuilder", "Workspace", "_DeviceMemory",
}  # fmt: skip


def test_every_class_is_in_one_list():
    lists = [set(VALUES), FROM_FILES, REFUSED]
    assert sorted(n for names in lists for n in names) == sorted(CLASSES)


@pytest.fixture(params=sorted(VALUES))
def values(request, run_layer):
    made = VALUES[request.param](run_layer)
    assert made and all(type(one).__name__ == request.param for one in made)
    return made


def fields_of(value):
    """What the properties give, in a form that compares."""
    names = [n for n, m in vars(type(value)).items() if isinstance(m, property)]
    return {n: np.asarray(x).tolist() for n in names if (x := getattr(value, n)) is not None}


def test_pickle_and_copy_give_the_same(values):
    for one in values:
        made = [pickle.loads(pickle.dumps(one, protocol)) for protocol in PROTOCOLS]
        for other in [*made, copy.copy(one), copy.deepcopy(one), copy.deepcopy([one])[0]]:
            assert type(other) is type(one) and other == one
            assert repr(other) == repr(one) and str(other) == str(one)
            assert fields_of(other) == fields_of(one)


def test_equality_and_hash(values):
    name = type(values[0]).__name__
    for i, one in enumerate(values):
        assert one == one and one != 1 and one != None and one != name  # noqa: E711
        for other in values[i + 1 :]:
            assert (one == other) == (one.to_dict() == other.to_dict())
        if name in CHANGE:
            with pytest.raises(TypeError, match="unhashable"):
                hash(one)
        else:
            assert hash(one) == hash(pickle.loads(pickle.dumps(one)))
            assert {one: 1}[copy.copy(one)] == 1


def test_json(values):
    name = type(values[0]).__name__
    for one in values:
        fields = json.loads(json.dumps(one.to_dict()))
        assert fields == one.to_dict()
        if name in MADE_OF_DICTS:
            assert type(one).from_dict(fields) == one
            with pytest.raises(TypeError, match=r"nearest: "):
                type(one).from_dict({**fields, "no_such": 1})
        else:
            assert not hasattr(one, "from_dict")


def test_notebooks_get_a_table(values):
    for one in values:
        html = one._repr_html_()
        assert html.count("<table>") == html.count("</table>") >= 1
        assert all(f">{field}<" in html or f".{field}<" in html for field in one.to_dict())


def test_values_do_not_depend_on_their_order_in_a_pickle(run_layer):
    everything = [one for make in VALUES.values() for one in make(run_layer)]
    again = pickle.loads(pickle.dumps(everything))
    assert all(a == b for a, b in zip(everything, again, strict=True))
    immutable = [one for one in everything if type(one).__name__ not in CHANGE]
    assert len({*immutable, *pickle.loads(pickle.dumps(immutable))}) == len(set(immutable))


def test_values_of_python():
    profile = mo.ExpertProfile.from_counts([[1, 2, 0], [0, 5, 7]])
    trace = Trace(np.array([[[[0, 1]]], [[[2, -1]]]], np.int32), 3)
    for one in (profile, trace, mo.show_config(), mo.MoeExecMode.Reuse, mo.architecture_table()):
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert other == one and type(other) is type(one)
    for one in (profile, trace):
        assert hash(one) == hash(copy.deepcopy(one))
    assert profile != mo.ExpertProfile.from_counts([[1, 2, 0], [0, 5, 8]]) and profile != 1
    assert trace != Trace(trace.ids, 4) and trace != 1


def test_tables_of_python_show_in_notebooks(run_layer):
    loaded, _, profile = run_layer
    counts = mo.ExpertProfile.from_counts([[1, 2], [3, 4]])
    for one, cell in [
        (mo.show_config(), "MOESAIC_THREADS"),
        (mo.explain(loaded), "bucketed"),
        (mo.architecture_table(), "qwen3moe"),
        (profile, "gate_up"),
        (counts, "effective experts"),
    ]:
        assert f">{cell}<" in one._repr_html_()
    lines = str(mo.architecture_table()).splitlines()
    assert len(lines) == 2 + len(mo.architecture_table())  # names, and what underlines them
    assert all(len(line) <= len(lines[1]) for line in lines)
    escaped = mo.Facts({"<b>": "a & b"})._repr_html_()
    assert "&lt;b&gt;" in escaped and "a &amp; b" in escaped


@pytest.mark.parametrize("value", [1.702, 0.1, 1e-6, 7.0, 3.4e38, 1e-45, 1 / 3])
def test_floats_are_as_written(value):
    shown = mo.Activation(alpha=value).alpha
    assert np.float32(shown) == np.float32(value)
    assert len(repr(shown)) <= len(repr(float(np.float32(value))))
    assert str(np.float32(value)) == str(np.float32(shown))
    if float(str(np.float32(value))) == value:
        assert shown == value and f"alpha={value!r}" in repr(mo.Activation(alpha=value))


def test_random_floats_come_back_bit_by_bit():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20000, np.uint32)
    floats = bits.view(np.float32)
    floats = floats[np.isfinite(floats)]
    router = mo.RouterConfig(len(floats), 1, router_bias=floats.tolist())
    back = np.array(json.loads(json.dumps(router.to_dict()))["router_bias"], np.float32)
    np.testing.assert_array_equal(back.view(np.uint32), floats.view(np.uint32))


def test_replace_checks_as_the_constructor():
    config = mo.MoeConfig(8, 4, 6, 2)
    with pytest.raises(mo.ConfigError, match=r"router\.num_experts .*expected 7.* got 6"):
        config.replace(num_experts=7)
    with pytest.raises(mo.ConfigError, match=r"router\.top_k"):
        config.replace(top_k=3)
    with pytest.raises(mo.ConfigError, match=r"router\.num_experts"):
        mo.MoeConfig(8, 4, 6, 2, router=mo.RouterConfig(5, 2))
    larger = config.replace(num_experts=7, router=config.router.replace(num_experts=7))
    assert larger.num_experts == larger.router.num_experts == 7
    identity = mo.RouterConfig(8, 2, identity_experts=2)
    assert config.replace(router=identity).router == identity


@pytest.mark.parametrize(
    ("value", "wrong", "nearest"),
    [
        (mo.Activation(), "limt", "limit"),
        (mo.RouterConfig(4, 2), "num_expert", "num_experts"),
        (mo.MoeConfig(8, 4, 6, 2), "hidden", "hidden_size"),
        (mo.Tuning(), "blocksize", "block_size"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else v,
)
def test_unknown_fields_give_the_nearest(value, wrong, nearest):
    for attempt in (value.replace, lambda **f: type(value).from_dict({**value.to_dict(), **f})):
        with pytest.raises(mo.Error, match=rf"nearest: {nearest}\b"):
            attempt(**{wrong: 1})


def test_fields_of_a_pickle_are_checked():
    """A pickle that was tampered with gives an error, or an object that is whole."""
    for one in (mo.BucketPlan.build(ROUTING, 4), mo.align_block_size(ROUTING, 4, 8)):
        fields = {n: getattr(one, n) for n in one.to_dict()}
        for name, bad in [
            ("num_experts", 1), ("row_pair", np.array([9, 9, 9, 9, 9])), ("top_k", -2),
            ("sorted_ids", np.array([99, -3])), ("expert_offsets", np.array([0, 9, 9])),
            ("block_size", 0), ("block_experts", np.array([], np.int32)), ("num_pairs", "x"),
        ]:  # fmt: skip
            if name in fields:
                with pytest.raises((ValueError, TypeError, IndexError)):
                    type(one)._from_fields({**fields, name: bad})
    usage = pool_that_ran().usage
    fields = {n: getattr(usage, n) for n in usage.to_dict()}
    for name, bad in [("history", np.zeros((2, 3), np.int64)), ("interval", 0), ("counts", [])]:
        with pytest.raises(ValueError, match="ExpertUsage"):
            type(usage)._from_fields({**fields, name: bad})
    for kind in (mo.BucketPlan, mo.AlignedRouting, mo.ExpertUsage, mo.Routing):
        with pytest.raises(mo.ConfigError, match=rf"{kind.__name__}\b.*got none"):
            kind._from_fields({})


# --- what came from files ---------------------------------------------------------------------


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_and_its_layers_open_again(small, protocol):
    file = mo.GgufFile(small.path)
    layer = mo.MoeLayer.from_gguf(file, 1, top_k=2, precision="exact")
    in_place = mo.ExpertStack.load_from_gguf(file, 0, layout="file")
    decoded = mo.ExpertStack.load_from_gguf(small.path, 0, "f16")
    matrix = mo.QuantMatrix.from_gguf(file, "blk.1.ffn_gate_inp.weight", "f16", layout="file")
    everything = [file, layer, layer.stack, in_place, decoded, matrix]
    others = pickle.loads(pickle.dumps(everything, protocol))
    assert others[0].path == str(small.path) and others[0].moe_layers == file.moe_layers
    assert others[1].config == layer.config and others[1].precision == "exact"
    x = normal(5, small.hidden)
    same(others[1](x), layer(x))
    assert others[5].quant == "F16" and others[5].layout == matrix.layout
    same(others[5](x), matrix(x))
    for one, other in zip(everything[2:5], others[2:5], strict=True):
        assert other.quants == one.quants
        assert [r.decision for r in other.report.roles] == [r.decision for r in one.report.roles]
        same(other.dequantize("down", 3), one.dequantize("down", 3))


def test_a_pickle_opens_a_file_once(small):
    file = mo.GgufFile(small.path)
    stacks = [mo.ExpertStack.load_from_gguf(file, i, layout="file") for i in (0, 1)]
    opened, *others = pickle.loads(pickle.dumps([file, *stacks]))
    with pytest.raises(mo.DeviceError, match="no holders"):
        opened.close()  # by the stacks, which are of this very file
    del others[:]
    opened.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_store_opens_again_with_its_options(own, protocol):
    limit = 4 << 20
    stores = [
        mo.MoeExpertStore.from_gguf(own.path),
        mo.MoeExpertStore.from_gguf(own.path, memory_limit=limit, staging=3, read_ahead=0),
    ]
    x = normal(3, own.hidden)
    want = mo.MoeLayer.from_gguf(own.path, 1)(x)
    for store in stores:
        pool = mo.ExpertPool(own.num_experts, 3)
        same(mo.MoeLayer.from_store(store, 1, pool, on_miss="stage")(x), want)
    text = pickle.dumps(stores, protocol)
    for store, other in zip(stores, pickle.loads(text), strict=True):
        assert other is not store and other.num_layers == 2
        assert other.memory()["limit"] == store.memory()["limit"]
        assert other.io_stats()["reads"] == 0  # what was read stays with the first
        pool = mo.ExpertPool(own.num_experts, 3)
        same(mo.MoeLayer.from_store(other, 1, pool, on_miss="stage")(x), want)
    assert other.memory()["staging"] == store.memory()["staging"]
    touch(own.path)
    with pytest.raises(mo.FormatError, match="times of change"):
        pickle.loads(text)


def test_stores_are_not_copied_nor_pickled_without_a_file(small):
    matrices = tuple(normal(4, *shape) for shape in ((32, 16), (32, 16), (16, 32)))
    arrays = mo.MoeExpertStore.from_arrays([matrices])
    with pytest.raises(mo.DTypeError, match=r"MoeExpertStore: expected one read from files"):
        pickle.dumps(arrays)
    for store in (arrays, mo.MoeExpertStore.from_gguf(small.path)):
        for attempt in (copy.copy, copy.deepcopy):
            with pytest.raises(mo.DTypeError, match="from_gguf opens another one"):
                attempt(store)


def test_copies_of_layers_share_their_weights(small, layer, stack):
    x = normal(2, small.hidden)
    want = layer(x)
    for one in (copy.copy(layer), copy.deepcopy(layer), copy.deepcopy({"a": [layer]})["a"][0]):
        assert one is not layer and one.stack is layer.stack
        same(one(x), want)
        one.close()
    same(layer(x), want)
    assert copy.copy(stack) is stack and copy.deepcopy([stack])[0] is stack
    # No file is needed for that.
    made = mo.MoeLayer(stack, mo.MoeConfig(24, 40, 5, 2))
    assert copy.deepcopy(made).config == made.config


@pytest.fixture
def own(tmp_path):
    """A file that a test may change."""
    return write_small(tmp_path / "own.gguf", layers=2)


def touch(path):
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1000))


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0" * 64)


def another(path):
    time = path.stat().st_mtime_ns
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up_exps", b"blk.7.ffn_up_exps"))
    os.utime(path, ns=(time, time))


@pytest.mark.parametrize(
    ("change", "said"),
    [(touch, "times of change"), (grow, "bytes"), (another, "tensor table")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_changed_file_is_refused(own, change, said):
    with mo.GgufFile(own.path) as file:
        texts = [pickle.dumps(one) for one in (file, mo.MoeLayer.from_gguf(file, 0))]
    for text in texts:
        pickle.loads(text)
    if os.name == "nt":
        pytest.skip("an open file cannot be changed there")
    change(own.path)
    for text in texts:
        with pytest.raises(mo.FormatError, match=rf"own.gguf: expected the file .* {said}"):
            pickle.loads(text)
    own.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"own.gguf"):
        pickle.loads(texts[0])


def test_the_path_does_not_depend_on_the_folder(own, monkeypatch, tmp_path):
    monkeypatch.chdir(own.path.parent)
    text = pickle.dumps(mo.MoeLayer.from_gguf("own.gguf", 1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(text).config.layer == 1


def test_closed_ones_are_refused(small):
    file = mo.GgufFile(small.path)
    layer = mo.MoeLayer.from_gguf(file, 0)
    layer.close()
    file.close()
    for one in (layer, file):
        with pytest.raises(mo.DeviceError, match="closed"):
            pickle.dumps(one)


def test_what_is_made_of_arrays_is_refused_with_a_hint(stack, small):
    store = mo.MoeExpertStore.from_gguf(small.path)
    for one in (
        stack,
        mo.MoeLayer(stack, mo.MoeConfig(24, 40, 5, 2)),
        mo.MoeLayer.from_store(store, 0),
        store.layers[0].stack,
    ):
        for protocol in PROTOCOLS:
            with pytest.raises(mo.DTypeError, match=r"made of arrays or parts .*save it"):
                pickle.dumps(one, protocol)


def test_checkpoints(tmp_path):
    gate, up, down = expert_weights(4, 32, 64)
    tensors = {"model.layers.0.mlp.gate.weight": normal(4, 32, seed=3)}
    for e in range(4):
        for name, role in (("gate", gate), ("up", up), ("down", down)):
            tensors[f"model.layers.0.mlp.experts.{e}.{name}_proj.weight"] = role[e]
    config = {
        "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 64,
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "num_hidden_layers": 1, "hidden_act": "silu",
    }  # fmt: skip
    folder = write_checkpoint(tmp_path, tensors, config)
    layer = mo.MoeLayer.from_safetensors(folder, 0, top_k=1)
    alone = mo.ExpertStack.load_from_safetensors(folder, 0, "f32")
    text = pickle.dumps([layer, layer.stack, alone])
    x = normal(3, 32)
    one, two, three = pickle.loads(text)
    same(one(x), layer(x))
    assert one.config == layer.config and three.quants == alone.quants
    same(two.dequantize("up", 1), layer.stack.dequantize("up", 1))
    touch(folder / "model.safetensors")
    with pytest.raises(mo.FormatError, match=r"model\.safetensors: .* time of change"):
        pickle.loads(text)
    write_checkpoint(tmp_path, tensors, {**config, "norm_topk_prob": False})
    with pytest.raises(mo.FormatError, match=r"time of change|tensor table"):
        pickle.loads(text)


# --- other processes --------------------------------------------------------------------------


def run_one(layer, x):
    return layer(x)


def results(context, layer, x):
    with context.Pool(2) as pool:
        return pool.starmap(run_one, [(layer, x), (layer, x[:1])])


METHODS = [m for m in multiprocessing.get_all_start_methods() if m != "forkserver"]

SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import numpy as np
import moesaic as mo
from test_values import results, run_one, same
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    layer = mo.MoeLayer.from_gguf(sys.argv[2], 0)
    x = np.ones((3, layer.config.hidden_size), np.float32)
    whole, first = results(context, layer, x)
    same(whole, layer(x))
    same(first, layer(x[:1]))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        same(pool.submit(run_one, layer, x).result(), layer(x))
    print("same")
"""


@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing(method, small, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), method, str(small.path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr[-2000:]


def test_cloudpickle(layer, small):
    cloudpickle = pytest.importorskip("cloudpickle")  # what dask, ray and joblib send
    x = normal(2, small.hidden)
    call = cloudpickle.loads(cloudpickle.dumps(lambda: layer(x)))
    same(call(), layer(x))
    assert cloudpickle.loads(cloudpickle.dumps(layer.config)) == layer.config

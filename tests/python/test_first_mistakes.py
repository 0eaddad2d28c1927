"""What is easily got wrong at first: one line each, with the parameter and what was meant."""

import inspect
import pickle
import pydoc

import numpy as np
import pytest

import moesaic as mo
from moesaic import _core

T, K = 3, 2


class Ready:
    """A small layer and its parts, by the names that the mistakes use."""

    def __init__(self, folder):
        self.np, self.mo, self.folder = np, mo, str(folder)
        self.path = str(folder / "model.gguf")
        mo.testing.write_moe_gguf(self.path)
        self.file = mo.GgufFile(self.path)
        self.layer = mo.MoeLayer.from_gguf(self.file, 0)
        self.stack, self.config = self.layer.stack, self.layer.config
        self.x = np.ones((T, self.config.hidden_size), np.float32)
        self.logits = np.zeros((T, self.config.num_experts), np.float32)
        self.routing = mo.route(self.logits, top_k=K)
        self.plan = mo.BucketPlan.build(self.routing, self.config.num_experts)
        self.f8, self.f4 = self.x.astype("f8"), np.ones((2, 8, 4), np.float32)
        self.closed = mo.MoeLayer.from_gguf(self.file, 0)
        self.closed.close()
        mo.testing.write_moe_gguf(folder / "wide.gguf", hidden=512)
        self.other = mo.MoeLayer.from_gguf(folder / "wide.gguf", 0).stack
        self.closed_file = mo.GgufFile(self.path)
        self.closed_file.close()


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    return Ready(tmp_path_factory.mktemp("mistakes"))


A, C, D, S = mo.ArgumentError, mo.ConfigError, mo.DTypeError, mo.ShapeError

# What one writes, the class that it raises, and words of the message.
MISTAKES = [
    # calls of a layer
    ("layer()", A, "MoeLayer: x: nothing MoeLayer(x, ...)"),
    ("layer(f8)", D, "x: f32, f16 or bf16 f64 it.astype('float32')"),
    ("layer(x.tolist())", D, "x: array list numpy.asarray(it, 'float32')"),
    ("layer(x.astype('i4'))", D, "x: i32 float32"),
    ("layer(x.T)", S, "x.shape [T, 256] transposed"),
    ("layer(x[0])", S, "x.shape [T, 256] x[None]"),
    ("layer(x[:, :7])", S, "x.shape [T, 256] f32[3, 7]"),
    ("layer(np.ones((2, 3, 7), np.float32))", S, "x.shape 256 f32[2, 3, 7]"),
    ("layer(x, routing)", D, "router_logits Routing routing=..."),
    ("layer(routing)", D, "x: Routing"),
    ("layer(x, logits, routing)", A, "at most 2 by position 3 routing=..."),
    ("layer(x, rooting=routing)", A, "rooting: unknown nearest: routing"),
    ("layer(x, return_router=True)", A, "return_router: unknown nearest: return_routing"),
    ("layer(x.astype('>f4'))", D, "x: numpy >f4 byte order astype('float32')"),
    ("layer(x, Routing=routing)", A, "Routing: unknown nearest: routing"),
    ("layer(x, top_k=2)", A, "top_k: unknown config.replace(top_k=...)"),
    ("layer(x, routing=logits)", A, "routing: a Routing or None ndarray float32 [3, 8] route("),
    ("layer(x, routing=(logits, logits))", A, "routing: tuple Routing(ids, weights)"),
    ("layer(x, workspace=100)", A, "workspace: a Workspace or None int 100 Workspace(nbytes)"),
    ("layer(x, workspace=mo.Workspace)", A, "workspace: the class Workspace"),
    ("layer(x, precision='Exact')", C, "precision: auto | exact | fast 'Exact' nearest: exact"),
    ("layer(x, precision=1)", A, "precision: a str or None int 1"),
    ("layer(x, accumulate='yes')", A, "accumulate: True or False str 'yes'"),
    ("layer(x, out='y')", D, "out: array str"),
    ("layer(x, out=f8)", D, "out: f32 f64"),
    ("layer(x, x=x)", A, "x: one value by name"),
    ("mo.merged_resident_mask([mo.ExpertPool(8, 4), 3])", A, "list of ExpertPool, int"),
    ("layer(x, token_ids=[1, 2, 3])", D, "token_ids: list numpy.asarray(it, 'int32')"),
    ("closed(x)", mo.DeviceError, "open closed"),
    # opening
    ("mo.MoeLayer.from_gguf(path)", A, "MoeLayer.from_gguf: layer: an int nothing"),
    ("mo.MoeLayer.from_gguf(layer=0)", A, "MoeLayer.from_gguf: file: nothing"),
    ("mo.MoeLayer.from_gguf(path, '0')", A, "layer: an int str '0' int(...)"),
    ("mo.MoeLayer.from_gguf(path, 0.0)", A, "layer: an int float 0.0 int(...)"),
    ("mo.MoeLayer.from_gguf(path, 99)", S, "MoeConfig.from_gguf: block 99"),
    ("mo.MoeLayer.from_gguf(path, 10**30)", A, "layer: a smaller int more than 64 bits"),
    ("mo.MoeLayer.from_gguf(path, 0, 'cpu')", A, "at most 2 by position 3 device=..."),
    ("mo.MoeLayer.from_gguf(path, 0, layouts='file')", A, "layouts: unknown nearest: layout"),
    ("mo.MoeLayer.from_gguf(path, 0, layout='File')", C, "layout: 'File' nearest: file"),
    ("mo.MoeLayer.from_gguf(path, 0, device='gpu')", C, "device: cpu cuda gpu"),
    ("mo.MoeLayer.from_gguf(path, 0, top_k=-1)", C, "top_k: 1 to 8 -1"),
    ("mo.MoeLayer.from_gguf(None, 0)", D, "file: GgufFile path NoneType"),
    ("mo.MoeLayer.from_gguf(closed_file, 0)", mo.DeviceError, "MoeLayer.from_gguf: open closed"),
    ("mo.MoeLayer.from_gguf(path, 0, device='CPU')", C, "MoeLayer.from_gguf: device: cpu CPU"),
    ("mo.MoeLayer.from_safetensors(path, 0)", mo.UnsupportedError, "MoeLayer.from_gguf opens it"),
    ("mo.MoeLayer.from_safetensors(folder, 0)", mo.UnsupportedError, "MoeLayer.from_gguf opens it"),
    ("mo.MoeLayer(path)", A, "config: a MoeConfig nothing MoeLayer(stack, config, ...)"),
    ("mo.MoeLayer(layer, config)", A, "stack: an ExpertStack MoeLayer layer.stack is one"),
    ("mo.MoeLayer(config, stack)", A, "stack and config are swapped"),
    ("mo.GgufFile()", A, "GgufFile: path: a path nothing"),
    ("mo.GgufFile(3)", A, "GgufFile: path: a path int 3"),
    ("mo.GgufFile(path, nmap=False)", A, "nmap: unknown nearest: mmap"),
    ("mo.GgufFile(path, False)", A, "at most 1 by position 2 mmap=..."),
    ("mo.ExpertStack(stack)", A, "ExpertStack: from_dense_stacks load_from_gguf"),
    ("mo.ExpertStack.load_from_gguf(path, 0, 'float16')", C, "dequantize: nearest: f16"),
    ("mo.ExpertStack.from_dense_stacks(f4, f4, f4)", S, "down: [2, 4, 8] transposed"),
    (
        "mo.ExpertStack.from_dense_stacks(f4, f4, f4.astype('f8'))",
        D,
        "down: f64 .astype('float32')",
    ),
    # editing
    ("layer.select_experts([0, 99])", S, "MoeLayer.select_experts: ids[1]: 0 to 7 99"),
    ("layer.select_experts(np.arange(8) < 4)", D, "ids: bool numpy.flatnonzero(mask)"),
    ("layer.select_experts([0])", C, "MoeLayer.select_experts: at least 2 1"),
    ("stack.select([-1])", S, "ExpertStack.select: ids[0]: 0 to 7 -1"),
    ("layer.replace(stack=stack.select([0, 1]))", S, "MoeLayer.replace: stack: select_experts"),
    ("stack.with_expert(99)", S, "ExpertStack.with_expert: expert: 0 to 7 99"),
    ("stack.with_expert(0, down=f8)", S, "down: [256, 256] f64[3, 256]"),
    ("layer.replace(router_weight=np.ones((8, 256)))", D, "router_weight: f64 .astype('float32')"),
    ("stack.with_deltas({'up': (logits, logits)})", S, "deltas['up']: A of [E, r, 256]"),
    ("mo.ExpertStack.concat([stack, other])", S, "ExpertStack.concat: H 256 H 512"),
    ("mo.quantize(logits, 'Q4_K')", S, "quantize: cols of Q4_K: multiple of 256 8"),
    # loose parts
    ("mo.moe_forward(x, logits)", A, "moe_forward: stack: nothing moe_forward(x, logits, stack"),
    ("mo.moe_forward(x, logits, stack)", C, "moe_forward: top_k"),
    ("mo.moe_forward(x, routing, stack)", D, "logits: a Routing routing=..."),
    ("mo.moe_forward(x, logits, stack, 2)", A, "at most 3 by position 4 top_k=..."),
    ("mo.moe_forward(x, logits, stack, topk=2)", A, "topk: unknown nearest: top_k"),
    ("mo.moe_forward(x, logits, stack, k=2)", A, "k: unknown"),
    ("mo.moe_forward(x, logits, stack, top_k='2')", A, "top_k: an int or None str '2'"),
    ("mo.moe_forward(x, logits, path, top_k=2)", D, "stack: ExpertStack or MoeLayer str"),
    ("mo.moe_forward(x, logits, stack, router={'top_k': 2})", A, "router: RouterConfig dict **it"),
    ("mo.moe_forward(x, logits, stack, router=2)", A, "router: RouterConfig int 2 top_k=..."),
    ("mo.moe_forward(x, logits, stack, top_k=2, activation='SwiGLU')", C, "nearest: swiglu"),
    ("mo.moe_forward_cpu(x, logits, stack)", A, "routing: a Routing ndarray route("),
    ("mo.moe_forward_bucketed(x, logits, stack, top_k=2, gem='x')", A, "gem: nearest: gemm"),
    ("mo.route(logits)", C, "route: top_k"),
    ("mo.route(logits, 2)", A, "route: router: RouterConfig or None int 2 top_k=..."),
    ("mo.route(logits, top_k=2.0)", A, "top_k: float 2.0 int(...)"),
    ("mo.route(routing, top_k=2)", D, "logits: Routing"),
    ("mo.route(logits.astype('f8'), top_k=2)", D, "logits: f64 it.astype('float32')"),
    ("mo.route(logits[0], top_k=2)", S, "logits: [T, E] f32[8]"),
    ("mo.Routing(routing.topk_ids)", A, "Routing: topk_weights: nothing"),
    ("mo.Routing([[0, 1]], [[1, 1]])", D, "topk_ids: list numpy.asarray(it, 'int32')"),
    ("mo.Routing(routing.topk_weights, routing.topk_ids)", D, "topk_ids: int32 f32"),
    ("mo.BucketPlan(routing, 8)", A, "BucketPlan: made by: build"),
    ("mo.BucketPlan.build(routing)", A, "num_experts: an int nothing"),
    ("mo.BucketPlan.build(routing.topk_ids, 8)", A, "routing: a Routing ndarray"),
    ("mo.combine(x, routing, plan)", A, "plan and routing are swapped"),
    ("mo.gather_rows(x, routing)", A, "plan: a BucketPlan Routing BucketPlan.build("),
    ("stack.dequantize(0, 'gate')", A, "role and expert are swapped"),
    ("stack.dequantize('gates', 0)", C, "role: nearest: gate"),
    ("stack.gemv_up(x, logits)", D, "ids: int32 or int64 f32"),
    ("mo.explain(stack)", A, "layer: a MoeLayer ExpertStack"),
    ("mo.Workspace('1GB')", A, "nbytes: an int str '1GB'"),
    ("mo.Workspace(-1)", A, "nbytes: at least 0 int -1"),
    ("mo.trim(1)", A, "trim: none by position 1"),
    # settings
    ("mo.RouterConfig(8)", A, "RouterConfig: top_k: an int nothing"),
    ("mo.RouterConfig(8, 9)", C, "top_k: 1 to 8 9"),
    ("mo.RouterConfig(8, 2, score='Softmax')", C, "score: nearest: softmax"),
    ("mo.RouterConfig(8, 2, scores='softmax')", A, "scores: nearest: score"),
    ("mo.Activation('swiglo')", C, "nearest: swiglu"),
    ("mo.Activation('silu')", C, "'silu' here: swiglu"),
    ("mo.moe_forward(x, logits, stack, top_k=2, activation='relu2')", C, "here: relu_squared"),
    ("mo.MoeConfig(-1, 256, 8, 2)", C, "MoeConfig: hidden_size: at least 1 -1"),
    ("config.replace(intermediate_size=0)", C, "intermediate_size: at least 1 0"),
    ("mo.MoeConfig.from_hf({'model_type': 'qwen3moe'})", mo.UnsupportedError, "perhaps qwen3_moe"),
    ("mo.MoeConfig.from_hf({'model_type': 'zzz'})", mo.UnsupportedError, "known 'zzz' config=)"),
    ("config.replace(topk=2)", A, "topk: nearest: top_k"),
    ("config.replace(top_k='2')", A, "top_k: an int str '2'"),
    ("mo.Tuning(treads=2)", A, "treads: nearest: threads"),
    ("mo.tuning(treads=2).__enter__()", C, "treads nearest: threads"),
    ("mo.Tuning(gemm='best')", C, "gemm: auto|bucketed|aligned"),
    ("mo.profile('on').__enter__()", C, "mode: counters 'on'"),
    ("mo.profile(modes='events')", A, "profile: modes: unknown nearest: mode"),
    ("mo.tuning(2)", A, "tuning: arguments: none by position 1"),
    ("mo.explain()", A, "explain: layer: a value nothing"),
    ("mo.explain(layer, 8, 9)", A, "explain: at most 2 by position 3"),
    ("mo.explain(layer, 8, num_tokens=8)", A, "explain: by position"),
    ("mo.testing.quantize(x, quan='Q4_K')", A, "quantize: quan: nearest: quant"),
    ("mo.ExpertPool(8)", A, "budget: an int nothing"),
    ("mo.ExpertPool(8, 4, ranking='Hits')", C, "ranking: nearest: hits"),
    ("mo.MoeExpertStore.from_gguf(file, memory=1)", A, "memory: nearest: memory_limit"),
    # types
    ("mo.asarray(x, 'float32')", D, "dtype: 'float32' write 'f32'"),
    (
        "mo.write_gguf(folder + '/a', layer, architecture='qwen3')",
        C,
        "known_architectures nearest:",
    ),
    ("mo.write_gguf(folder + '/a', layer, metadata={1: 2})", D, "metadata: keys str int"),
    ("mo.ExpertProfile.load(path)", mo.FormatError, "a profile by save() no .npz file"),
    ("mo.asarray(x, np.float32)", D, "dtype: 'float32' write 'f32'"),
    ("mo.asarray(x.tolist())", D, "dtype list asarray(x, 'f32')"),
    ("mo.asarray([[1], [2, 3]], 'f32')", D, "x: lists of equal lengths"),
    ("mo.testing.quantize(x, 'q4_k')", C, "quant: 'q4_k' nearest: Q4_K"),
    ("mo.testing.quantize(x, 'Q4K')", C, "quant: 'Q4K' nearest: Q4_K"),
]


def test_there_are_many():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(("code", "kind", "words"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line(ready, code, kind, words):
    with pytest.raises(mo.Error) as raised:
        eval(code, vars(ready))
    message = str(raised.value)
    assert type(raised.value) is kind, (type(raised.value), message)
    assert len(message.replace(ready.folder, "")) <= 200 and "\n" not in message, message
    for name in ("::", "pybind", "typing.", "0x", "Tensor("):
        assert name not in message, message
    rest = message
    for word in words.split():
        assert word in rest, (message, word)


def test_a_path_is_opened(ready):
    with mo.MoeLayer.from_gguf(ready.path, np.int64(0)) as layer:
        np.testing.assert_array_equal(layer(ready.x), ready.layer(ready.x))
    assert mo.MoeConfig.from_gguf(ready.path, 0) == ready.config
    assert mo.layer_kinds(ready.path) == ["moe"]
    assert mo.ExpertStack.load_from_gguf(ready.path, 0).nbytes == ready.stack.nbytes


def test_numbers_of_numpy_are_numbers(ready):
    top_k, experts = np.int32(K), np.uint8(8)
    assert mo.RouterConfig(experts, top_k).top_k == K
    assert mo.route(ready.logits, top_k=np.int64(K)).top_k == K
    assert mo.Activation(limit=np.float32(2)).limit == 2


# --- fields -----------------------------------------------------------------------------------

FIELDS = ("operation", "what", "expected", "got", "hint")


def fields(error):
    return tuple(getattr(error, name) for name in FIELDS)


@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("layer(x.T)", ("MoeLayer", "x.shape", "[T, 256]", "f32[256, 3]", "transposed: x.T")),
        (
            "layer(x, rooting=1)",
            ("MoeLayer", "rooting", "", "an unknown keyword", "nearest: routing"),
        ),
        (
            "mo.ExpertProfile.from_counts([1])",
            ("ExpertProfile", "counts", "int64 [any, any], none negative", "(1,)", ""),
        ),
        ("mo.MoeConfig.from_hf(3)", ("MoeConfig.from_hf", "config", None, "int", "")),
    ],
)
def test_errors_have_fields(ready, code, want):
    with pytest.raises(mo.Error) as raised:
        eval(code, vars(ready))
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert type(error) is type(raised.value) and str(error) == str(raised.value)
        for got, expected in zip(fields(error), want, strict=True):
            assert expected is None or got == expected


def test_an_error_without_parts_has_empty_fields():
    assert fields(mo.ConfigError("something")) == ("",) * 5


# --- every parameter of every function --------------------------------------------------------


class Odd:
    """Fits no parameter that asks for anything."""


def functions():
    """(name, callable) of all that users call; methods come bound to nothing."""
    for name in mo.__all__:
        value = getattr(mo, name)
        if inspect.isclass(value) and value.__module__ == "moesaic":
            if issubclass(value, BaseException):
                continue
            for member, attribute in vars(value).items():
                if isinstance(attribute, staticmethod) and not member.startswith("_"):
                    yield f"{name}.{member}", getattr(value, member)
            if f"{name}.__init__" in _core._bound_signatures():
                yield name, value
        elif type(value).__name__ == "builtin_function_or_method":
            yield name, value


FUNCTIONS = dict(functions())


def test_functions_are_found():
    assert {"route", "MoeLayer", "MoeLayer.from_gguf", "moe_forward"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_type_for_each_parameter_is_one_line(name):
    function = FUNCTIONS[name]
    parameters = dict(inspect.signature(function).parameters)
    any_text = {("Tuning", "cuda_plugin")}  # a path, which need not be there
    parameters = {p: facts for p, facts in parameters.items() if (name, p) not in any_text}
    calls = [{"an_unknown_one": 1}]
    calls += [{p: Odd() for p in parameters} | {one: Odd()} for one in parameters]
    calls += [{one: Odd()} for one in parameters]
    for arguments in calls:
        with pytest.raises(mo.Error) as raised:
            function(**arguments)
        message = str(raised.value)
        assert len(message) <= 200 and "\n" not in message and "::" not in message, message
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return
    with pytest.raises(mo.ArgumentError, match="by position"):
        function(*range(len(parameters) + 2))


def test_signatures_stay_visible():
    assert str(inspect.signature(mo.route)).startswith("(logits, router=None, *, top_k=None")
    assert str(inspect.signature(mo.MoeLayer)).startswith("(stack, config, router_weight=None, *,")
    assert mo.route.__doc__.startswith("Route")


def test_errors_of_callbacks_stay_what_they_are(ready):
    def progress(step):
        raise TypeError("load(): incompatible function arguments of my own")

    with pytest.raises(TypeError, match="of my own") as raised:
        mo.ExpertStack.load_from_gguf(ready.file, 0, progress=progress)
    assert type(raised.value) is TypeError


# --- what is no error of ours -----------------------------------------------------------------


def test_a_missing_file_is_named_once(ready):
    with pytest.raises(FileNotFoundError) as raised:
        mo.MoeLayer.from_gguf("no.gguf", 0)
    assert str(raised.value) == "[Errno 2] No such file or directory: 'no.gguf'"


def test_a_folder_in_place_of_a_gguf_file_says_what_opens_it(ready):
    with pytest.raises(IsADirectoryError, match=r"MoeLayer\.from_safetensors"):
        mo.GgufFile(ready.folder)


@pytest.mark.parametrize("function", [mo.route, mo.MoeLayer.from_gguf])
def test_help_names_no_class_of_pybind11(function):
    text = pydoc.plain(pydoc.render_doc(function))
    assert "pybind11" not in text.splitlines()[2], text

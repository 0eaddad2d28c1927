"""Every public class, method, property and function, as introspection finds them, with arguments of
any kind: a result or a documented exception, and a process that lives.

Most arguments would fit a parameter of that name, so that calls go far; the others are arrays of
wrong types, shapes and strides, objects of other classes, numbers at every edge, and objects whose
methods raise or lie. Objects are used on, whatever calls made of them.
"""

import array
import builtins
import contextlib
import copy
import gc
import inspect
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import harness
import numpy as np
import test_objects
from harness import Board, Fuzzer

import moesaic as mo

#: Left out, because they write as much as they are asked for.
LEFT_OUT = {"write_moe_gguf"}
#: What operators and protocols of Python raise beside what docstrings name.
PROTOCOLS: dict[str, tuple[type[BaseException], ...]] = {
    "__getitem__": (IndexError, KeyError), "__array__": (ValueError,),
    "__buffer__": (BufferError, ValueError), "__dlpack__": (BufferError,),
    "set": (AttributeError,), "pickle": (pickle.PicklingError,), "iterate": (StopIteration,),
}  # fmt: skip
WORDS = sorted(
    set(re.findall(r'"([a-z0-9_]+)"', Path(mo.__file__).with_name("_core.pyi").read_text()))
)
NUMBERS = [
    *(-2, -1, 0, 1, 2, 3, 4, 8, 16, 64, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63),
    *(-(2**31), -(2**63), 2**64, 10**30, 0.0, -0.5, 1.5, 1e-320, 1e300, float("nan")),
    *(float("inf"), True, False, np.int64(3), np.float32(2), np.int8(-1), 1j),
]
DTYPES = [
    *("f4", "f4", "f4", "f2", "f8", "i4", "i4", "i8", "u1", "u2", "i2", "u8", "?", "c8", ">f4"),
    *(">i4", "S3", "U2", "O", "M8[s]", "V3", "g", "i4,f4"),
]


#: Errors of Python and numpy about the caller's own objects, while ours are asked to read them.
CALLERS = re.compile(
    "sub-views are not implemented|memoryview: format|index-sized integer|could not be broadcast"
    "|cannot hash writable|Can't pickle local|embedded null|truth value of an"
    "|memoryview: unsupported format"
)


class Own(Exception):
    """What objects of the caller raise; it may come out as it is."""


class Hostile:
    """An object of the caller, whose methods do what ``how`` says."""

    def __init__(self, how: Callable[[], Any]):
        self.how = how

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.how()

    def __exit__(self, *_: Any) -> None:
        pass


for _name in (
    *("index", "int", "float", "bool", "len", "iter", "fspath", "dlpack", "dlpack_device", "eq"),
    *("array", "getitem", "hash", "next", "contains", "str", "repr", "enter", "complex"),
):
    setattr(Hostile, f"__{_name}__", Hostile.__call__)


def fail() -> Any:
    raise Own


class Text(str):
    pass


class World:
    """The objects that the calls of a group share, in a folder of its own."""

    def __init__(self, folder: str):
        tempfile.tempdir = folder
        os.chdir(folder)
        space: dict[str, Any] = {}
        exec(test_objects.PRELUDE + test_objects.EXAMPLES, space)
        self.objects: list[Any] = space["objects"]
        layer, file, routing = space["layer"], space["file"], mo.route(
            np.zeros((4, 8), np.float32), top_k=3)  # fmt: skip
        plan = mo.BucketPlan.build(routing, 8)
        floats = np.random.default_rng(0).standard_normal
        ids = np.arange(12, dtype=np.int32).reshape(4, 3) % 8
        self.objects += [mo.current_tuning(), routing, plan, mo.explain(layer)]
        matrix = mo.QuantMatrix.from_dense(floats((64, 256)).astype("f4"), "Q8_0")
        self.objects.append(matrix)
        x, pairs = floats((4, 256)).astype("f4"), floats((12, 256)).astype("f4")
        dense = [floats((2, 32, 32)).astype("f4") for _ in range(3)]
        coded = (mo.testing.quantize(floats((2, 32, 32)).astype("f4"), "Q8_0"), "Q8_0", (2, 32, 32))
        self.likely: dict[str, list[Any]] = {
            "x": [x, x, x, pairs], "logits": [floats((4, 8)).astype("f4"), None],
            "routing": [routing, None], "plan": [plan], "stack": [layer.stack, layer],
            "layer": [layer, 0, 0], "file": [file, space["path"]], "path": [space["path"]],
            "new path": ["new"],
            "topk_ids": [ids, None], "topk_weights": [np.ones((4, 3), "f4")],
            "ids": [ids, ids[0], [ids]],
            "token_ids": [None, ids[:, 0]], "router_input": [None, x], "rows": [pairs],
            "hidden": [pairs, pairs.reshape(4, 3, 256)], "out": [None, np.zeros((4, 256), "f4")],
            "workspace": [None, mo.Workspace(1 << 20), mo.Workspace.for_layer(layer, 8)],
            "stream": [None], "device": ["cpu", "cuda:0", "metal"], "precision": ["exact", "fast"],
            "activation": ["swiglu", mo.Activation("reglu")], "router": [None, layer.config.router],
            "config": [layer.config], "progress": [None, lambda p: True, lambda p: file.close()],
            "role": ["gate", "up", "down"], "type": ["Q4_K", "Q8_0"], "shape": [(2, 256), (4, 256)],
            "gate": [dense[0], coded, None], "up": [dense[1], coded], "down": [dense[2], coded],
            "top_k": [3], "num_experts": [8], "block_size": [16], "threads": [1, 2], "tokens": [4],
            "num_tokens": [4], "layers": [[tuple(dense)]], "store": [space["store"]], "pool": [
                space["pool"], mo.ExpertPool(8, 4)], "pools": [[space["pool"]]], "i": [0],
            "expert": [0, 7], "layout": ["auto", "file"], "mode": ["counters", "events", "reuse"],
            "values": [x], "data": [coded[0]], "budget": [4], "target": [[0, 1]],
            "router_weight": [floats((8, 256)).astype("f4")],
            "name": ["blk.0.ffn_gate_inp.weight", *file.tensors], "matrix": [matrix],
            "bias": [None, floats(32).astype("f4"), "blk.0.ffn_gate_inp.weight"],
            "experts": [8], "intermediate_size": [32], "hidden_size": [32], "step": [0, 1],
        }  # fmt: skip
        self.likely["router_logits"] = self.likely["logits"]


class Draw:
    """Random values for arguments."""

    def __init__(self, random: np.random.Generator, world: World):
        self.random, self.world = random, world

    def pick(self, options: Any) -> Any:
        return options[self.random.integers(len(options))]

    def array(self) -> Any:
        dims = [0, 1, 2, 3, 4, 8, 12, 32, 256]
        shape = [self.pick(dims) for _ in range(self.random.integers(0, 4))]
        while (size := int(np.prod(shape, dtype=int))) > 1 << 16:
            shape.pop()
        raw = self.random.standard_normal(size, np.float32)
        with np.errstate(all="ignore"):
            kind = self.pick(DTYPES)
            try:
                values = raw.astype(kind).reshape(shape)
            except (ValueError, TypeError):
                values = np.zeros(shape, kind)
        return self.turned(values)

    def turned(self, values: np.ndarray) -> Any:
        """The same values, held in another way."""

        def unaligned() -> np.ndarray:
            held = np.empty(values.nbytes + 1, np.uint8)[1:].view(values.dtype)
            return held.reshape(values.shape)

        def read_only() -> np.ndarray:
            other = values.copy()
            other.flags.writeable = False
            return other

        way = self.pick([
            lambda: values, lambda: values, lambda: values[::-1], lambda: values.T,
            lambda: np.asfortranarray(values), unaligned, read_only, lambda: memoryview(values),
            lambda: mo.asarray(values), lambda: np.ma.array(values, mask=values != 0),
            lambda: np.broadcast_to(values, (3, *values.shape)), lambda: values[..., ::2],
            lambda: values.tobytes(), lambda: values.tolist(), lambda: values.astype("f2"),
            lambda: values.view(np.recarray), lambda: array.array("f", values.ravel()),
            lambda: values[..., None], lambda: values.ravel(), lambda: values[:1],
        ])  # fmt: skip
        try:
            return way()
        except (ValueError, TypeError, IndexError, mo.Error, OverflowError):
            return values

    def anything(self, depth: int = 0) -> Any:
        kind = self.random.random()
        if kind < 0.25:
            return self.pick(NUMBERS)
        if kind < 0.45:
            return self.array()
        if kind < 0.6:
            return self.pick(self.world.objects)
        if kind < 0.75:
            return self.pick([
                self.pick(WORDS), "", "\ud800", "\0", "x" * 5000, b"ab", Text("exact"),
                self.pick(WORDS).encode(), "no/such/file", ".", os.fsdecode(b"\xff"),
                Path("model.gguf"), bytearray(8),
            ])  # fmt: skip
        if kind < 0.85 and depth < 2:
            items = [self.anything(depth + 1) for _ in range(self.random.integers(0, 4))]
            return self.pick([
                lambda: items, lambda: tuple(items), lambda: iter(items),
                lambda: {str(i): item for i, item in enumerate(items)}, lambda: [items] * 3,
            ])()  # fmt: skip
        if kind < 0.93:
            return Hostile(self.pick([
                fail, lambda: None, lambda: 1, lambda: (1, 0), lambda: "x", object,
                lambda: [1, 2], gc.collect, lambda: np.zeros(3), mo.trim,
            ]))  # fmt: skip
        return self.pick([None, None, ..., object(), int, mo, fail, mo.Routing, NotImplemented])

    def argument(self, parameter: inspect.Parameter) -> Any:
        is_written = parameter.annotation == "new"
        likely = self.world.likely.get("new path" if is_written else parameter.name)
        chance = self.random.random()
        if likely is None or chance > 0.85:
            return self.anything()
        value = self.pick(likely)
        return self.turned(value) if isinstance(value, np.ndarray) and chance > 0.65 else value

    def arguments(self, parameters: list[inspect.Parameter]) -> tuple[list[Any], dict[str, Any]]:
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for p in parameters:
            if p.kind is p.VAR_KEYWORD:
                if self.random.random() < 0.5:
                    named[self.pick(["threads", "gemm", "top_k", "x"])] = self.anything()
            elif p.kind is p.VAR_POSITIONAL:
                positional += [self.anything() for _ in range(self.random.integers(0, 3))]
            elif p.default is p.empty or self.random.random() < 0.3:
                if p.kind is p.KEYWORD_ONLY or len(positional) < parameters.index(p):
                    named[p.name] = self.argument(p)
                else:
                    positional.append(self.argument(p))
        if self.random.random() < 0.03:
            positional.append(self.anything())
        return positional, named


def documented(text: str | None) -> tuple[type[BaseException], ...]:
    """The exceptions that a docstring names."""
    names = set(re.findall(r"\b[A-Z]\w*(?:Error|Cancelled)\b|\bStopIteration\b", text or ""))
    found = (getattr(mo, n, getattr(builtins, n, None)) for n in names)
    return tuple(e for e in found if isinstance(e, type))


def parameters_of(function: Any) -> list[inspect.Parameter]:
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError, Own):  # a field may hold an object of the caller
        found = []
    return [p for p in found if p.name not in ("self", "cls")]


def functions() -> Iterator[tuple[str, Any]]:
    """Public functions, constructors, and functions of classes."""
    for module in (mo, mo.testing):
        for name in module.__all__:
            member = getattr(module, name)
            is_error = isinstance(member, type) and issubclass(member, BaseException)
            if name in LEFT_OUT or not callable(member) or is_error:
                continue
            if isinstance(member, type) and issubclass(member, dict | list | Enum):
                continue  # constructors of Python's own
            yield name, member
            for inner in vars(member) if isinstance(member, type) else ():
                if isinstance(inspect.getattr_static(member, inner), staticmethod | classmethod):
                    yield f"{name}.{inner}", getattr(member, inner)


def members(subject: Any) -> list[str]:
    """What the classes of moesaic define for an object."""
    if isinstance(subject, (type, Enum)):
        return []
    found = {
        name
        for c in type(subject).__mro__
        if c.__module__.startswith("moesaic") and c is not mo.Tuning.__mro__[1]
        for name in vars(c)
        if not name.startswith("_") or name in ("__call__", "__getitem__", "__contains__",
                                               "__eq__", "__dlpack__", "__array__", "__enter__")
    }  # fmt: skip
    return sorted(found)


#: What Python does to any object.
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "repr": lambda o, _: repr(o), "str": lambda o, _: str(o), "hash": lambda o, _: hash(o),
    "len": lambda o, _: len(o), "bool": lambda o, _: bool(o), "equal": lambda o, v: o == v,
    "iterate": lambda o, _: [next(i) for i in [iter(o)] for _ in range(3)],
    "contains": lambda o, v: v in o, "__getitem__": lambda o, v: o[v], "copy": lambda o, _:
    copy.copy(o), "pickle": lambda o, _: pickle.dumps(o), "asarray": lambda o, _: np.asarray(o),
    "memoryview": lambda o, _: memoryview(o),
}  # fmt: skip


class Misuse(Fuzzer):
    group = 250
    megabytes = 4096
    seconds_per_case = 120.0  # plot() imports matplotlib, which takes long on a busy machine

    def start(self) -> None:
        self.functions = list(functions())
        self.top = tempfile.TemporaryDirectory()
        self.folder = None

    def begin(self) -> None:
        os.chdir("/")
        self.world = None
        gc.collect()
        if self.folder is not None:
            self.folder.cleanup()
        self.folder = tempfile.TemporaryDirectory(dir=self.top.name)
        self.world = World(self.folder.name)

    def case(self, random: np.random.Generator, board: Board) -> str:
        draw = Draw(random, self.world)
        kind = random.random()
        allowed = (mo.Error, TypeError, Own)
        if kind < 0.45:
            label, function = draw.pick(self.functions)
            allowed += documented(function.__doc__)
        else:
            subject = draw.pick(self.world.objects)
            label = type(subject).__name__
            names = members(subject)
            if kind < 0.85 and names:
                name = draw.pick(names)
                label += f".{name}"
                documentation = getattr(type(subject), name).__doc__
                allowed += (*documented(documentation), *PROTOCOLS.get(name, ()))
                board.say(label)
                if kind < 0.5:
                    value = draw.anything()
                    allowed += (*PROTOCOLS["set"],)
                    return self.attempt(lambda: setattr(subject, name, value), allowed)
                try:
                    function = getattr(subject, name)
                except allowed:
                    return "refused"
                if not callable(function):
                    return "done"
            else:
                name = draw.pick(list(OPERATORS))
                value = draw.anything()
                label += f", {name} {short(value)}"
                allowed += PROTOCOLS.get(name, ())
                board.say(label)
                return self.attempt(lambda: OPERATORS[name](subject, value), allowed)
        parameters = parameters_of(function)
        if re.search("save|plot", label):  # a file that is mapped must not be overwritten
            parameters = [
                p.replace(annotation="new") if p.name == "path" else p for p in parameters
            ]
        positional, named = draw.arguments(parameters)
        given = [short(v) for v in positional] + [f"{k}={short(v)}" for k, v in named.items()]
        board.say(f"{label}({', '.join(given)})")
        return self.attempt(lambda: self.use(function(*positional, **named)), allowed)

    def attempt(self, call: Callable[[], Any], allowed: tuple[type[BaseException], ...]) -> str:
        try:
            with np.errstate(all="ignore"):
                call()
        except allowed:
            return "refused"
        except Exception as error:
            if CALLERS.search(str(error)):
                return "refused"
            raise
        return "done"

    def use(self, result: Any) -> None:
        """Keep what is ours for later calls, and enter what wants to be entered."""
        if isinstance(result, contextlib.AbstractContextManager) and not hasattr(result, "close"):
            with result:
                pass
        elif type(result).__module__.startswith("moesaic") and len(self.world.objects) < 120:
            self.world.objects.append(result)


def short(value: Any) -> str:
    """What a value is, without asking hostile objects."""
    if isinstance(value, np.ndarray):
        return f"<{value.dtype.str} {value.shape} strides {value.strides}>"
    if type(value) in (int, float, bool, str, bytes, type(None), complex, Text):
        return repr(value)[:60]
    if type(value) in (list, tuple):
        return f"{type(value).__name__}({', '.join(map(short, value[:4]))})"
    return f"<{type(value).__module__}.{type(value).__name__}>"


if __name__ == "__main__":
    harness.main(Misuse(), __doc__)

"""What Python can do to objects behind the back of C++, for every class of the module.

An attempt that succeeded would crash later, so each class is tried in a process of its own. Classes
and members are those that the module has: a new one is tried without a line here.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic as mo
from moesaic import _core

BASE = mo.Tuning.__mro__[1]
CLASSES = sorted(n for n, c in vars(_core).items() if isinstance(c, type) and issubclass(c, BASE))
# Of these there are objects where there is a GPU.
ON_DEVICES = {"_DeviceMemory"}

PRELUDE = """
import copy, copyreg, pickle, sys
import numpy as np
import moesaic as mo
from moesaic import _core

base = mo.Tuning.__mro__[1]
def refused(attempt):
    try:
        got = attempt()
    except TypeError:
        return
    raise AssertionError(f"{got!r} instead of a TypeError")
def functions(c):
    for name, member in vars(c).items():
        if isinstance(member, property):
            yield member.fget
        elif type(member).__name__ == "instancemethod":
            yield member
class Own:
    pass
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_classes_are_found():
    assert {"Tuning", "Routing", "MoeLayer", "StackBuilder", "GgufTensors"} <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_gives_no_object_without_its_constructor(name):
    run(
        """
c = getattr(_core, sys.argv[1])
for attempt in [
    lambda: c.__new__(c),
    lambda: base.__new__(c),
    lambda: object.__new__(c),
    lambda: copyreg.__newobj__(c),
    lambda: copyreg._reconstructor(c, object, None),
    lambda: copyreg._reconstructor(c, base, None),
    lambda: type("Derived", (c,), {}),
    lambda: setattr(c, "__init__", None),
    lambda: setattr(c, "__class__", type),
]:
    refused(attempt)
""",
        name,
    )


@pytest.mark.parametrize("name", CLASSES)
def test_no_method_takes_another_self(name):
    run(
        """
c = getattr(_core, sys.argv[1])
for function in functions(c):
    for more in ((), (None,), (None, None)):
        refused(lambda: function(None, *more))
        for wrong in (1, c, Own()):
            try:  # __enter__ returns what it gets
                assert function(wrong, *more) is wrong
            except (TypeError, AttributeError):
                pass
""",
        name,
    )


def test_the_base_gives_no_objects():
    run("""
for attempt in [base, lambda: base.__new__(base), lambda: type("Derived", (base,), {})]:
    refused(attempt)
""")


# One object of every class that its own constructor makes from little, or that another object has.
EXAMPLES = """
import tempfile, os
path = os.path.join(tempfile.mkdtemp(), "small.gguf")
mo.testing.write_moe_gguf(path, num_experts=8, top_k=3, hidden=256, intermediate=256)
file = mo.GgufFile(path)
layer = mo.MoeLayer.from_gguf(file, 0)
routing = mo.Routing(np.zeros((2, 2), np.int32), np.ones((2, 2), np.float32))
store = mo.MoeExpertStore.from_gguf(file)
pool = mo.ExpertPool(8, 4)
spec = ("F32", "a", "b", "c")
marlin = mo.MarlinExpertStack.from_gptq(
    np.zeros((1, 16, 64), np.int32), np.ones((1, 1, 64), np.float16), group_size=128)
steps = []
mo.ExpertStack.load_from_gguf(file, 0, progress=steps.append)
with mo.profile() as profile:
    layer(np.ones((1, 256), np.float32))
objects = [
    mo.Tuning(), mo.show_config()[0], profile, next(iter(profile.zones.values())),
    mo.asarray(np.ones(3, np.float32)), file, file.metadata, file.tensors,
    file.tensors[next(iter(file.tensors))], mo.Activation("reglu"), mo.RouterConfig(4, 2),
    layer.config, routing, mo.BucketPlan.build(routing, 8), mo.align_block_size(routing, 8, 16),
    steps[0], layer.report, layer.report.roles[0], marlin, marlin.make_expert_linear(0),
    _core.MarlinStackBuilder(1, 128, 64, 128, "gptq"), layer.stack, layer, pool.refresh_policy,
    pool.refresh(), pool.stats, pool.usage, pool, store, store.layers[0], store.layers[0].up,
    _core.StackBuilder(2, 32, 32, gate=None, up=spec, down=spec), mo.Workspace(64),
    mo.backends()[0], mo.backends()[0].kernels[0], mo.SharedExperts(layer.stack.select([0])),
    mo.QuantMatrix.from_gguf(file, "blk.0.ffn_gate_inp.weight"),
]
"""


def test_objects_are_copied_whole_or_not_and_get_no_other_class():
    run(
        EXAMPLES
        + """
missing = set(sys.argv[1].split()) - {type(o).__name__ for o in objects}
assert not missing, f"examples lack {missing}"
def whole_or_refused(attempt, one):
    try:
        made = attempt()
    except TypeError:
        return
    if isinstance(made, tuple):  # (function, arguments)
        made = made[0](*made[1])
    assert type(made) is type(one)
    repr(made), str(made)
    if hasattr(one, "to_dict"):
        assert made == one and made.to_dict() == one.to_dict()
for one in objects:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        whole_or_refused(lambda: pickle.loads(pickle.dumps(one, protocol)), one)
        whole_or_refused(lambda: one.__reduce_ex__(protocol), one)
        whole_or_refused(lambda: object.__reduce_ex__(one, protocol), one)
    for attempt in (one.__reduce__, lambda: copy.copy(one), lambda: copy.deepcopy(one)):
        whole_or_refused(attempt, one)
    for other in (*map(type, objects), base, Own):
        if other is not type(one):
            refused(lambda: setattr(one, "__class__", other))
            refused(lambda: object.__dict__["__class__"].__set__(one, other))
            refused(lambda: setattr(Own(), "__class__", other)) if other is not Own else None
""",
        " ".join(set(CLASSES) - ON_DEVICES),
    )


# A call for every function that takes a list of objects, with "_" in the place of the list.
LISTS = {
    "merged_resident_mask": ("mo.merged_resident_mask(_)", "pool"),
    "ExpertStack.concat": ("mo.ExpertStack.concat(_)", "layer.stack"),
    "MoeExpertStore.apply": ("store.apply(_)", "pool"),
    "MoeExpertStore.refresh_pools": ("store.refresh_pools(_, [[0]] * len(_), 0)", "pool"),
}


def functions_with_lists():
    stub = ast.parse((Path(mo.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
    scopes = [("", stub.body)]
    scopes += [(f"{node.name}.", node.body) for node in stub.body if isinstance(node, ast.ClassDef)]
    lists = re.compile(rf"Sequence\[({'|'.join(CLASSES)})\b")
    for scope, body in scopes:
        for node in body:
            if isinstance(node, ast.FunctionDef) and lists.search(ast.unparse(node.args)):
                yield scope + node.name


def test_every_function_that_takes_a_list_of_objects_is_tried():
    assert set(functions_with_lists()) == set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_object_in_a_list_of_them(name):
    run(
        EXAMPLES
        + """
good = eval(sys.argv[2])
for bad in (None, 1, "a", Own(), mo.Tuning(), type(good)):
    for given in ([bad], [good, bad], (bad,)):
        refused(lambda: eval(sys.argv[1], {**globals(), "_": given}))
class Shrinks(list):
    def __len__(self):
        return super().__len__() + 3
class Clears:
    def __getattribute__(self, name):
        changing.clear()
        return object.__getattribute__(self, name)
changing = [Clears(), good, good]
for given in (Shrinks([good]), changing):
    try:
        eval(sys.argv[1], {**globals(), "_": given})
    except (TypeError, IndexError, mo.Error):
        pass
""",
        *LISTS[name],
    )

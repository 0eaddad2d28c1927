"""One source of signatures and docstrings: stub, module and bindings agree, for every member.

``_core.pyi`` is where they are written, ``help`` and ``inspect.signature`` show what the build made
of it, and ``_core._bound_signatures()`` says what pybind11 really takes.
"""

import ast
import builtins
import doctest
import inspect
import pydoc
import re
import types
from pathlib import Path

import numpy as np
import pytest

import moesaic as mo
from moesaic import _core

STUB = ast.parse((Path(mo.__file__).parent / "_core.pyi").read_text(encoding="utf-8"))
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
BOUND = _core._bound_signatures()


def is_property(function):
    return any(getattr(d, "id", "") == "property" for d in function.decorator_list)


def never_called(function):
    """Whether it is the constructor of a class that has none: its arguments are Never."""
    vararg = function.args.vararg
    return vararg is not None and ast.unparse(vararg.annotation) == "Never"


def stub_functions():
    """The functions and methods of the stub by qualified name, overloads as a list."""
    found = {}
    for scope, body in [("", STUB.body), *((f"{n}.", c.body) for n, c in CLASSES.items())]:
        if scope.startswith("_"):
            continue
        for node in body:
            if (
                isinstance(node, ast.FunctionDef)
                and not is_property(node)
                and not never_called(node)
            ):
                found.setdefault(scope + node.name, []).append(node)
    # What typeshed says of the buffer protocol shows at run time from Python 3.12 on.
    return {n: f for n, f in found.items() if not n.endswith("buffer__")}


def stub_properties():
    return {
        f"{name}.{node.name}"
        for name, class_node in CLASSES.items()
        for node in class_node.body
        if isinstance(node, ast.FunctionDef) and is_property(node)
    }


def runtime(name):
    """What stands under a qualified name, as the class's dictionary has it."""
    owner, _, member = name.rpartition(".")
    return getattr(_core, owner).__dict__[member] if owner else getattr(_core, name)


def called(name):
    """What a user calls by this name: the class itself for a constructor."""
    owner, _, member = name.rpartition(".")
    if member == "__init__":
        return getattr(_core, owner)
    return getattr(getattr(_core, owner), member) if owner else getattr(_core, name)


def compiled_classes():
    return {n: c for n, c in vars(_core).items() if isinstance(c, type) and not n.startswith("_")}


FUNCTIONS = stub_functions()
PROPERTIES = stub_properties()


def test_every_member_of_the_module_stands_in_the_stub():
    members = {n for n, v in vars(_core).items() if isinstance(v, types.BuiltinFunctionType)}
    for name, compiled in compiled_classes().items():
        assert name in CLASSES, name
        members |= {
            f"{name}.{member}"
            for member, value in vars(compiled).items()
            # What a class has from CPython or collections.abc is of other kinds.
            if type(value).__name__ == "instancemethod"
            or isinstance(value, staticmethod | property)
        }
    assert {"route", "MoeLayer.__call__", "MoeLayer.from_gguf", "Array.dtype"} <= members
    private = {m for m in members if re.search(r"(^|\.)_[^_]", m)}
    assert members - private <= FUNCTIONS.keys() | PROPERTIES


@pytest.mark.parametrize("name", sorted(PROPERTIES))
def test_properties_are_properties_with_the_docstring_of_the_stub(name):
    owner, _, member = name.rpartition(".")
    (node,) = (n for n in CLASSES[owner].body if getattr(n, "name", None) == member)
    assert isinstance(runtime(name), property)
    assert runtime(name).__doc__ == ast.get_docstring(node)
    assert runtime(name).__doc__


def parameters_of(arguments):
    """(name, kind, default as source) of each parameter of a stub's function."""
    empty, kinds = inspect.Parameter.empty, inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    only = len(arguments.posonlyargs)
    rows = [
        (a.arg, kinds.POSITIONAL_ONLY if i < only else kinds.POSITIONAL_OR_KEYWORD, d)
        for i, (a, d) in enumerate(zip(positional, defaults, strict=True))
    ]
    if arguments.vararg:
        rows.append((arguments.vararg.arg, kinds.VAR_POSITIONAL, None))
    rows += [
        (a.arg, kinds.KEYWORD_ONLY, d)
        for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        rows.append((arguments.kwarg.arg, kinds.VAR_KEYWORD, None))
    return [(n, k, empty if d is None else ast.literal_eval(d)) for n, k, d in rows]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_inspect_signature_is_that_of_the_stub(name):
    expected = parameters_of(FUNCTIONS[name][0].args)
    target = called(name)
    if isinstance(target, type):
        expected = expected[1:]
    got = [(p.name, p.kind, p.default) for p in inspect.signature(target).parameters.values()]
    assert got == expected


@pytest.mark.parametrize("name", sorted(n for n, f in FUNCTIONS.items() if len(f) > 1))
def test_overloads_have_the_same_parameters(name):
    first, *others = ([(n, k) for n, k, _ in parameters_of(f.args)] for f in FUNCTIONS[name])
    assert all(other == first for other in others)


def split(text):
    """The parts of a list between commas that stand in no bracket and no string."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += 0 if quote else (c in "([{") - (c in ")]}")
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def bound_parameters(signature):
    """(name, kind, default) of each parameter, from the text that pybind11 makes."""
    kinds, rows, keyword_only = inspect.Parameter, [], False
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    for part in split(inside):
        declared, _, default = part.partition(" = ")
        name = declared.partition(":")[0]
        value = ast.literal_eval(default) if default else inspect.Parameter.empty
        if part == "*":
            keyword_only = True
        elif part == "/":
            rows = [(n, kinds.POSITIONAL_ONLY, d) for n, _, d in rows]
        elif name.startswith("**"):
            rows.append(("", kinds.VAR_KEYWORD, value))
        elif name.startswith("*"):
            rows.append(("", kinds.VAR_POSITIONAL, value))
            keyword_only = True
        elif re.fullmatch(r"arg\d+", name):  # without a name it cannot be given by keyword
            rows.append(("", kinds.POSITIONAL_ONLY, value))
        else:
            kind = kinds.KEYWORD_ONLY if keyword_only else kinds.POSITIONAL_OR_KEYWORD
            rows.append((name, kind, value))
    return rows


def same_default(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return np.float32(a) == np.float32(b)
    if isinstance(a, list | tuple):
        return list(a) == list(b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_bindings_take_what_the_stub_says(name):
    stub, bound = parameters_of(FUNCTIONS[name][0].args), bound_parameters(BOUND[name])
    assert len(stub) == len(bound), BOUND[name]
    for i, (one, other) in enumerate(zip(stub, bound, strict=True)):
        is_self = i == 0 and one[0] == "self" and other[0] in ("self", "")
        assert is_self or one[1] == other[1], BOUND[name]
        assert other[0] in ("", one[0]), BOUND[name]
        assert same_default(one[2], other[2]), BOUND[name]


def public():
    """(qualified name, object) of all that ``moesaic`` exports, with the members of classes."""
    for name in mo.__all__:
        value = getattr(mo, name)
        if isinstance(value, types.ModuleType):
            yield from ((f"{name}.{n}", getattr(value, n)) for n in value.__all__)
        elif not name.startswith("__"):
            yield name, value
            if isinstance(value, type):
                yield from (
                    (f"{name}.{member}", getattr(value, member))
                    for member in vars(value)
                    if not member.startswith("_")
                )


PUBLIC = dict(public())


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_a_docstring(name):
    value = PUBLIC[name]
    constant = not callable(value) and not isinstance(value, property)
    assert constant or (value.__doc__ and value.__doc__ != type(value).__doc__)


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if callable(v)))
def test_help_shows_no_names_of_cpp(name):
    text = pydoc.render_doc(PUBLIC[name], renderer=pydoc.plaintext)
    assert not re.search(r"\w::\w|\bstd::|\bstd_", text)


SECTIONS = ["Parameters", "Returns", "Yields", "Raises", "Examples"]


def sections(doc):
    """The sections of a numpydoc docstring. Fails on an underline that is not one's."""
    lines, found, current = inspect.cleandoc(doc).splitlines(), {}, None
    for i, line in enumerate(lines):
        below = lines[i + 1] if i + 1 < len(lines) else ""
        if re.fullmatch("-{3,}", below):
            assert line in SECTIONS and len(below) == len(line), line
            current = found.setdefault(line, [])
        elif current is not None and not re.fullmatch("-{3,}", line):
            current.append(line)
    assert list(found) == [s for s in SECTIONS if s in found], "sections in numpydoc's order"
    return found


def heads(lines):
    """The names at the left margin of a section, several of which may share a text."""
    text = " ".join(re.sub(r" : .*", "", line) for line in lines if re.match(r"[\w*]", line))
    return re.findall(r"\*{0,2}\w+", text)


def documented():
    """Public functions and classes with the parameters that a docstring has to explain."""
    for name, value in PUBLIC.items():
        if isinstance(value, property) or not callable(value):
            continue
        try:
            parameters = inspect.signature(value).parameters.values()
        except ValueError:  # a class that cannot be called
            continue
        if any(p.annotation == "NoReturn" for p in parameters):  # nor one that only raises
            continue
        if isinstance(value, type) and issubclass(
            value, BaseException | dict | list | mo.MoeExecMode
        ):
            continue
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        yield name, [stars.get(p.kind, "") + p.name for p in parameters if p.name != "self"]


@pytest.mark.parametrize(("name", "names"), sorted(documented()))
def test_docstrings_explain_every_parameter(name, names):
    found = sections(PUBLIC[name].__doc__)
    if "Parameters" in found:
        assert heads(found["Parameters"]) == names
    else:
        assert len(names) < 2


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_errors_that_docstrings_name_exist(name):
    for error in heads(sections(PUBLIC[name].__doc__ or "").get("Raises", [])):
        found = getattr(mo, error, None) or getattr(builtins, error)
        assert issubclass(found, BaseException)


def typed_dicts():
    classes = {
        "_ActivationFields": "Activation",
        "_RouterConfigFields": "RouterConfig",
        "_MoeConfigFields": "MoeConfig",
        "_MoeLayerParts": "MoeLayer",
        "_TuningKnobs": "Tuning",
    }
    unpacked = {
        ast.unparse(function.args.kwarg.annotation)
        for overloads in FUNCTIONS.values()
        for function in overloads
        if function.args.kwarg is not None
    }
    assert unpacked == {f"Unpack[{name}]" for name in classes}
    return sorted(classes.items())


@pytest.mark.parametrize(("fields", "owner"), typed_dicts())
def test_replace_takes_the_arguments_of_the_constructor(fields, owner):
    (init,) = FUNCTIONS[f"{owner}.__init__"]
    arguments = [*init.args.args[1:], *init.args.kwonlyargs]
    assert [(a.arg, ast.unparse(a.annotation)) for a in arguments] == [
        (node.target.id, ast.unparse(node.annotation)) for node in CLASSES[fields].body
    ]


def test_knobs_say_in_the_stub_what_show_config_says():
    for entry in mo.show_config():
        said = " ".join(getattr(mo.Tuning, entry.knob).__doc__.split())
        assert said == f"{entry.help[0].upper()}{entry.help[1:]}."
    assert {e.knob for e in mo.show_config()} == mo.Tuning().to_dict().keys()


def python_modules():
    """By file, since some need packages that are not here."""
    package = Path(mo.__file__).parent
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if not name.startswith(("bench/", "cli/", "__main__")):
            yield name


@pytest.mark.parametrize("name", ["", *sorted(PUBLIC)])
def test_examples_run(name, tmp_path, monkeypatch):
    value = PUBLIC[name] if name else mo
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    test = parser.get_doctest(value.__doc__ or "", {"mo": mo, "np": np}, name or "moesaic", None, 0)
    monkeypatch.chdir(tmp_path)
    output = []
    runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


@pytest.mark.parametrize("name", sorted(python_modules()))
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(ast.parse((Path(mo.__file__).parent / name).read_text()))

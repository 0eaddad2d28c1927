"""The public names, their documentation, and the stub against the compiled module."""

import ast
import contextlib
import importlib.metadata
import re
from pathlib import Path

import pytest

import moesaic as mo
from moesaic import _core

STUB = ast.parse((Path(mo.__file__).parent / "_core.pyi").read_text())
PARAMETER = re.compile(r"(?:^|, )(\*\*?\w*|\w+)(?=[:,=]|$)")


def test_all_names_exist_and_are_documented():
    assert sorted(mo.__all__) == sorted(set(mo.__all__))
    for name in mo.__all__:
        value = getattr(mo, name)
        if not name.startswith("__"):
            assert value.__doc__, name
        if isinstance(value, type):
            assert value.__module__.startswith("moesaic") and "_core" not in value.__module__, name
            for member, attribute in vars(value).items():
                if not member.startswith("_"):
                    assert attribute.__doc__, f"{name}.{member}"


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", mo.__version__)
    assert mo.build_info()["version"] in mo.__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a build folder
        assert mo.__version__ == importlib.metadata.version("moesaic")


def stub_functions():
    """Names of the parameters, with '*' before keyword-only ones, by qualified name."""

    def names(function):
        arguments = function.args
        positional = [a.arg for a in arguments.posonlyargs + arguments.args if a.arg != "self"]
        star = [f"*{arguments.vararg.arg}"] if arguments.vararg else []
        only = ["*"] if arguments.kwonlyargs and not star else []
        double = ["**kwargs"] if arguments.kwarg else []  # pybind11 calls them so
        return positional + star + only + [a.arg for a in arguments.kwonlyargs] + double

    found = {}
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = names(node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                property_like = isinstance(member, ast.FunctionDef) and any(
                    isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list
                )
                no_constructor = isinstance(member, ast.FunctionDef) and member.args.vararg
                if isinstance(member, ast.FunctionDef) and not (property_like or no_constructor):
                    found[f"{node.name}.{member.name}"] = names(member)
    return found


FROM_ABC = {"__eq__", "__iter__", "__contains__", "__len__", "__buffer__", "__release_buffer__"}


def strip_brackets(text):
    """Drops nested (), [], {} and quoted parts, so that commas separate parameters only."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    while True:
        shorter = re.sub(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}", "", text)
        if shorter == text:
            return text
        text = shorter


def is_protocol(name):
    """Whether it is a method that Python calls, positional only, with a signature of its own."""
    member = name.rpartition(".")[2]
    return member in FROM_ABC or member in ("__enter__", "__exit__", "__getitem__")


@pytest.mark.parametrize("name", [n for n in sorted(stub_functions()) if not is_protocol(n)])
def test_signature_matches_the_stub(name):
    owner, _, member = name.rpartition(".")
    target = getattr(_core, owner) if owner else _core
    doc = getattr(target, member or name).__doc__.splitlines()[0]
    inside = doc[doc.index("(") + 1 : doc.rindex(") ->")]
    got = PARAMETER.findall(strip_brackets(inside))
    assert [g for g in got if g != "self"] == stub_functions()[name]


def test_repr_of_objects(layer):
    for value in (layer, layer.stack, layer.config, layer.config.router, layer.report,
                  mo.Workspace(64), mo.Tuning(), mo.backends()[0], mo.Profile()):  # fmt: skip
        assert repr(value).startswith("moesaic.")


def test_backends():
    names = [b.name for b in mo.backends()]
    assert names[0] == "cpu" and len(set(names)) == len(names)
    for backend in mo.backends():
        assert backend.available or backend.reason
    assert "cpu" in mo.backends()[0].devices

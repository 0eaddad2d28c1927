"""A griffe extension that makes more of what stubs and docstrings say.

An overloaded function of a stub is a member like any other: griffe keeps overloads apart, to be
joined with an implementation, a stub has none, and without this `MoeLayer.__call__` would be
missing. And examples in docstrings, which begin with `>>>`, are code wherever they stand.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Module, Object

EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *\n).*)*", flags=re.M)


class Stubs(Extension):
    """Works on everything that griffe collects."""

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        add_overloaded(cls)

    def on_module_members(self, *, mod: Module, **kwargs: Any) -> None:
        add_overloaded(mod)

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        fence_examples(obj)


def add_overloaded(parent: Class | Module) -> None:
    for name, overloads in parent.overloads.items():
        if name in parent.members or not overloads:
            continue
        first = overloads[0]
        function = Function(
            name,
            parameters=first.parameters,
            returns=first.returns,
            lineno=first.lineno,
            endlineno=overloads[-1].endlineno,
        )
        # One of the overloads has the docstring, whichever the type checker wants.
        function.docstring = next((o.docstring for o in overloads if o.docstring), None)
        function.overloads = list(overloads)
        parent.set_member(name, function)
        fence_examples(function)


def fence_examples(obj: Object) -> None:
    docstring = obj.docstring
    if docstring is not None and "```" not in docstring.value:
        docstring.value = EXAMPLE.sub(fenced, docstring.value)


def fenced(match: re.Match[str]) -> str:
    indent = match["indent"]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"

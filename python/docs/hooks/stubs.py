"""A griffe extension: what stubs and docstrings say, as a reader of the reference needs it.

An overloaded function of a stub is a member like any other: griffe keeps overloads apart, to be
joined with an implementation, a stub has none, and without this `MoeLayer.__call__` would be
missing. Aliases that a stub keeps to itself (`_Precision`) are spelled out, except those of arrays,
which stand for more than a reader wants to see each time; the first page of the reference says what
they mean. Classes that only functions make show no constructor. And examples in docstrings (`>>>`)
are code wherever they stand.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from griffe import Attribute, Class, Expr, ExprName, Extension, Function, Module, Object

ARRAYS = {"_AnyArray": "AnyArray", "_A": "A"}
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?! *\n).*)*", flags=re.M)


class Stubs(Extension):
    """Works on everything that griffe collects."""

    def on_class_members(self, *, cls: Class, **kwargs: Any) -> None:
        add_overloaded(cls)
        constructor = cls.members.get("__init__")
        if isinstance(constructor, Function) and refuses(constructor):
            cls.del_member("__init__")

    def on_module_members(self, *, mod: Module, **kwargs: Any) -> None:
        add_overloaded(mod)
        spell_out(mod, private_aliases(mod))

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        fence_examples(obj)


def refuses(constructor: Function) -> bool:
    """Return whether no argument is good enough: `__init__(self, *args: Never, ...)`."""
    return any(str(parameter.annotation) == "Never" for parameter in constructor.parameters)


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
        fence_examples(function)
        put_in_order(parent, name, function)


def put_in_order(parent: Class | Module, name: str, function: Function) -> None:
    """Make it a member before those that stand after it; pages show members in this order."""
    line = function.lineno or 0
    later = [
        (other, member)
        for other, member in parent.members.items()
        if not member.is_alias and (member.lineno or 0) > line
    ]
    for other, _ in later:
        parent.members.pop(other)
    parent.set_member(name, function)
    parent.members.update(later)


def private_aliases(module: Module) -> dict[str, Expr]:
    """Return what names such as `_Layout: TypeAlias = ...` of a module stand for."""
    return {
        name: member.value
        for name, member in module.members.items()
        if name.startswith("_")
        and isinstance(member, Attribute)
        and str(member.annotation) == "TypeAlias"
        and isinstance(member.value, Expr)
    }


def spell_out(parent: Module | Class, aliases: dict[str, Expr]) -> None:
    """Put aliases in place of their names, in every signature of a module or class."""
    overloaded = [o for overloads in parent.overloads.values() for o in overloads]
    for member in [*parent.members.values(), *overloaded]:
        if isinstance(member, Class):
            spell_out(member, aliases)
        elif isinstance(member, Function):
            for function in [member, *(member.overloads or [])]:
                function.returns = expanded(function.returns, aliases)
                for parameter in function.parameters:
                    parameter.annotation = expanded(parameter.annotation, aliases)
        elif isinstance(member, Attribute):
            member.annotation = expanded(member.annotation, aliases)


def expanded(part: Any, aliases: dict[str, Expr]) -> Any:
    if isinstance(part, ExprName) and part.name in ARRAYS:
        return ExprName(ARRAYS[part.name], parent=part.parent)
    if isinstance(part, ExprName):
        return expanded(aliases[part.name], aliases) if part.name in aliases else part
    if isinstance(part, list):
        return [expanded(item, aliases) for item in part]
    if isinstance(part, Expr) and dataclasses.is_dataclass(part):
        # `parent` leads back to the module; the rest are the parts of the expression.
        names = [field.name for field in dataclasses.fields(part) if field.name != "parent"]
        return dataclasses.replace(part, **{n: expanded(getattr(part, n), aliases) for n in names})
    return part


def fence_examples(obj: Object) -> None:
    docstring = obj.docstring
    if docstring is not None and "```" not in docstring.value:
        docstring.value = EXAMPLE.sub(fenced, docstring.value)


def fenced(match: re.Match[str]) -> str:
    indent = match["indent"]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"

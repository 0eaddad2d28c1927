"""Write the table of signatures and docstrings that the compiled module shows.

The stub moesaic/_core.pyi is the only place where they are written. Editors and type checkers
read it as it is; this script, run by CMake, turns it into docs_table.cpp, from which docs.cpp gives
every function, method and property of the module its ``__doc__`` and ``__text_signature__``.

The texts have the form that CPython knows for builtins: ``name(a, b=1)``, a line ``--``, an empty
line, the docstring. It has no room for annotations, so types stand in the docstrings.

Needs the standard library only, since a wheel is built in an environment without anything else.

Usage: generate_docs.py _core.pyi docs_table.cpp
"""

import ast
import sys
from pathlib import Path


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """Every named parameter, in order."""
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs]


def text_of(node: ast.expr) -> str:
    """A default as it is shown. Raises SyntaxError for one that inspect.signature cannot read."""
    try:
        ast.literal_eval(node)
    except ValueError:
        raise SyntaxError(f"line {node.lineno}: a default must be a literal") from None
    return ast.unparse(node)


def signature(function: ast.FunctionDef, skip_self: bool = False) -> str:
    """``(self, x, *, out=None)``: the parameters without their types."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    parts = []
    for i, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        if not (skip_self and i == 0):
            parts.append(arg.arg if default is None else f"{arg.arg}={text_of(default)}")
        if a.posonlyargs and i == len(a.posonlyargs) - 1 and parts:
            parts.append("/")
    if a.vararg is not None:
        parts.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        parts.append("*")
    for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        parts.append(arg.arg if default is None else f"{arg.arg}={text_of(default)}")
    if a.kwarg is not None:
        parts.append(f"**{a.kwarg.arg}")
    return f"({', '.join(parts)})"


def is_decorated(function: ast.FunctionDef, name: str) -> bool:
    """Whether ``@name`` stands above it."""
    return any(isinstance(d, ast.Name) and d.id == name for d in function.decorator_list)


def raises_on_call(init: ast.FunctionDef) -> bool:
    """Whether nobody can call it: its arguments are ``Never``."""
    vararg = init.args.vararg
    return vararg is not None and ast.unparse(vararg.annotation or vararg) == "Never"


def first_of_overloads(functions: list[ast.FunctionDef]) -> list[ast.FunctionDef]:
    """One function per name. The first overload names every parameter with its default."""
    first: dict[str, ast.FunctionDef] = {}
    for function in functions:
        known = first.setdefault(function.name, function)
        here, there = ([p.arg for p in parameters(f)] for f in (function, known))
        if here != there:
            raise SyntaxError(f"line {function.lineno}: overloads of {function.name} differ")
    return list(first.values())


def functions_in(body: list[ast.stmt]) -> list[ast.FunctionDef]:
    return first_of_overloads([node for node in body if isinstance(node, ast.FunctionDef)])


def function_text(function: ast.FunctionDef) -> str:
    return f"{function.name}{signature(function)}\n--\n\n{ast.get_docstring(function) or ''}"


def class_texts(node: ast.ClassDef) -> dict[str, str]:
    texts = {node.name: ast.get_docstring(node) or ""}
    for function in functions_in(node.body):
        name = f"{node.name}.{function.name}"
        if is_decorated(function, "property"):
            texts[name] = ast.get_docstring(function) or ""
            continue
        if function.name == "__init__":
            if raises_on_call(function):
                continue
            head = f"{node.name}{signature(function, skip_self=True)}\n--\n\n"
            texts[node.name] = head + texts[node.name]
        texts[name] = function_text(function)
    return texts


def texts_of(stub: str) -> dict[str, str]:
    """The text of everything in the stub, by qualified name; "" is the module's own."""
    tree = ast.parse(stub)
    texts = {"": ast.get_docstring(tree) or ""}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            texts |= class_texts(node)
    return texts | {f.name: function_text(f) for f in functions_in(tree.body)}


def literal(text: str) -> str:
    """A C++ string literal, a line of source per line of text."""
    lines = text.replace("\\", "\\\\").replace('"', '\\"').split("\n")
    ends = ["\\n"] * (len(lines) - 1) + [""]
    return "\n     ".join(f'"{line}{end}"' for line, end in zip(lines, ends, strict=True))


def table(texts: dict[str, str]) -> str:
    rows = "\n".join(f'    {{"{name}",\n     {literal(text)}}},' for name, text in texts.items())
    return f"""// Written by generate_docs.py from _core.pyi. Do not edit.
#include "docs.hpp"

namespace moesaic::python {{

const Doc kDocs[] = {{
{rows}
}};
const std::size_t kNumDocs = std::size(kDocs);

}}  // namespace moesaic::python
"""


def main(stub: str, target: str) -> None:
    text = table(texts_of(Path(stub).read_text(encoding="utf-8")))
    Path(target).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

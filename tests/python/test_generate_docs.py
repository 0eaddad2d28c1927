"""The script that turns the stub into the table of docstrings, on small stubs."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "python" / "bindings" / "generate_docs.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("generate_docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("declared", "shown"),
    [
        ("def f() -> int: ...", "f()"),
        ("def f(a: int, b: str = 'x') -> int: ...", "f(a, b='x')"),
        ("def f(a: int, /, b: float = 1e-6) -> int: ...", "f(a, /, b=1e-06)"),
        ("def f(a: int, *, b: None = None) -> int: ...", "f(a, *, b=None)"),
        ("def f(*a: int, b: int = -1, **c: int) -> int: ...", "f(*a, b=-1, **c)"),
    ],
)
def test_functions_are_shown_without_types(script, declared, shown):
    assert script.texts_of(declared)["f"] == f"{shown}\n--\n\n"


def test_classes_take_the_signature_of_their_constructor(script):
    texts = script.texts_of(
        "class A:\n"
        '    """What A is."""\n'
        "    def __init__(self, x: int = 1) -> None: ...\n"
        "    @property\n"
        "    def y(self) -> int:\n"
        '        """What y is."""\n'
        "class B:\n"
        '    """What B is."""\n'
        "    def __init__(self, *args: Never, **kwargs: Never) -> None: ...\n"
        "class _C: ...\n"
    )
    assert texts["A"] == "A(x=1)\n--\n\nWhat A is."
    assert texts["A.__init__"] == "__init__(self, x=1)\n--\n\n"
    assert texts["A.y"] == "What y is."
    assert texts["B"] == "What B is." and "B.__init__" not in texts
    assert "_C" not in texts


def test_overloads_show_the_first(script):
    texts = script.texts_of(
        "@overload\ndef f(a: int = 0) -> int:\n"
        '    """What f does."""\n'
        "@overload\ndef f(a: str) -> str: ...\n"
    )
    assert texts["f"] == "f(a=0)\n--\n\nWhat f does."


@pytest.mark.parametrize(
    "stub",
    [
        "def f(a: int = other) -> int: ...",
        "@overload\ndef f(a: int) -> int: ...\n@overload\ndef f(b: str) -> str: ...",
    ],
)
def test_what_cannot_be_shown_is_an_error(script, stub):
    with pytest.raises(SyntaxError, match="line"):
        script.texts_of(stub)


def test_table_escapes_what_cpp_would_read(script):
    table = script.table({"f": 'a "b" \\ c\n\nd'})
    assert '{"f",\n     "a \\"b\\" \\\\ c\\n"\n     "\\n"\n     "d"},' in table

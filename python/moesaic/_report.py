"""What the library says of itself, as values that print well, in a terminal and in a notebook."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moesaic import _core
from moesaic._arguments import checked
from moesaic._tables import pairs, table

#: Text of a cell beyond this is cut in notebooks: arrays and lists of kernels are long.
_MOST = 200
_KNOB = ("knob", "value", "source", "variable", "help")


def _cell(value: Any) -> str:
    from html import escape  # notebooks alone need it

    text = str(value)
    return escape(text if len(text) <= _MOST else text[: _MOST - 4] + " ...")


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Return a table as HTML; all text is escaped."""
    head = "".join(f"<th>{_cell(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    above = f"<caption>{_cell(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_of_fields(label: str, fields: Mapping[str, Any]) -> str:
    """Return the fields of a value class; lists of other values follow as tables of their own."""
    lists = {
        name: rows
        for name, rows in fields.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    }
    single = [(name, value) for name, value in fields.items() if name not in lists]
    parts = [html_table(("field", "value"), single, label)] if single else []
    parts += [
        html_table(list(rows[0]), [list(row.values()) for row in rows], f"{label}.{name}")
        for name, rows in lists.items()
    ]
    return "".join(parts)


def html_of_profile(profile: _core.Profile) -> str:
    """Return the time by zone, and the counters that counted something."""
    zones = profile.zones
    whole = sum(total.seconds for total in zones.values()) or 1.0
    times = [
        (name, total.calls, f"{1e3 * total.seconds:.3f}", f"{total.seconds / whole:.1%}")
        for name, total in zones.items()
    ]
    counters = [(name, count) for name, count in profile.counters.items() if count]
    return html_table(("zone", "calls", "ms", "share"), times, "Profile") + html_table(
        ("counter", "count"), counters
    )


class Facts(dict[str, str]):
    """Names and values in order, a ``dict``; ``str`` gives one aligned line each."""

    def __str__(self) -> str:
        return pairs([(name, str(value)) for name, value in self.items()])

    def _repr_html_(self) -> str:
        return html_table(("fact", "value"), self.items())


class ConfigTable(list[_core.ConfigEntry]):
    """The knobs as a ``list`` of ``ConfigEntry``; ``str`` gives an aligned table."""

    def _rows(self) -> list[tuple[str, ...]]:
        return [(e.knob, e.value, e.source, e.variable, e.help) for e in self]

    def __str__(self) -> str:
        return table(_KNOB, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_KNOB, self._rows())


class Table(list[dict[str, str]]):
    """Rows with the same names, a ``list`` of ``dict``; ``str`` gives an aligned table."""

    def _header(self) -> list[str]:
        return list(self[0]) if self else []

    def __str__(self) -> str:
        return table(self._header(), [[str(v) for v in row.values()] for row in self])

    def _repr_html_(self) -> str:
        return html_table(self._header(), [list(row.values()) for row in self])


@checked
def show_config() -> ConfigTable:
    """Return every knob with its value in effect and where that came from.

    Returns
    -------
    ConfigTable
        A list of ``ConfigEntry`` that prints as a table.

    Raises
    ------
    ConfigError
        The environment has a bad value.

    Examples
    --------
    >>> import moesaic as mo
    >>> with mo.tuning(block_size=32):
    ...     [(e.value, e.source) for e in mo.show_config() if e.knob == "block_size"]
    [('32', 'tuning')]
    """
    return ConfigTable(_core.show_config())


def architecture_table() -> Table:
    """Return the presets in words, a dict per architecture.

    Returns
    -------
    Table
        A list of dict that prints as a table. Keys: architecture, source (where the facts were
        read), model_types, score, selection, renormalize, scale, activation, shared, notes, and
        missing (the part that keeps its layers from opening, or ''). The value 'key' marks what
        the metadata of a file decides.

    Examples
    --------
    >>> import moesaic as mo
    >>> {row["architecture"]: row["score"] for row in mo.architecture_table()}["qwen3moe"]
    'softmax'
    """
    return Table(_core.architecture_table())


@checked
def explain(layer: _core.MoeLayer | _core.QuantMatrix, num_tokens: int = 8) -> Facts:
    """Return what a call would do under the current tuning, and why.

    Parameters
    ----------
    layer : MoeLayer or QuantMatrix
        The layer or the matrix that would be called.
    num_tokens : int
        T of the call, the rows of x.

    Returns
    -------
    Facts
        Path, precision, block size, kernels, bytes and reasons, by name; it prints as lines.

    Raises
    ------
    DeviceError
        The layer is closed.
    ShapeError
        More tokens than a call can have.

    Examples
    --------
    >>> import moesaic as mo
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> with mo.GgufFile("model.gguf") as f, mo.MoeLayer.from_gguf(f, 0) as layer:
    ...     mo.explain(layer, num_tokens=1)["path"]
    'gemv'
    """
    if isinstance(layer, _core.QuantMatrix):
        return Facts(_core.explain_matrix(layer, num_tokens))
    return Facts(_core.explain(layer, num_tokens))

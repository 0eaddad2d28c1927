"""What the library says of itself, as values that print well."""

from moesaic import _core
from moesaic._arguments import checked


class Facts(dict[str, str]):
    """Names and values in order, a ``dict``; ``str`` gives one aligned line each."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())


class ConfigTable(list[_core.ConfigEntry]):
    """The knobs as a ``list`` of ``ConfigEntry``; ``str`` gives an aligned table."""

    def __str__(self) -> str:
        rows = [(e.knob, e.value, e.source, e.variable, e.help) for e in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else []
        lines = []
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]))
        return "\n".join(lines)


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


@checked
def explain(layer: _core.MoeLayer, num_tokens: int = 8) -> Facts:
    """Return what a call would do under the current tuning, and why.

    Parameters
    ----------
    layer : MoeLayer
        The layer that would be called.
    num_tokens : int
        T of the call.

    Returns
    -------
    Facts
        Path, precision, block size, kernels, bytes and reasons, by name; it prints as lines.

    Raises
    ------
    DeviceError
        The layer is closed.

    Examples
    --------
    >>> import moesaic as mo
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> with mo.GgufFile("model.gguf") as f, mo.MoeLayer.from_gguf(f, 0) as layer:
    ...     mo.explain(layer, num_tokens=1)["path"]
    'gemv'
    """
    return Facts(_core.explain(layer, num_tokens))

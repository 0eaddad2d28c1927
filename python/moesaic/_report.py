"""What the library says of itself, as values that print well."""

from moesaic import _core


class Facts(dict[str, str]):
    """Ordered names and values; ``str`` gives one aligned line each."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())


class ConfigTable(list[_core.ConfigEntry]):
    """The knobs; ``str`` gives an aligned table."""

    def __str__(self) -> str:
        rows = [(e.knob, e.value, e.source, e.variable, e.help) for e in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else []
        lines = []
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[4]]))
        return "\n".join(lines)


def show_config() -> ConfigTable:
    """Every knob with its effective value and where that came from.

    >>> import moesaic as mo
    >>> with mo.tuning(block_size=32):
    ...     [(e.value, e.source) for e in mo.show_config() if e.knob == "block_size"]
    [('32', 'tuning')]
    """
    return ConfigTable(_core.show_config())


def explain(layer: _core.MoeLayer, num_tokens: int = 8) -> Facts:
    """What a call of ``layer`` with ``num_tokens`` tokens would do under the current tuning:
    path, precision, block size, kernels, bytes, and why.

    Raises DeviceError for a closed layer.
    """
    return Facts(_core.explain(layer, num_tokens))

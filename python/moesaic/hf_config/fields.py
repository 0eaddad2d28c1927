"""The fields of a configuration, checked for their types."""

from collections.abc import Mapping
from typing import Any, cast

from moesaic import _core
from moesaic.hf_config.families import REQUIRED, Key

OPERATION = "MoeConfig.from_hf"
_MAX_SIZE = (1 << 31) - 1


def wrong(where: str, expected: str, got: object) -> _core.FormatError:
    return _core.FormatError(f"{OPERATION}: {where}: expected {expected}, got {got}")


def unsupported(where: str, expected: str, got: object) -> _core.UnsupportedError:
    return _core.UnsupportedError(f"{OPERATION}: {where}: expected {expected}, got {got}")


class Fields:
    """The fields of one configuration for one layer, checked for their types."""

    def __init__(self, fields: Mapping[str, Any], layer: int) -> None:
        self.fields, self.layer = fields, layer

    def value(self, field: Key) -> Any:
        """The first that is there and not null, of the layer where it is a list; or the default.

        Raises FormatError when a required one is missing.
        """
        for name in field.names:
            value = self.fields.get(name)
            if isinstance(value, list):
                if not self.layer < len(value):
                    raise wrong(name, f"a value for layer {self.layer}", f"{len(value)} values")
                value = value[self.layer]
            if value is not None:
                return value
        if field.default is REQUIRED:
            raise wrong(" or ".join(field.names), "a value", "none")
        return field.default

    def size(self, field: Key, least: int = 1) -> int:
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_SIZE:
            raise wrong(field.names[0], f"a number of at least {least}", repr(value))
        return value

    def number(self, field: Key) -> float:
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(field.names[0], "a number", repr(value))
        return float(value)

    def flag(self, field: Key) -> bool:
        value = self.value(field)
        if not isinstance(value, bool):
            raise wrong(field.names[0], "true or false", repr(value))
        return value

    def text(self, field: Key) -> str:
        value = self.value(field)
        if not isinstance(value, str):
            raise wrong(field.names[0], "a name", repr(value))
        return value

    def texts(self, name: str) -> list[str] | None:
        """A list of names, or None."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise wrong(name, "a list of names", repr(value)[:80])
        return value

    def sizes(self, name: str) -> list[int]:
        value = self.fields.get(name) or []
        good = isinstance(value, list) and all(type(one) is int for one in value)
        if not good:
            raise wrong(name, "a list of layers", repr(value)[:80])
        return cast(list[int], value)

"""The fields of a configuration, checked for their types."""

from collections.abc import Mapping
from typing import Any, cast

from moesaic import _core
from moesaic._errors import error_of
from moesaic._files import shown
from moesaic.hf_config.defaults import defaults_of
from moesaic.hf_config.families import REQUIRED, Key

OPERATION = "MoeConfig.from_hf"
MAX_SIZE = (1 << 31) - 1
_MAX_NUMBER = 3.4e38


def wrong(where: str, expected: str, got: object) -> _core.FormatError:
    return error_of(_core.FormatError, OPERATION, where, expected, str(got))


def unsupported(where: str, expected: str, got: object, hint: str = "") -> _core.UnsupportedError:
    return error_of(_core.UnsupportedError, OPERATION, where, expected, str(got), hint)


class Fields:
    """The fields of one configuration for one layer, checked for their types."""

    def __init__(self, fields: Mapping[str, Any], layer: int) -> None:
        self.fields, self.layer = fields, layer
        self.defaults = defaults_of(fields.get("model_type"))

    def value(self, field: Key) -> Any:
        """The value that is there, of the layer where it is a list; or what its absence means.

        Raises FormatError where absence or null has no meaning for this model type, and where two
        names of the field disagree.
        """
        found, there = REQUIRED, None
        for name in field.names:
            value = self._of_layer(name)
            if value is None:
                continue
            if there is not None and (value != found or type(value) is not type(found)):
                raise wrong(name, f"{shown(found)} as {there} says", shown(value))
            found, there = value, name
        if there is not None:
            return found
        # Null is the absence of a value, but where it is a value itself or means nothing.
        is_null = any(name in self.fields for name in field.names)
        meaning = field.null if is_null else self._default(field)
        if meaning is REQUIRED:
            raise wrong(" or ".join(field.names), "a value", "null" if is_null else "none")
        return meaning

    def _of_layer(self, name: str) -> Any:
        value = self.fields.get(name)
        if not isinstance(value, list | tuple):
            return value
        if not 0 <= self.layer < len(value):
            raise wrong(name, f"a value for layer {self.layer}", f"{len(value)} values")
        return value[self.layer]

    def _default(self, field: Key) -> Any:
        for name in field.names:
            if name in self.defaults:
                value = self.defaults[name]
                return field.null if value is None else value
        return field.default

    def size(self, field: Key, least: int = 1) -> int:
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_SIZE:
            raise wrong(field.names[0], f"a number of at least {least}", shown(value))
        return value

    def size_of_model(self, field: Key, least: int = 1) -> int:
        """A size that is not one of a layer, so that a list of one by layer means nothing."""
        for name in field.names:
            if isinstance(self.fields.get(name), list | tuple):
                raise wrong(name, "one number", shown(self.fields[name]))
        return self.size(field, least)

    def number(self, field: Key) -> float:
        """A finite number that f32 holds, as everything that computes with it is f32."""
        value = self.value(field)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not abs(value) <= _MAX_NUMBER:
            raise wrong(field.names[0], "a finite number", shown(value))
        return float(value)

    def flag(self, field: Key) -> bool:
        value = self.value(field)
        if not isinstance(value, bool):
            raise wrong(field.names[0], "true or false", shown(value))
        return value

    def text(self, field: Key) -> str:
        value = self.value(field)
        if not isinstance(value, str):
            raise wrong(field.names[0], "a name", shown(value))
        return value

    def texts(self, name: str) -> list[str] | None:
        """A list of names, or None."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise wrong(name, "a list of names", shown(value))
        return list(value)

    def sizes(self, name: str) -> list[int]:
        value = self.fields.get(name) or []
        good = isinstance(value, list | tuple) and all(type(one) is int for one in value)
        if not good:
            raise wrong(name, "a list of layers", shown(value))
        return cast(list[int], value)

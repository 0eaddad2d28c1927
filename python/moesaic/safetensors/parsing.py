"""JSON objects of a checkpoint, in which no name stands twice."""

import json
from pathlib import Path
from typing import Any

from moesaic._files import read_text_bytes
from moesaic.safetensors.errors import wrong


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:80]!r} twice")
            seen.add(name)
    return found


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise wrong(where, "a JSON object", error) from None
    if not isinstance(value, dict):
        raise wrong(where, "a JSON object", type(value).__name__)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Raises OSError for what cannot be read, FormatError for what is no JSON object."""
    return parse_json(read_text_bytes(path), str(path))

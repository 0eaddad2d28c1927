"""Which tensors of a checkpoint belong to a layer, where several parts of a model have one.

A checkpoint may hold experts of one number twice: those of the model itself, and those of a part
beside it, which drafts tokens (``mtp``, ``eagle``) or speaks (``talker``).
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from moesaic.safetensors.errors import wrong
from moesaic.safetensors.reader import Checkpoint

_LAYER = re.compile(r"(?P<stem>(?:.*\.)?layers\.(?P<layer>\d+)\.)", re.DOTALL)
_EXPERTS = re.compile(r"(?:\w+\.)?(?:experts\.|input_linear\b|output_linear\b)")
_LONG_NUMBER = re.compile(r"\d{19}")
#: Parts that draft tokens for the model, which are taken only when they are asked for.
_DRAFTS = "mtp"
#: Of the number of a layer; none of a model has more.
_DIGITS = 6


def of_layer(checkpoint: Checkpoint, layer: int, prefix: str | None = None) -> Checkpoint:
    """``checkpoint`` with the tensors of one layer alone.

    ``prefix`` says of which part of the model: the beginning of its names, or what stands between
    dots in them. Raises FormatError where it does not tell, and for numbers that no model has.
    """
    stems: dict[str, list[str]] = defaultdict(list)
    with_experts: dict[str, None] = {}  # in the order of the file
    text = f"layers.{layer}."
    # Few of a large model's names are of one layer, and only those are looked at.
    for name in [name for name in checkpoint.tensors if text in name]:
        found = _LAYER.match(name)
        if found is None or found["layer"] != str(layer):
            continue
        if _LONG_NUMBER.search(name, found.end()):
            raise wrong(f"tensor {name[:80]!r}", "numbers of 64 bits", "more")
        stems[found["stem"]].append(name)
        if _EXPERTS.match(name, found.end()):
            with_experts[found["stem"]] = None
    chosen = _choose(list(with_experts), layer, prefix)
    return checkpoint.only([name for stem in chosen for name in stems[stem]])


def layers_with_experts(checkpoint: Checkpoint, prefix: str | None = None) -> list[int]:
    """The numbers of the layers that have experts in a part of the model, ascending.

    ``prefix`` is as in ``of_layer``; None: of the model itself. Raises FormatError for a part that
    has none.
    """
    stems: dict[int, dict[str, None]] = defaultdict(dict)
    for name in checkpoint.tensors:
        layer = _LAYER.match(name)
        if layer is None or len(layer["layer"]) > _DIGITS or not _EXPERTS.match(name, layer.end()):
            continue
        stems[int(layer["layer"])][layer["stem"]] = None
    found = sorted(layer for layer, some in stems.items() if _of_part(some, prefix))
    if prefix is not None and not found:
        there = sorted(stem for some in stems.values() for stem in some)
        raise wrong(
            "layers", f"experts under {prefix!r}", ", ".join(there[:8]) or "none",
            "prefix= says of which part",
        )  # fmt: skip
    return found


def _of_part(stems: Iterable[str], prefix: str | None) -> list[str]:
    """Those of a part of the model: whose names begin with it, else have it between dots."""
    stems = list(stems)
    if prefix is None:
        return [stem for stem in stems if _DRAFTS not in stem.split(".")]
    part = prefix.rstrip(".") + "."
    chosen = [stem for stem in stems if stem.startswith(part)]
    return chosen or [stem for stem in stems if f".{part}" in stem]


def _choose(stems: list[str], layer: int, prefix: str | None) -> list[str]:
    chosen = _of_part(stems, prefix)
    if stems and not chosen:
        raise wrong(
            f"layer {layer}", f"experts under {prefix!r}" if prefix else "experts of the model",
            ", ".join(stems), "prefix= says of which part",
        )  # fmt: skip
    if len(chosen) > 1:
        raise wrong(
            f"layer {layer}", "one set of experts", ", ".join(sorted(chosen)[:8]),
            "prefix= says which",
        )  # fmt: skip
    return chosen

"""The tensors of a layer beside its experts, from the arguments of MoeLayer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesaic import _core
from moesaic.saving import names
from moesaic.saving.tensors import Array


def small_tensors(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Array]:
    """Names behind ``blk.N.`` and values, f32 but for the table of experts by token."""
    config: _core.MoeConfig = arguments["config"]
    found: dict[str, Any] = {
        names.ROUTER: arguments["router_weight"],
        names.ROUTER_BIAS: config.router.router_bias or None,
        names.SELECTION_BIAS: config.router.selection_bias or None,
        names.SHARED_ROUTER: arguments.get("shared_gate"),
        names.LATENT_NORM: arguments.get("latent_norm"),
        names.input_norm(architecture): arguments.get("input_norm"),
        names.ROUTER_NORM: _stored_router_norm(arguments.get("router_norm")),
    }
    for stem, matrix in zip(
        names.latent(architecture), arguments.get("latent") or (None, None), strict=True
    ):
        found[f"{stem}.weight"] = matrix
    tensors = {
        name: np.ascontiguousarray(values, np.float32)
        for name, values in found.items()
        if values is not None
    }
    table = arguments.get("token_experts")
    if table is not None:
        tensors[names.TOKEN_EXPERTS] = np.ascontiguousarray(table, np.int32)
    return tensors


def _stored_router_norm(weight: Array | None) -> Array | None:
    """The weight that Gemma 4 stores: a reader multiplies it by 1/sqrt(H).

    The nearest number whose product is the weight, which a quotient alone can miss by a bit.
    """
    if weight is None:
        return None
    wanted = np.asarray(weight, np.float32)
    factor = np.float32(1) / np.sqrt(np.float32(wanted.size))
    stored = wanted / factor
    for direction in (-np.inf, np.inf):
        other = np.nextafter(stored, np.float32(direction), dtype=np.float32)
        better = np.abs(other * factor - wanted) < np.abs(stored * factor - wanted)
        stored = np.where(better, other, stored)
    return np.asarray(stored, np.float32)

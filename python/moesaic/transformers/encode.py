"""Experts that came from files, in other types."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesaic import _core


def encoded_as(
    stack: _core.ExpertStack, gate_up: str | None, down: str | None
) -> _core.ExpertStack:
    """The stack with its roles in these types; None: as it is.

    Experts are decoded one after another, so that little more memory is needed than for the result.
    """
    kinds = {"gate": gate_up, "up": gate_up, "down": down}
    wanted = {
        role: kind
        for role, kind in kinds.items()
        if kind is not None and role in stack.quants and kind != stack.quants[role]
    }
    if not wanted:
        return stack
    roles: dict[str, Any] = {"gate": None}
    for role, kept in stack.quants.items():
        if role in wanted:
            roles[role] = _encoded(stack, role, wanted[role]), wanted[role]
        else:
            roles[role] = stack.encoded(role), kept
    # What is decoded has its scale in it.
    scales = {role: values for role, values in stack.scales.items() if role not in wanted}
    return _core.ExpertStack.from_encoded(
        roles["gate"], roles["up"], roles["down"], biases=stack.biases, scales=scales
    )


def _encoded(stack: _core.ExpertStack, role: Any, kind: str) -> Any:
    """uint8 [E, rows, bytes of a row]."""
    first = _core.quantize(stack.dequantize(role, 0), kind)
    data = np.empty((stack.num_experts, *first.shape), np.uint8)
    data[0] = first
    for expert in range(1, stack.num_experts):
        data[expert] = _core.quantize(stack.dequantize(role, expert), kind)
    return data

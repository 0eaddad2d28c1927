"""The experts of a layer as tensors of a file."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic.saving import names
from moesaic.saving.tensors import Array, Tensor, of_array

#: The name behind ``blk.N.`` of a role's tensor of a kind: weight, bias or scale.
Name = Callable[[str, str], str]
#: Types that GGUF lacks: which checkpoints have them, and a type of GGUF of about their size.
_KEPT_ELSEWHERE = {"INT4": ("GPTQ", "Q4_K"), "E4M3": ("FP8", "Q8_0")}


def check_no_deltas(operation: str, where: str, stack: _core.ExpertStack) -> None:
    """Raises UnsupportedError for low-rank terms, which are no part of the weights."""
    for role in stack.deltas:
        raise error_of(
            _core.UnsupportedError, operation, f"{where}: deltas[{role!r}]",
            "none, which no such file has", "one", "ExpertStack.bake puts it into the weights",
        )  # fmt: skip


def _shape(stack: _core.ExpertStack, role: str) -> tuple[int, int]:
    hidden, intermediate = stack.hidden_size, stack.intermediate_size
    return (hidden, intermediate) if role == "down" else (intermediate, hidden)


def _reader(stack: _core.ExpertStack, role: Any) -> Callable[[int], Array]:
    return lambda _: stack.encoded(role)


def _check(operation: str, where: str, stack: _core.ExpertStack) -> None:
    check_no_deltas(operation, where, stack)
    for role, type in stack.quants.items():
        kept = _KEPT_ELSEWHERE.get(type)
        if kept is not None:
            raise error_of(
                _core.UnsupportedError, operation, f"{where}: {role}",
                "a type that GGUF has", type,
                f"save_safetensors keeps it as {kept[0]}; `moesaic convert` with --experts "
                f"{kept[1]} or such encodes its checkpoint",
            )  # fmt: skip


def routed(operation: str, where: str, stack: _core.ExpertStack, fused: bool) -> list[Tensor]:
    """Weights [E, rows, cols], biases [E, rows] and scales [E], with names behind ``blk.N.``."""
    _check(operation, where, stack)
    tensors = []
    biases: dict[str, Array] = dict(stack.biases.items())
    scales: dict[str, Array] = dict(stack.scales.items())
    if fused:
        tensors += _fused(operation, where, stack, biases, scales)
    for role, type in stack.quants.items():
        if fused and role != "down":
            continue
        shape = (stack.num_experts, *_shape(stack, role))
        tensors.append(Tensor(names.experts(role), type, shape, _reader(stack, role)))
    tensors += [of_array(names.experts(part, "bias"), bias) for part, bias in biases.items()]
    tensors += [of_array(names.experts(part, "scale"), scale) for part, scale in scales.items()]
    return tensors


def _fused(
    operation: str,
    where: str,
    stack: _core.ExpertStack,
    biases: dict[str, Array],
    scales: dict[str, Array],
) -> list[Tensor]:
    """Gate and up rows of each expert one behind the other; changes the names of what goes along.

    One scale of both is named after up, as llama.cpp's files have it.
    """
    types = [stack.quants.get(role, "none") for role in ("gate", "up")]
    if types[0] != types[1]:
        what, got = f"{where}: fused", f"{types[0]} and {types[1]}"
        raise error_of(_core.ConfigError, operation, what, "one type for gate and up", got)
    if "gate" in biases and "up" in biases:
        both = [biases.pop("gate"), biases.pop("up")]
        biases["gate_up"] = np.concatenate(both, axis=1)
    if "up" in scales:
        gate = scales.pop("gate", None)
        if gate is None:
            gate = np.ones_like(scales["up"])
        if not np.array_equal(gate, scales["up"]):
            scales["gate"] = gate
    rows, cols = _shape(stack, "up")

    def read(_: int) -> Array:
        return np.concatenate([stack.encoded("gate"), stack.encoded("up")], axis=1)

    return [Tensor(names.experts("gate_up"), types[0], (stack.num_experts, 2 * rows, cols), read)]


def single(
    operation: str,
    where: str,
    stack: _core.ExpertStack,
    name: Name,
    factors: Mapping[str, float],
) -> list[Tensor]:
    """The matrices of a stack of one expert, [rows, cols], and their scales divided by ``factors``.

    Raises UnsupportedError for a bias, for which no file has a name.
    """
    _check(operation, where, stack)
    for role in stack.biases:
        what, expected = f"{where}: {name(role, 'bias')}", "no bias, which GGUF has no name for"
        raise error_of(_core.UnsupportedError, operation, what, expected, "one")
    tensors = []
    for role, type in stack.quants.items():
        tensors.append(
            Tensor(
                name(role, "weight"), type, _shape(stack, role),
                _reader(stack, role),
            )
        )  # fmt: skip
        scale = stack.scales.get(role, np.ones(1, np.float32)) / np.float32(factors.get(role, 1.0))
        if scale[0] != 1.0:
            tensors.append(of_array(name(role, "scale"), scale.astype(np.float32)))
    return tensors

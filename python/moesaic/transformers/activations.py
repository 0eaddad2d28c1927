"""What an experts module computes between its products, found by trying it on numbers.

Names of activations say too little: a class may clamp, scale or shift in a method of its own. So
the module computes over a grid of gate and up values, and the formula that gives the same is it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import nn

from moesaic import _core
from moesaic.torch.gradients import activate
from moesaic.transformers.layouts import unsupported

#: The formulas, with the parameters that each has.
_GATED = {
    "swiglu": (),
    "geglu_tanh": (),
    "reglu": (),
    "swiglu_oai": ("limit", "alpha"),
    "swiglu_clamp_input": ("limit",),
    "swiglu_clamp_output": ("limit",),
    "situ": ("beta", "linear_beta"),
}
_UNGATED: dict[str, tuple[str, ...]] = {"relu_squared": (), "gelu_tanh": ()}
#: Numbers larger than this bound nothing that a model computes.
_LARGEST = 1e4


def activation_of(module: nn.Module) -> _core.Activation:
    """The activation of an experts module. Raises UnsupportedError where no formula gives it."""
    gated = getattr(module, "has_gate", True)
    numbers = _numbers(module)
    # Reaches past each number, where clamps show.
    far = max([12.0, *(1.5 * n for n in numbers)])
    # The module may be without memory, in a context that makes all tensors so.
    spaced = partial(torch.linspace, dtype=torch.float64, device="cpu")
    line = torch.cat([spaced(-12, 12, 49), spaced(-far, far, 17)])
    gate, up = (one.reshape(-1, 1) for one in torch.meshgrid(line, line, indexing="ij"))
    try:
        got = _computed(module, gate if gated else None, up)
    except Exception as error:
        raise unsupported(module, "the activation", "a function of gate and up", str(error)) from (
            error
        )
    for candidate in _candidates(_GATED if gated else _UNGATED, numbers):
        want = activate(candidate, gate if gated else None, up)
        if torch.allclose(got, want, rtol=1e-6, atol=1e-6):
            return candidate
    name = getattr(module, "act_fn", None)
    raise unsupported(
        module,
        "the activation",
        f"one of {', '.join(_GATED if gated else _UNGATED)}",
        f"another ({type(name).__name__})" if name is not None else "another",
    )


def _computed(module: nn.Module, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """What the module makes of one gate and one up value per row."""
    with torch.no_grad():
        if gate is None:
            out = module.act_fn(up)
        elif hasattr(module, "_apply_gate"):
            # With one value each, concatenated and interleaved halves are the same.
            out = module._apply_gate(torch.cat([gate, up], -1))
        else:
            out = module.act_fn(gate) * up
    if not isinstance(out, torch.Tensor) or out.shape != up.shape:
        raise TypeError("other values than one per row")
    return out.double()


def _numbers(module: nn.Module) -> list[float]:
    """The positive numbers that the module has as attributes: a formula's parameters are there."""
    values = {
        float(value)
        for value in vars(module).values()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return sorted(value for value in values if 0 < value <= _LARGEST)


def _candidates(
    formulas: dict[str, tuple[str, ...]], numbers: list[float]
) -> Iterator[_core.Activation]:
    for kind, names in formulas.items():
        choices = [[*numbers, 0.0] if name == "linear_beta" else numbers for name in names]
        for values in product(*choices):
            yield _core.Activation(kind, **dict(zip(names, values, strict=True)))

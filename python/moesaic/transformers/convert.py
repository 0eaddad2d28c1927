"""The experts of a model in memory, encoded and replaced in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from moesaic import _core
from moesaic._arguments import checked
from moesaic._progress import bar
from moesaic.transformers.activations import activation_of
from moesaic.transformers.layouts import experts_of, unsupported, weights_of
from moesaic.transformers.special import class_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesaic._core import _Progress

_M = TypeVar("_M", bound=nn.Module)


def stack_of(
    module: nn.Module, gate_up: str | None = None, down: str | None = None
) -> _core.ExpertStack:
    """The weights of an experts module as a stack, encoded where a type is given."""
    weights = weights_of(module)
    quant = {"up": gate_up, "down": down}
    if weights.gate is not None:
        quant["gate"] = gate_up
    return _core.ExpertStack.from_dense_stacks(
        weights.gate,
        weights.up,
        weights.down,
        quant={role: kind for role, kind in quant.items() if kind is not None},  # type: ignore[misc]
        biases=weights.biases,  # type: ignore[arg-type]
    )


def _check_memory(module: nn.Module) -> None:
    """Raises UnsupportedError for weights that are elsewhere, or nowhere yet."""
    for name, weight in module.named_parameters():
        if weight.device.type != "cpu":
            raise unsupported(module, name, "weights on the CPU", weight.device.type)


@checked
def convert(
    model: _M,
    gate_up: str | None = None,
    down: str | None = None,
    *,
    progress: _Progress = None,
) -> _M:
    """Put the experts of a model on moesaic, in place.

    Layer by layer the weights are encoded, and those of torch are let go, so that the memory never
    holds more than the model and one layer of encoded experts. Routers, shared experts and all else
    stay as they are.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers on the CPU, with experts in f32, f16 or bf16.
    gate_up : str, optional
        The type that gate and up matrices are encoded in, such as 'Q4_K'. None: as they are.
    down : str, optional
        The type of the down matrices. None: as they are.
    progress : callable or bool, optional
        Called with a ``Progress`` after each layer; may return False to stop, which leaves the
        layers before converted. True shows a tqdm bar.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    UnsupportedError
        No experts, or a class of experts that cannot run here; the message names it. Nothing was
        changed.
    ConfigError, ShapeError
        An unknown type, or one whose blocks do not fit the matrices.
    OperationCancelled
        The progress callback returned False.

    Examples
    --------
    >>> import transformers
    >>> import moesaic.transformers as mt
    >>> config = transformers.Qwen3MoeConfig(
    ...     vocab_size=64, hidden_size=256, moe_intermediate_size=256, num_experts=4,
    ...     num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2,
    ...     num_key_value_heads=2, head_dim=32)
    >>> model = transformers.AutoModelForCausalLM.from_config(config)
    >>> mt.convert(model, gate_up="Q4_K", down="Q6_K").model.layers[0].mlp.experts.stack.quants
    {'gate': 'Q4_K', 'up': 'Q4_K', 'down': 'Q6_K'}
    """
    names = [name for name, _ in experts_of(model, "convert")]
    activations = {}
    for name in names:  # all of them before any is replaced
        module = model.get_submodule(name)
        _check_memory(module)
        weights_of(module)
        activations[name] = activation_of(module)
    sizes = {name: _bytes(model.get_submodule(name)) for name in names}
    report = _reporter(progress, sum(sizes.values()))
    done = 0
    for name in names:
        old = model.get_submodule(name)
        new = class_for(old)(stack_of(old, gate_up, down), activations[name]).train(old.training)
        model.set_submodule(name, new)
        del old  # with it go the weights of torch
        done += sizes[name]
        report(done, name)
    return model


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def _reporter(progress: _Progress, total: int) -> Callable[[int, str], None]:
    """What tells a callback how far it is. Raises OperationCancelled where that says False."""
    callback = bar() if progress is True else (progress or None)

    def report(done: int, what: str) -> None:
        if callback is not None and callback(_core.make_progress(done, total, what)) is False:
            raise _core.make_error(_core.OperationCancelled, "convert", what)

    return report

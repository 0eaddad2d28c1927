"""How far the experts of one stack or layer are from those of another."""

from __future__ import annotations  # numpy.typing and matplotlib cost time that few calls need

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of
from moesaic._plots import check_axes, check_picture, new_figure
from moesaic._report import html_table
from moesaic._tables import table

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    _Errors = npt.NDArray[np.float64]

__all__ = ["Comparison", "compare"]

_Role: TypeAlias = Literal["gate", "up", "down"]
_ROLES: tuple[_Role, ...] = ("gate", "up", "down")
_WORST_EXPERTS = 8  # rows that a printed table has for experts


@dataclass(frozen=True, eq=False)
class Comparison:
    """What ``compare`` found; it prints as a table, also in notebooks.

    Parameters
    ----------
    weights : dict of f64 array [E]
        Relative root mean square error of the matrices, per role and expert.
    outputs : f64 array [T], optional
        Relative L2 error of the outputs, per token. None: there was no x.
    quants : dict of tuple of str
        Element types of the first and the second stack, per role.
    nbytes : tuple of int
        Bytes of the first and the second stack.

    Raises
    ------
    DTypeError
        Parts of another form.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> up = rng.standard_normal((4, 64, 32), np.float32)  # [E, I, H]
    >>> down = rng.standard_normal((4, 32, 64), np.float32)  # [E, H, I]
    >>> exact = mo.ExpertStack.from_dense_stacks(None, up, down)
    >>> rounded = mo.ExpertStack.from_dense_stacks(None, up.astype(np.float16), down)
    >>> found = mo.compare(exact, rounded)
    >>> bool(found.weights["up"].max() < 1e-3), bool(found.weights["down"].max() == 0)
    (True, True)
    """

    weights: dict[str, _Errors]
    outputs: _Errors | None = None
    quants: dict[str, tuple[str, str]] = field(default_factory=dict)
    nbytes: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        arrays = list(self.weights.values()) if isinstance(self.weights, dict) else []
        errors = arrays if self.outputs is None else [*arrays, self.outputs]
        if not arrays or any(not isinstance(e, np.ndarray) or e.ndim != 1 for e in errors):
            raise _wrong("weights, outputs", "arrays of one dimension by role, and one or None")
        if len({len(e) for e in arrays}) > 1 or any(e.dtype.kind != "f" for e in errors):
            raise _wrong("weights, outputs", "floats, one for each expert in every role")
        pairs = (self.nbytes, *(self.quants.values() if isinstance(self.quants, dict) else (None,)))
        if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
            raise _wrong("quants, nbytes", "a pair by role, and a pair")

    def _key(self) -> tuple[object, ...]:
        # Bytes compare and hash as values, which arrays do not.
        arrays = [*self.weights.items(), ("outputs", self.outputs)]
        errors = tuple((name, None if e is None else e.tobytes()) for name, e in arrays)
        return errors, tuple(self.quants.items()), self.nbytes

    def __eq__(self, other: object) -> bool:
        """Return whether all errors, types and sizes are equal."""
        return self._key() == other._key() if isinstance(other, Comparison) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _summary(self) -> list[list[str]]:
        rows = [["", "types", "mean", "max", "worst"]]
        for role, errors in self.weights.items():
            types = " ".join(dict.fromkeys(self.quants.get(role, ())))
            rows.append([role, types, *_mean_and_max(errors, "expert")])
        if self.outputs is not None:
            rows.append(["outputs", "", *_mean_and_max(self.outputs, "token")])
        return rows

    def _experts(self) -> list[list[str]]:
        total = np.sqrt(np.sum([errors**2 for errors in self.weights.values()], axis=0))
        worst = np.argsort(-total, kind="stable")[:_WORST_EXPERTS]
        rows = [["expert", *self.weights]]
        for expert in sorted(worst.tolist()):
            rows.append([str(expert), *(_number(e[expert]) for e in self.weights.values())])
        return rows

    def _note(self) -> str:
        experts = len(next(iter(self.weights.values())))
        if experts <= _WORST_EXPERTS:
            return ""
        return f"the worst {_WORST_EXPERTS} of {experts} experts; to_dict() has all"

    def __str__(self) -> str:
        tables = [table(rows[0], rows[1:]) for rows in (self._summary(), self._experts())]
        return "\n".join([tables[0], "", tables[1], self._note()]).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        note = f"<p>{self._note()}</p>" if self._note() else ""
        tables = (self._summary(), self._experts())
        return "".join(html_table(rows[0], rows[1:]) for rows in tables) + note

    def to_dict(self) -> dict[str, Any]:
        """Return all errors as lists and numbers, for JSON.

        Returns
        -------
        dict
            weights (by role, one number per expert), outputs (one per token, or None), quants and
            nbytes.
        """
        return {
            "weights": {role: errors.tolist() for role, errors in self.weights.items()},
            "outputs": None if self.outputs is None else self.outputs.tolist(),
            "quants": {role: list(types) for role, types in self.quants.items()},
            "nbytes": list(self.nbytes),
        }

    def plot(
        self, path: str | PathLike[str] | None = None, *, ax: Axes | None = None
    ) -> Figure | SubFigure:
        """Draw the errors of the weights by expert, and a histogram of those of the outputs.

        Needs matplotlib, whose backend stays as it is.

        Parameters
        ----------
        path : str or path-like, optional
            A file to write, which is overwritten; its ending says in which format.
        ax : matplotlib.axes.Axes, optional
            Where to draw the errors by expert, and nothing else. None: in a new figure.

        Returns
        -------
        matplotlib.figure.Figure
            The figure of ``ax``, or the new one.

        Raises
        ------
        UnsupportedError
            matplotlib is missing (the extra ``plot``).
        DTypeError
            ``ax`` cannot be drawn on.
        ConfigError
            An ending of ``path`` that matplotlib has no format for.
        OSError
            The file cannot be written.
        """
        check_picture("Comparison.plot", path)
        check_axes("Comparison.plot", ax)
        tokens = None
        if ax is None:
            drawn = new_figure("Comparison.plot", (9, 3.5), "constrained")
            if self.outputs is None:
                ax = drawn.subplots()
            else:
                ax, tokens = drawn.subplots(1, 2)
        for role, errors in self.weights.items():
            ax.plot(np.arange(len(errors)), errors, marker=".", label=role)
        ax.set(xlabel="expert", ylabel="relative RMSE of weights", ylim=(0, None))
        ax.legend()
        if tokens is not None and self.outputs is not None:
            tokens.hist(self.outputs[np.isfinite(self.outputs)], bins=30)
            tokens.set(xlabel="relative L2 of outputs", ylabel="tokens")
        if path is not None:
            # A part of a figure is written as the whole.
            ax.figure.figure.savefig(path, dpi=120)
        return ax.figure


def _number(value: float) -> str:
    return f"{value:.4g}"


def _wrong(what: str, expected: str) -> _core.Error:
    return error_of(_core.DTypeError, "Comparison", what, expected, "others")


def _mean_and_max(errors: _Errors, what: str) -> list[str]:
    if errors.size == 0:
        return ["", "", ""]
    worst = int(errors.argmax())
    return [_number(errors.mean()), _number(errors[worst]), f"{what} {worst}"]


def _ratio(difference: float, size: float) -> float:
    if size > 0:
        return difference / size
    return 0.0 if difference == 0 else float("inf")


def _matrices(stack: _core.ExpertStack, role: _Role) -> Callable[[int], npt.NDArray[np.float32]]:
    """What multiplies tokens of an expert: its matrix, with its low-rank delta if it has one."""
    delta = stack.deltas.get(role)
    if delta is None:
        return functools.partial(stack.dequantize, role)
    a, b, scale = delta
    return lambda expert: (
        stack.dequantize(role, expert) + np.float32(scale) * (b[expert] @ a[expert])
    )


def _weight_errors(a: _core.ExpertStack, b: _core.ExpertStack, role: _Role) -> _Errors:
    errors = np.empty(a.num_experts)
    wanted, got = _matrices(a, role), _matrices(b, role)
    for expert in range(a.num_experts):
        want = wanted(expert)
        rest = got(expert) - want
        errors[expert] = _ratio(
            float(np.sqrt(np.mean(rest * rest, dtype=np.float64))),
            float(np.sqrt(np.mean(want * want, dtype=np.float64))),
        )
    return errors


def _output_errors(want: npt.NDArray[Any], got: npt.NDArray[Any]) -> _Errors:
    want = want.astype(np.float64)
    rest = np.linalg.norm(got - want, axis=1)
    sizes = np.linalg.norm(want, axis=1)
    return np.array([_ratio(r, s) for r, s in zip(rest, sizes, strict=True)])


def _stack_of(value: object, name: str) -> _core.ExpertStack:
    if isinstance(value, _core.MoeLayer):
        return value.stack
    if isinstance(value, _core.ExpertStack):
        return value
    expected, got = "ExpertStack or MoeLayer", type(value).__name__
    raise error_of(_core.DTypeError, "compare", name, expected, got)


def compare(
    a: _core.ExpertStack | _core.MoeLayer,
    b: _core.ExpertStack | _core.MoeLayer,
    x: npt.ArrayLike | None = None,
    *,
    ids: npt.ArrayLike | None = None,
    routing: _core.Routing | None = None,
) -> Comparison:
    """Compare the weights and outputs of two stacks, or of two layers, of equal shape.

    A low-rank delta counts as a part of its expert's matrix.

    Parameters
    ----------
    a : ExpertStack or MoeLayer
        What is right.
    b : ExpertStack or MoeLayer
        What is compared with it.
    x : f32 array [T, H], optional
        Tokens to run both with. None: the weights alone are compared.
    ids : int array [T, k], optional
        Experts of each token, which count alike.
    routing : Routing, optional
        Experts of each token and how much each counts. With neither this nor ``ids``, layers route
        by their own routers, and two stacks send token t to expert t modulo E.

    Returns
    -------
    Comparison
        Relative error per role and expert, and per token.

    Raises
    ------
    ShapeError
        Two shapes, or an array that does not fit.
    DTypeError
        Not two stacks or two layers, or another type of array.
    ConfigError
        Both ``ids`` and ``routing``, or either without ``x``.
    """
    stacks = _stack_of(a, "a"), _stack_of(b, "b")
    shapes = [(s.num_experts, s.intermediate_size, s.hidden_size, s.gated) for s in stacks]
    if shapes[0] != shapes[1]:
        expected = f"(E, I, H, gated) = {shapes[0]}, as a"
        raise error_of(_core.ShapeError, "compare", "b", expected, str(shapes[1]))
    if isinstance(a, _core.MoeLayer) != isinstance(b, _core.MoeLayer):
        expected, got = f"{type(a).__name__}, as a", type(b).__name__
        raise error_of(_core.DTypeError, "compare", "b", expected, got)
    if ids is not None and routing is not None:
        raise error_of(_core.ConfigError, "compare", "ids", "ids or routing", "both")
    if x is None and (ids is not None or routing is not None):
        raise error_of(_core.ConfigError, "compare", "x", "tokens for the ids", "None")

    roles = [role for role in _ROLES if role != "gate" or stacks[0].gated]
    outputs = None
    if x is not None:
        tokens = np.asarray(x, np.float32)
        if ids is None and routing is None and isinstance(a, _core.MoeLayer):
            outputs = _output_errors(_run(a, tokens, None), _run(b, tokens, None))
        else:
            if routing is None:
                chosen = (
                    np.arange(len(tokens))[:, None] % stacks[0].num_experts
                    if ids is None
                    else np.asarray(ids)
                )
                shares = np.full(chosen.shape, 1 / max(chosen.shape[-1], 1), np.float32)
                routing = _core.Routing(chosen.astype(np.int32), shares)
            outputs = _output_errors(_run(a, tokens, routing), _run(b, tokens, routing))
    return Comparison(
        {role: _weight_errors(*stacks, role) for role in roles},
        outputs,
        {role: (stacks[0].quants[role], stacks[1].quants[role]) for role in roles},
        (stacks[0].nbytes, stacks[1].nbytes),
    )


def _run(
    part: _core.ExpertStack | _core.MoeLayer,
    x: npt.NDArray[np.float32],
    routing: _core.Routing | None,
) -> npt.NDArray[np.float32]:
    return _core.moe_forward(x, None, part, routing=routing)

"""Which matrices a rule of a quantisation's configuration is for.

Rules name modules: in full, by a regular expression, or by their class. Their names are those of
the model that was quantised, whose layers may have another start than the checkpoint's.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from moesaic.safetensors.reader import wrong


def _tail(name: str) -> str:
    return name[name.find("layers.") :] if "layers." in name else name


def module_names(base: str) -> tuple[str, ...]:
    """The module of a matrix; where one tensor holds all experts, also its modules apart."""
    names = [base]
    start, dot, part = base.rpartition(".experts.")
    if dot and not part.split(".")[0].isdigit():
        apart = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
        names += [f"{start}.experts.0.{each}" for each in (part, *apart)]
    return tuple(names)


def matches(pattern: str, base: str, source: str) -> bool:
    """Whether a regular expression matches the start of the module's name, as its writers do."""
    try:
        return any(re.match(pattern, name) for name in module_names(base))
    except re.error as error:
        raise wrong(f"{source} {pattern!r}", "a regular expression", error) from None


def rank(targets: Iterable[Any], base: str, source: str) -> int | None:
    """How closely a list of targets names a module, 0 the closest; None where it does not."""
    ranks = []
    for target in targets:
        if not isinstance(target, str):
            raise wrong(f"{source} targets", "names", repr(target))
        if target.startswith("re:"):
            ranks += [1] if matches(target[3:], base, source) else []
        elif target == "Linear":
            ranks.append(2)
        elif any(_tail(name) == _tail(target) for name in module_names(base)):
            ranks.append(0)
    return min(ranks, default=None)


def dynamic_rule(rules: Mapping[str, Any], base: str, source: str) -> Any:
    """GPTQModel's ``dynamic``: the first rule that matches; False for one that excludes."""
    for pattern, values in rules.items():
        excludes = pattern.startswith("-:")
        if matches(pattern.removeprefix("-:").removeprefix("+:"), base, source):
            return False if excludes else values
    return None


def named_rule(rules: Mapping[str, Any], base: str, source: str) -> Any:
    """AutoRound's ``extra_config``: a module by its name, else by a regular expression."""
    for name, values in rules.items():
        if any(_tail(module) == _tail(name) for module in module_names(base)):
            return values
    for name, values in rules.items():
        plain = re.fullmatch(r"[\w.-]*", name) is not None
        if not plain and matches(f".*?(?:{name})", base, source):
            return values
    return None

"""What of a configuration counts, and where two differ."""

from typing import Any

from moesaic import _core

_NUMBERS = {
    "swiglu_oai": ("limit", "alpha"),
    "swiglu_clamp_input": ("limit",),
    "swiglu_clamp_output": ("limit",),
    "situ": ("beta", "linear_beta"),
}


def activation_facts(activation: _core.Activation) -> dict[str, Any]:
    """The kind, and the numbers that it reads."""
    numbers = {name: getattr(activation, name) for name in _NUMBERS.get(activation.kind, ())}
    return {"kind": activation.kind, **numbers}


def _router_facts(router: _core.RouterConfig) -> dict[str, Any]:
    facts = router.to_dict()
    if not router.renormalize:
        facts.pop("guard")
    if not router.renormalize or router.guard == "none":
        facts.pop("guard_eps")
    if router.num_groups == 1:
        for name in ("groups_used", "group_reduce", "group_mask"):
            facts.pop(name)
    return facts


def facts_of(config: _core.MoeConfig) -> dict[str, Any]:
    """The fields that change what a layer computes, by their paths."""
    facts = config.to_dict()
    for name in ("architecture", "layer"):
        facts.pop(name)
    if config.shared == "none":
        for name in ("shared_intermediate_size", "shared_activation", "shared_scale"):
            facts.pop(name)
    else:
        facts["shared_activation"] = activation_facts(config.shared_activation)
    if not (config.input_norm or config.latent_norm or config.router_input == "norm"):
        facts.pop("norm_eps")
    facts["activation"] = activation_facts(config.activation)
    facts["router"] = _router_facts(config.router)
    return {
        f"{name}.{field}" if field else name: one
        for name, value in facts.items()
        for field, one in (value.items() if isinstance(value, dict) else [("", value)])
    }


def first_difference(want: _core.MoeConfig, got: _core.MoeConfig) -> tuple[str, Any, Any] | None:
    """The path of a field that differs, and both values; None where nothing does."""
    wanted, found = facts_of(want), facts_of(got)
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            return name, wanted.get(name), found.get(name)
    return None

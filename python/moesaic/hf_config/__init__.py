"""MoeConfig from the configuration of a Hugging Face model.

======================  ===============================================================
``families``            the table: one row per family of model types
``fields``              one configuration, its fields checked for their types
``layers``              which layers have experts
======================  ===============================================================
"""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from moesaic import _core
from moesaic.hf_config.families import FAMILIES, Family, Key, Shared, key
from moesaic.hf_config.fields import OPERATION, Fields, unsupported, wrong
from moesaic.hf_config.layers import check_layer, is_hashed

__all__ = ["Family", "config_from_hf", "find_family", "layer_facts"]

#: Names of activations in transformers -> kinds, gated and not.
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh",
          "gelu_new": "geglu_tanh", "relu": "reglu"}  # fmt: skip
_UNGATED = {"relu2": "relu_squared", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}


def _activation(family: Family, fields: Fields) -> _core.Activation:
    if isinstance(family.activation, Key):
        name = fields.text(family.activation)
        kind = (_GATED if family.gated else _UNGATED).get(name)
        if kind is None:
            known = ", ".join(_GATED if family.gated else _UNGATED)
            raise unsupported(family.activation.names[0], f"one of {known}", repr(name))
    else:
        kind = family.activation
    given = {}
    if family.limit is not None:
        given["limit"] = fields.number(family.limit)
    if family.alpha is not None:
        given["alpha"] = fields.number(family.alpha)
    return _core.Activation(kind, **given)


def _router(family: Family, fields: Fields, experts: int, top_k: int) -> _core.RouterConfig:
    score = family.score
    if isinstance(score, Key):
        name = fields.text(score)
        if name not in _SCORES:
            raise wrong(score.names[0], f"one of {', '.join(_SCORES)}", repr(name))
        score = _SCORES[name]
    guard, epsilon = family.guard
    groups: dict[str, Any] = {}
    if family.groups is not None and _uses_groups(family, fields):
        count, used = (fields.size(field) for field in family.groups)
        if experts % count or used > count:
            raise wrong(
                family.groups[0].names[0],
                f"a divisor of {experts} experts, not below {family.groups[1].names[0]}",
                f"{count}, {used} used",
            )
        groups = {"num_groups": count, "groups_used": used}
    facts: dict[str, Any] = {
        "score": score,
        "select_on": "given" if is_hashed(family, fields) else family.select_on,
        "renormalize": fields.flag(family.renormalize),
        "guard": guard,
        "guard_eps": fields.number(epsilon),
        "scale": fields.number(family.scale),
        "group_reduce": family.group_reduce,
        "group_mask": family.group_mask,
        "weight_on": family.weight_on,
        "identity_experts": _count(fields, family.identity_experts),
    }
    try:
        return _core.RouterConfig(experts, top_k, **facts, **groups)
    except _core.ConfigError as error:
        raise wrong("router", "consistent values", error) from None


def _uses_groups(family: Family, fields: Fields) -> bool:
    """DeepSeek-V2 has groups in one of its methods only."""
    if "topk_method" in family.expects and "greedy" in family.expects["topk_method"]:
        return fields.text(key("topk_method", default="greedy")) == "group_limited_greedy"
    return True


def _count(fields: Fields, count: Key | int) -> int:
    return fields.size(count, least=0) if isinstance(count, Key) else count


def _shared_width(shared: Shared | None, fields: Fields) -> int:
    if shared is None:
        return 0
    count = _count(fields, shared.count)
    return count and count * fields.size(shared.width, least=0)


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, str | PathLike):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise wrong(str(path), "a JSON object", error) from None
    elif not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise _core.DTypeError(
            f"{OPERATION}: config: expected a dict, the path of a config.json or an object with"
            f" to_dict(), got {type(config).__name__}"
        )
    return dict(config)


def find_family(config: Any) -> tuple[Family, dict[str, Any]]:
    """The row of a configuration and the fields it reads: those of the text model.

    Raises FormatError without a model_type, UnsupportedError for one that has no row.
    """
    outer = _as_dict(config)
    places = [outer]
    for name in ("text_config", "language_config", "llm_config"):
        inner = outer.get(name)
        if isinstance(inner, Mapping) or hasattr(inner, "to_dict"):
            places.insert(0, _as_dict(inner))
    for fields in places:
        for family in FAMILIES:
            if fields.get("model_type") in family.model_types:
                return family, fields
    model_type = outer.get("model_type")
    if not isinstance(model_type, str):
        raise wrong("model_type", "a name", repr(model_type))
    known = sorted(name for family in FAMILIES if not family.missing for name in family.model_types)
    raise unsupported("model_type", f"one of {', '.join(known)}", repr(model_type))


def layer_facts(config: Any, layer: int) -> tuple[_core.MoeConfig, Family]:
    """``config_from_hf`` and the row it used."""
    family, values = find_family(config)
    name = str(values["model_type"])
    if family.missing:
        raise unsupported("model_type", f"a model without {family.missing}", repr(name))
    fields = Fields(values, layer)
    check_layer(family, fields)
    for field, accepted in family.expects.items():
        value = values.get(field)
        if value is not None and value not in accepted:
            raise wrong(field, " or ".join(map(repr, accepted)), repr(value))
    experts, top_k = fields.size(family.experts), fields.size(family.top_k)
    identity = _count(fields, family.identity_experts)
    shared = _shared_width(family.shared, fields)
    hashed = is_hashed(family, fields)
    facts = _core.MoeConfig(
        fields.size(key("hidden_size")),
        fields.size(family.width),
        experts,
        top_k,
        activation=_activation(family, fields),
        router=_router(family, fields, experts + identity, top_k),
        shared=family.shared.kind if family.shared is not None and shared else "none",
        shared_intermediate_size=shared,
        architecture=name,
        layer=layer,
        shared_activation=family.shared_activation or None,
        latent_size=fields.size(family.latent, least=0) if family.latent is not None else 0,
        input_norm=bool(family.input_norm),
        router_input="norm" if family.router_norm else "experts",
        norm_eps=fields.number(key("rms_norm_eps", default=1e-6)),
        vocab_size=fields.size(key("vocab_size")) if hashed else 0,
    )
    return facts, family


def config_from_hf(config: Any, layer: int = 0) -> _core.MoeConfig:
    """See MoeConfig.from_hf."""
    return layer_facts(config, layer)[0]

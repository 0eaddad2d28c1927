"""MoeConfig from the configuration of a Hugging Face model.

======================  ===============================================================
``families``            the table: one row per family of model types, and its model
``defaults``            what an absent field means, by model type
``fields``              one configuration, its fields checked for their types
``layers``              which layers have experts
======================  ===============================================================
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from moesaic import _core
from moesaic._files import read_text_bytes, shown, snapshot_of
from moesaic.hf_config.families import FAMILIES, Family, Shared, key
from moesaic.hf_config.fields import MAX_SIZE, OPERATION, Fields, unsupported, wrong
from moesaic.hf_config.layers import check_layer, is_hashed

__all__ = [
    "OUTPUT_SCALES",
    "Family",
    "config_from_hf",
    "find_family",
    "given_facts",
    "layer_facts",
    "section",
]

#: Tensors with factors on the outputs of experts, of any family.
OUTPUT_SCALES = tuple(sorted({family.output_scale for family in FAMILIES} - {""}))

#: Names of activations in transformers -> kinds, gated and not.
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh",
          "gelu_new": "geglu_tanh", "relu": "reglu"}  # fmt: skip
_UNGATED = {"relu2": "relu_squared", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def _activation(family: Family, fields: Fields) -> str | None:
    if family.activation is None:
        return None
    name = fields.text(family.activation)
    known = _GATED if family.facts["gated"] else _UNGATED
    if name not in known:
        raise unsupported(family.activation.names[0], f"one of {', '.join(known)}", shown(name))
    return known[name]


def _score(family: Family, fields: Fields) -> str | None:
    if family.score is None:
        return None
    name = fields.text(family.score)
    if name not in family.scores:
        raise wrong(family.score.names[0], f"one of {', '.join(family.scores)}", shown(name))
    return family.scores[name]


def _renormalize(family: Family, fields: Fields, score: str | None) -> bool | None:
    """Whatever a key says: a softmax over the selected experts sums to one."""
    if family.renormalize is None:
        return None
    return fields.flag(family.renormalize) and score != "softmax_selected"


def _averaged(family: Family, fields: Fields) -> bool | None:
    if family.combination is None:
        return None
    name = fields.text(family.combination)
    if name not in ("average", "sum"):
        raise wrong(family.combination.names[0], "average or sum", shown(name))
    return name == "average"


def _groups(family: Family, fields: Fields, experts: int) -> tuple[int, int]:
    """num_groups and groups_used."""
    if family.groups is None or not _uses_groups(family, fields):
        return 1, 1
    count, used = (fields.size(field) for field in family.groups)
    if experts % count or used > count:
        raise wrong(
            family.groups[0].names[0],
            f"a divisor of {experts} experts, not below {family.groups[1].names[0]}",
            f"{count}, {used} used",
        )
    return count, used


def _uses_groups(family: Family, fields: Fields) -> bool:
    """DeepSeek-V2 has groups in one of its methods only."""
    if "topk_method" in family.expects and "greedy" in family.expects["topk_method"]:
        return fields.text(key("topk_method")) == "group_limited_greedy"
    return True


def _limit(family: Family, fields: Fields) -> float | None:
    if family.limit is None:
        return None
    limit = fields.number(family.limit)
    if not limit > 0:
        raise wrong(family.limit.names[0], "a positive number", limit)
    return limit


def _shared_width(shared: Shared | None, fields: Fields) -> int:
    if shared is None:
        return 0
    count = shared.count if isinstance(shared.count, int) else fields.size(shared.count, least=0)
    width = count and count * fields.size(shared.width, least=0)
    if width > MAX_SIZE:
        raise wrong(shared.width.names[0], f"shared experts of at most {MAX_SIZE} rows", width)
    return width


def _as_dict(config: Any) -> dict[str, Any]:
    if isinstance(config, str | PathLike):
        path = Path(config)
        path = snapshot_of(path) / "config.json" if path.is_dir() else path
        try:
            config = json.loads(read_text_bytes(path))
        except (ValueError, RecursionError) as error:
            raise wrong(str(path), "a JSON object", error) from None
    elif not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise _core.make_error(
            _core.DTypeError,
            OPERATION,
            "config",
            "a dict, the path of a config.json or an object with to_dict()",
            type(config).__name__,
        )
    return dict(config)


def _text_model(outer: dict[str, Any]) -> list[dict[str, Any]]:
    """The text models inside of a larger one, each with the model type that it has or implies."""
    found: list[dict[str, Any]] = []
    for name in ("text_config", "language_config", "llm_config"):
        inner = outer.get(name)
        if inner is None:
            continue
        if not isinstance(inner, Mapping) and not hasattr(inner, "to_dict"):
            raise wrong(name, "an object", shown(inner))
        text = _as_dict(inner)
        if text.get("model_type") is None:
            text["model_type"] = outer.get("model_type")
        found.insert(0, text)
    return found


def find_family(config: Any) -> tuple[Family, dict[str, Any]]:
    """The row of a configuration and the fields it reads: those of the text model.

    Raises FormatError without a model_type, UnsupportedError for one that has no row.
    """
    outer = _as_dict(config)
    for fields in (*_text_model(outer), outer):
        for family in FAMILIES:
            if fields.get("model_type") in family.model_types:
                return family, fields
    model_type = outer.get("model_type")
    if not isinstance(model_type, str):
        raise wrong("model_type", "a name", shown(model_type))
    known = sorted(name for family in FAMILIES if not family.missing for name in family.model_types)
    near = ", ".join(difflib.get_close_matches(model_type, known, 3, 0.7))
    raise unsupported(
        "model_type",
        f"{f'perhaps {near}; ' if near else ''}one of the {len(known)} that are known",
        shown(model_type),
        "from_safetensors(..., config=) takes a MoeConfig of your own",
    )


def section(config: Any, prefix: str | None) -> Any:
    """The configuration of the part of a model whose tensors begin with ``prefix``."""
    for part in (prefix or "").split("."):
        inner = config.get(f"{part}_config") if isinstance(config, Mapping) else None
        config = config if inner is None else inner
    return config


def given_facts(config: Any) -> Family:
    """The row of a configuration where it has one, for a layer whose facts the caller gives."""
    try:
        family = find_family(config)[0]
    except (_core.FormatError, _core.UnsupportedError, _core.DTypeError):
        return Family((), "the caller", "", given=True)
    return replace(family, given=True)


def layer_facts(config: Any, layer: int, is_part: bool = False) -> tuple[_core.MoeConfig, Family]:
    """``config_from_hf`` and the row it used.

    ``is_part`` says that the layer is of a part beside the model, which counts its layers anew:
    the tensors say whether it has experts.
    """
    family, given = find_family(config)
    name = str(given["model_type"])
    if family.missing:
        raise unsupported("model_type", f"a model without {family.missing}", repr(name))
    fields = Fields(given, layer)
    if not is_part:
        check_layer(family, fields)
    for field, accepted in family.expects.items():
        value = given.get(field)
        value = fields.defaults.get(field) if value is None else value
        if value is not None and value not in accepted:
            raise wrong(field, " or ".join(map(repr, accepted)), shown(value))
    experts = fields.size(family.experts)
    identity = fields.size(family.identity_experts, least=0) if family.identity_experts else 0
    if experts + identity > MAX_SIZE:
        raise wrong(family.experts.names[0], f"at most {MAX_SIZE} experts", experts + identity)
    if family.has_bias is not None and not fields.flag(family.has_bias):
        family = replace(family, unbiased=True)
    hashed = not is_part and is_hashed(family, fields)
    num_groups, groups_used = _groups(family, fields, experts + identity)
    score = _score(family, fields)
    values: dict[str, Any] = {
        "hidden_size": fields.size(key("hidden_size")),
        "intermediate_size": fields.size(family.width),
        "num_experts": experts,
        "top_k": fields.size(family.top_k),
        "score": score,
        "renormalize": _renormalize(family, fields, score),
        "guard_eps": None if family.guard_eps is None else fields.number(family.guard_eps),
        "scale": 1.0 if family.scale is None else fields.number(family.scale),
        "num_groups": num_groups,
        "groups_used": groups_used,
        "identity_experts": identity,
        "vocab_size": fields.size(key("vocab_size")) if hashed else 0,
        "activation": _activation(family, fields),
        "limit": _limit(family, fields),
        "alpha": None if family.alpha is None else fields.number(family.alpha),
        "shared_intermediate_size": _shared_width(family.shared, fields),
        "averaged": _averaged(family, fields),
        "latent_size": 0 if family.latent is None else fields.size(family.latent, least=0),
    }
    has_norm = family.input_norm or family.router_norm
    # One that is no number tells of a damaged file, also where this layer needs none.
    if has_norm or fields.fields.get("rms_norm_eps") is not None:
        norm_eps = fields.number(key("rms_norm_eps", default=1e-6))
        if has_norm:
            values["norm_eps"] = norm_eps
    try:
        config = _core.model_config(family.model, architecture=name, layer=layer, **values)
    except _core.ConfigError as error:
        raise wrong("router", "consistent values", error) from None
    return config, family


def config_from_hf(config: Any, layer: int = 0) -> _core.MoeConfig:
    """See MoeConfig.from_hf."""
    return layer_facts(config, layer)[0]

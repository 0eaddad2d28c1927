"""The fields of a config.json that say what its MoE layers are: the inverse of ``hf_config``."""

from collections.abc import Mapping
from typing import Any

from moesaic import _core
from moesaic.hf_config.families import Family, Key

_ACTIVATIONS = {
    "swiglu": "silu", "geglu_tanh": "gelu_pytorch_tanh", "reglu": "relu", "relu_squared": "relu2",
    "gelu_tanh": "gelu_pytorch_tanh",
}  # fmt: skip
_SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrt_softplus": "sqrtsoftplus"}


def fields_of(
    model_type: str, family: Family, layers: Mapping[int, _core.MoeConfig]
) -> dict[str, Any]:
    """The fields of the first layer. Whether they hold for all is seen by reading them back."""
    config = next(iter(layers.values()))
    router = config.router
    fields: dict[str, Any] = {
        "model_type": model_type, "hidden_size": config.hidden_size,
        "num_hidden_layers": max(layers) + 1, **_layer_fields(layers),
    }  # fmt: skip

    def put(field: Key | None, value: Any) -> None:
        if field is not None and value is not None:
            fields.setdefault(field.names[0], value)

    put(family.experts, config.num_experts)
    put(family.top_k, config.top_k)
    put(family.width, config.intermediate_size)
    put(family.score, _SCORES.get(router.score))
    put(family.renormalize, router.renormalize)
    put(family.guard_eps, router.guard_eps)
    put(family.scale, router.scale)
    put(family.activation, _ACTIVATIONS.get(config.activation.kind))
    put(family.limit, config.activation.limit)
    put(family.has_bias, bool(router.selection_bias))
    if family.groups is not None:
        put(family.groups[0], router.num_groups)
        put(family.groups[1], router.groups_used)
    if "topk_method" in family.expects:
        limited = "group_limited_greedy" if router.num_groups > 1 else "greedy"
        accepted = family.expects["topk_method"]
        fields["topk_method"] = limited if limited in accepted else accepted[0]
    for name, values in family.expects.items():
        fields.setdefault(name, values[0])
    if family.shared is not None:
        count = family.shared.count
        if isinstance(count, Key):
            width = fields.get(family.shared.width.names[0], config.intermediate_size)
            put(count, config.shared_intermediate_size // width)
        put(family.shared.width, config.shared_intermediate_size)
    return fields


def _layer_fields(layers: Mapping[int, Any]) -> dict[str, Any]:
    """Which layers have experts, in the words of every family."""
    dense = [layer for layer in range(max(layers)) if layer not in layers]
    first = min(layers)
    return {
        "first_k_dense_replace": first, "num_dense_layers": first, "moe_layer_freq": 1,
        "decoder_sparse_step": 1, "mlp_only_layers": dense,
        "moe_layer_start_index": first, "moe_layer_end_index": max(layers), "moe_layer_interval": 1,
        "expert_layer_period": 1, "expert_layer_offset": 0,
        "mlp_layer_types": [
            "sparse" if layer in layers else "dense" for layer in range(max(layers) + 1)
        ],
    }  # fmt: skip

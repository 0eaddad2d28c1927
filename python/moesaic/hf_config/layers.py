"""Which layers of a model have experts."""

from collections.abc import Callable
from dataclasses import replace

from moesaic import _core
from moesaic._files import shown
from moesaic.hf_config.families import Family, key
from moesaic.hf_config.fields import OPERATION, Fields, wrong


def _is_dense(fields: Fields) -> bool:
    """The first layers are dense, then every one (or each moe_layer_freq-th) has experts."""
    first = fields.size(key("first_k_dense_replace", "num_dense_layers"), least=0)
    every = fields.size(key("moe_layer_freq", default=1), least=0)  # 0 or 1 where it is a list
    return fields.layer < first or every == 0 or fields.layer % every != 0


def _qwen(fields: Fields) -> bool:
    if fields.fields.get("mlp_layer_types") is not None:
        return _by_type(fields)
    step = fields.size(key("decoder_sparse_step"))
    return fields.layer not in fields.sizes("mlp_only_layers") and (fields.layer + 1) % step == 0


def _by_type(fields: Fields) -> bool:
    types = fields.texts("mlp_layer_types")
    if types is None:
        return not _is_dense(fields)
    if fields.layer >= len(types):
        # Layers behind the last one draft further tokens.
        return True
    if types[fields.layer] not in ("sparse", "dense"):
        raise wrong("mlp_layer_types", "dense or sparse", types[fields.layer])
    return types[fields.layer] == "sparse"


def _llama4(fields: Fields) -> bool:
    if fields.fields.get("moe_layers") is not None:
        return fields.layer in fields.sizes("moe_layers")
    return (fields.layer + 1) % fields.size(key("interleave_moe_layer_step")) == 0


def _ernie(fields: Fields) -> bool:
    first = fields.size(key("moe_layer_start_index"), least=0)
    last = fields.size(key("moe_layer_end_index"), least=-1)
    every = fields.size(key("moe_layer_interval"))
    within = first <= fields.layer and (last == -1 or fields.layer <= last)
    return within and (fields.layer + 1) % every == 0


def _jamba(fields: Fields) -> bool:
    period = fields.size(key("expert_layer_period"))
    offset = fields.size(key("expert_layer_offset"), least=0)
    return fields.layer % period == offset


def _nemotron_h(fields: Fields) -> bool:
    """As transformers, which looks at the older pattern where there is no list."""
    types = fields.texts("layers_block_type") or fields.texts("layer_types")
    if types is None:
        pattern = fields.fields.get("hybrid_override_pattern")
        if not isinstance(pattern, str):
            raise wrong("layers_block_type", "the kind of each layer", shown(pattern))
        return fields.layer < len(pattern) and pattern[fields.layer] == "E"
    return fields.layer < len(types) and types[fields.layer] == "moe"


_HAS_EXPERTS: dict[str, Callable[[Fields], bool]] = {
    "all": lambda fields: True,
    "after_dense": lambda fields: not _is_dense(fields),
    "qwen": _qwen,
    "mlp_layer_types": _by_type,
    "deepseek_v4": lambda fields: True,
    "llama4": _llama4,
    "ernie": _ernie,
    "jamba": _jamba,
    "nemotron_h": _nemotron_h,
}


def is_hashed(family: Family, fields: Fields) -> bool:
    """Whether the layer takes its experts from a table of tokens."""
    if family.layers != "deepseek_v4":
        return False
    types = fields.texts("mlp_layer_types")
    if types is None:
        return fields.layer < fields.size(key("num_hash_layers"), least=0)
    if fields.layer >= len(types):
        return False
    if types[fields.layer] not in ("hash_moe", "moe"):
        raise wrong("mlp_layer_types", "hash_moe or moe", types[fields.layer])
    return types[fields.layer] == "hash_moe"


def check_layer(family: Family, fields: Fields) -> None:
    """Raises ShapeError where the layer is not one of the model's, or has no experts."""
    # Longcat counts its blocks in num_layers, and two attentions of each in num_hidden_layers.
    counted = {"num_layers"} & (fields.fields.keys() | fields.defaults.keys())
    names = counted or {"num_hidden_layers"}
    count = fields.size_of_model(key(*names, default=1 << 30))
    count += fields.size_of_model(key("num_nextn_predict_layers", default=0, null=0), least=0)
    if fields.layer < 0 or fields.layer >= count:
        raise _core.make_error(
            _core.ShapeError, OPERATION, "layer", f"0 to {count - 1}", str(fields.layer)
        )
    experts = fields.size(replace(family.experts, default=0, null=0), least=0)
    if experts == 0 or not _HAS_EXPERTS[family.layers](fields):
        raise _core.make_error(
            _core.ShapeError,
            OPERATION,
            f"layer {fields.layer}",
            "a layer with experts",
            "a dense one",
        )

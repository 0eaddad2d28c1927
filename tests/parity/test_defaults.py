"""What a field means that config.json lacks is what the type's configuration class makes of it.

Every field that a row of families reads is left out of what the class writes; ours must then say
what a configuration of the class says, or refuse.
"""

import warnings
from collections.abc import Iterator
from dataclasses import fields as fields_of
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

import moesaic as mo
from moesaic.hf_config import find_family
from moesaic.hf_config.defaults import DEFAULTS, defaults_of
from moesaic.hf_config.families import FAMILIES, REQUIRED, Family, Key, Shared
from moesaic.hf_config.fields import Fields
from moesaic.hf_config.layers import check_layer

#: Types of remote code, which transformers does not define: every field must be there.
REMOTE = {"minimax_text_01", "qwen3_moe_text", "kimi_k2"}
TYPES = [name for family in FAMILIES if not family.missing for name in family.model_types]
#: Fields of rules, not of rows, and how they are called here.
RULES = {
    "num_hidden_layers", "num_layers", "num_nextn_predict_layers", "hidden_size", "topk_method",
    "vocab_size", "rms_norm_eps", "enable_moe_block", "decoder_sparse_step", "num_dense_layers",
    "first_k_dense_replace", "interleave_moe_layer_step", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval", "expert_layer_period", "expert_layer_offset",
    "num_hash_layers",
}  # fmt: skip
#: Defaults without a field of that name: what the class does instead is tested by the layers.
NO_FIELD = {"first_k_dense_replace", "decoder_sparse_step", "num_hash_layers"}
#: Fields that the module reads and the class does not declare.
UNDECLARED = {"qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size"}}
#: What a class makes of an absent value before it shows it.
SHOWN = {("ernie4_5_moe", "moe_layer_end_index"): 27}


def class_of(model_type: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = CONFIG_MAPPING[model_type]()
        return getattr(config, "text_config", None) or config


def keys_of(family: Family) -> Iterator[Key]:
    for field in fields_of(family):
        value = getattr(family, field.name)
        if isinstance(value, Shared):
            yield from (one for one in (value.width, value.count) if isinstance(one, Key))
        elif isinstance(value, Key):
            yield value
        elif isinstance(value, tuple):
            yield from (one for one in value if isinstance(one, Key))


def there(config: Any, names: tuple[str, ...]) -> Any:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)


def test_types_of_the_table():
    known = {name for name in TYPES if name in CONFIG_MAPPING}
    assert set(TYPES) - known == REMOTE
    assert all(defaults_of(name) for name in known)
    assert not any(defaults_of(name) for name in REMOTE)
    text = {name for name in known if not hasattr(CONFIG_MAPPING[name](), "text_config")}
    assert set(DEFAULTS) == text


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_defaults_are_those_of_the_class(model_type):
    family, config = find_family({"model_type": model_type})[0], class_of(model_type)
    read = {name: key for key in keys_of(family) for name in key.names}
    for key in keys_of(family):
        want = there(config, key.names)
        got = next((DEFAULTS[model_type][n] for n in key.names if n in DEFAULTS[model_type]), None)
        assert got == want, key.names
        # A default of the row is for what the class does not have.
        assert key.default is REQUIRED or want is None
    for name, value in DEFAULTS[model_type].items():
        assert name in read or name in RULES, name
        want = SHOWN.get((model_type, name), value)
        if hasattr(config, name) or name not in NO_FIELD:
            assert there(config, read[name].names if name in read else (name,)) == want, name
    for name, accepted in family.expects.items():
        if (value := getattr(config, name, None)) is not None and value not in accepted:
            assert DEFAULTS[model_type][name] == value, name


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_layers_are_those_of_the_class(model_type):
    """Dense and sparse layers, where no field says which."""
    config = class_of(model_type)
    if model_type == "nemotron_h":  # must say its layers
        with pytest.raises(mo.FormatError, match="layers_block_type"):
            mo.MoeConfig.from_hf({"model_type": model_type})
        return
    family, fields = find_family({"model_type": model_type, "num_experts": 8})
    family_only = {k: v for k, v in fields.items() if k == "model_type"}
    experts = there(config, family.experts.names)
    if experts is None:
        family_only[family.experts.names[0]] = 8
    for layer in range(getattr(config, "num_layers", config.num_hidden_layers)):
        types = getattr(config, "mlp_layer_types", None)
        if types is not None:
            want = types[layer] != "dense"
        elif model_type == "llama4_text":
            want = layer in config.moe_layers
        elif model_type == "jamba":
            want = config.layers_num_experts[layer] > 1
        elif model_type == "ernie4_5_moe":
            want = config.moe_layer_start_index <= layer <= config.moe_layer_end_index
        else:
            dense = there(config, ("first_k_dense_replace", "num_dense_layers")) or 0
            want = layer >= dense
        try:
            check_layer(family, Fields(family_only, layer))
            got = True
        except mo.ShapeError:
            got = False
        assert got == want, layer


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_names_are_read_by_the_class(model_type):
    """The first name of a field that counts for the class sets what it calls by it."""
    cls, family = CONFIG_MAPPING[model_type], find_family({"model_type": model_type})[0]
    known = {field.name for field in fields_of(cls)} | set(cls.attribute_map)
    known |= set(cls.attribute_map.values())
    known |= UNDECLARED.get(model_type, set())
    for key in keys_of(family):
        assert known.intersection(key.names) or key.default is not REQUIRED, key.names


def test_a_field_left_out():
    """From a whole configuration one field goes at a time: equal to the class's, or refused."""
    for model_type in sorted(DEFAULTS):
        family, config = find_family({"model_type": model_type})[0], class_of(model_type)
        whole = {"model_type": model_type, **DEFAULTS[model_type]}
        whole |= {name: values[0] for name, values in family.expects.items()}
        whole.setdefault(family.top_k.names[0], 2)
        whole.setdefault(family.experts.names[0], 8)
        if not any(name in whole for name in family.width.names):
            whole[family.width.names[0]] = 64
        if family.groups is not None:
            whole.setdefault(family.groups[0].names[0], 1)
            whole.setdefault(family.groups[1].names[0], 1)
        if family.shared is not None and isinstance(family.shared.count, Key):
            whole.setdefault(family.shared.count.names[0], 1)
        whole |= dict.fromkeys(UNDECLARED.get(model_type, ()), 32)
        if model_type == "nemotron_h":
            whole["layers_block_type"] = ["moe"] * 8
        if model_type == "hunyuan_v1_moe":
            whole["num_experts"] = 4
        want = mo.MoeConfig.from_hf(whole, 5)
        for name in DEFAULTS[model_type]:
            without = {key: value for key, value in whole.items() if key != name}
            if (model_type, name) in {("gemma4_text", "enable_moe_block")}:
                with pytest.raises(mo.FormatError, match=name):
                    mo.MoeConfig.from_hf(without, 5)
            elif getattr(config, name, whole[name]) == whole[name]:
                assert mo.MoeConfig.from_hf(without, 5) == want, (model_type, name)

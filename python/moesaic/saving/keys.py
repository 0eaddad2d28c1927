"""The keys of a GGUF file that say what its MoE layers are: the inverse of its presets.

Which of them an architecture reads stands in ``architecture_table``. What no key says is the
model's; whether all of it came out as it was is seen by reading the file back.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from moesaic import _core
from moesaic._errors import error_of
from moesaic.saving.container import Value

GATING = {"softmax": 1, "sigmoid": 2, "softmax_selected": 3, "sqrt_softplus": 4}
_LATENT = {"kimi-k3": "expert_latent_length", "nemotron_h_moe": "moe_latent_size"}
#: Where the width of shared experts is that of one of them.
_WIDTH_OF_ONE = frozenset({"bailingmoe2"})
#: Models that take the mean of routed and shared experts, which halves both scales.
_AVERAGED = frozenset({"cohere2moe"})


def known(operation: str, architecture: str) -> dict[str, str]:
    """The row of an architecture by its name, or by a model type of transformers that it stores.

    Raises ConfigError for another name, UnsupportedError for a row with a part missing.
    """
    rows = _core.architecture_table()
    row = next((row for row in rows if row["architecture"] == architecture), None)
    # The text model of a larger one is stored as that.
    model_type = architecture.removesuffix("_text")
    row = row or next((row for row in rows if model_type in row["model_types"].split()), None)
    if row is None:
        got = repr(architecture) if architecture else "none"
        near = difflib.get_close_matches(architecture, [row["architecture"] for row in rows], 1)
        raise error_of(
            _core.ConfigError, operation, "architecture", "one of known_architectures()", got,
            f"nearest: {near[0]}" if near else "architecture= names it",
        )  # fmt: skip
    if row["missing"]:
        raise error_of(
            _core.UnsupportedError, operation, "architecture",
            "one whose layers open", f"{architecture!r} without {row['missing']}",
        )  # fmt: skip
    return row


class _Keys:
    """Values of all blocks under one key: one number where they agree, else one for each block."""

    def __init__(self, architecture: str, layers: Mapping[int, _core.MoeConfig]) -> None:
        self.architecture, self.layers = architecture, layers
        self.count = max(layers) + 1
        self.values: dict[str, Value] = {}

    def put(self, name: str, type: str, of: Callable[[_core.MoeConfig], Any]) -> None:
        values = {block: of(config) for block, config in self.layers.items()}
        key = f"{self.architecture}.{name}"
        first = next(iter(values.values()))
        if type == "BOOL" or all(value == first for value in values.values()):
            self.values[key] = Value(first, type)
        else:
            absent = 0.0 if type == "FLOAT32" else 0
            each = [values.get(block, absent) for block in range(self.count)]
            self.values[key] = Value(each, "ARRAY", type)

    def size(self, name: str, of: Callable[[_core.MoeConfig], int]) -> None:
        self.put(name, "UINT32", of)

    def number(self, name: str, of: Callable[[_core.MoeConfig], float]) -> None:
        self.put(name, "FLOAT32", of)


def keys_of(row: Mapping[str, str], layers: Mapping[int, _core.MoeConfig]) -> dict[str, Value]:
    """The metadata of a file with these layers, by block."""
    architecture = row["architecture"]
    keys = _Keys(architecture, layers)
    configs = list(layers.values())
    keys.values["general.architecture"] = Value(architecture, "STRING")
    keys.values["general.type"] = Value("model", "STRING")
    keys.values["general.quantization_version"] = Value(2, "UINT32")
    keys.size("block_count", lambda _: keys.count)
    keys.size("embedding_length", lambda config: config.hidden_size)
    keys.size("feed_forward_length", lambda config: config.intermediate_size)
    keys.size("expert_count", lambda config: config.num_experts)
    keys.size("expert_used_count", lambda config: config.top_k)
    keys.size("expert_feed_forward_length", lambda config: config.intermediate_size)
    _router_keys(row, keys, configs)
    _activation_keys(row, keys, configs)
    if any(config.shared != "none" for config in configs):
        _shared_keys(architecture, keys)
    if architecture in _LATENT and any(config.latent_size for config in configs):
        keys.size(_LATENT[architecture], lambda config: config.latent_size)
    norms = [c for c in configs if c.input_norm or c.latent_norm or c.router_input == "norm"]
    if norms:
        keys.number("attention.layer_norm_rms_epsilon", lambda _: norms[0].norm_eps)
    hashed = [block for block, config in layers.items() if config.vocab_size]
    if hashed:
        keys.size("hash_layer_count", lambda _: max(hashed) + 1)
    return keys.values


def _router_keys(row: Mapping[str, str], keys: _Keys, configs: list[_core.MoeConfig]) -> None:
    if row["score"].startswith("key"):
        keys.size("expert_gating_func", lambda config: GATING[config.router.score])
    if row["renormalize"].startswith("key"):
        keys.put("expert_weights_norm", "BOOL", lambda config: config.router.renormalize)
    if row["scale"].startswith("key"):
        keys.number("expert_weights_scale", lambda config: _scale(row["architecture"], config))
    if any(config.router.num_groups > 1 for config in configs):
        keys.size("expert_group_count", lambda config: config.router.num_groups)
        keys.size("expert_group_used_count", lambda config: config.router.groups_used)


def _scale(architecture: str, config: _core.MoeConfig) -> float:
    halved = architecture in _AVERAGED and config.shared != "none"
    return config.router.scale * 2 if halved else config.router.scale


def _activation_keys(row: Mapping[str, str], keys: _Keys, configs: list[_core.MoeConfig]) -> None:
    if row["activation"].startswith("swiglu_clamp"):
        keys.number("swiglu_clamp_exp", lambda config: _limit(config.activation))
        if any(config.shared != "none" for config in configs):
            keys.number("swiglu_clamp_shexp", lambda config: _limit(config.shared_activation))
    if row["activation"] == "situ":
        keys.number("activation.situ_beta", lambda config: config.activation.beta)
        keys.number("activation.situ_linear_beta", lambda config: config.activation.linear_beta)


def _limit(activation: _core.Activation) -> float:
    """The limit of a clamp; 0 for an activation without one, as llama.cpp writes it."""
    return activation.limit if activation.kind.startswith("swiglu_clamp") else 0.0


def _shared_keys(architecture: str, keys: _Keys) -> None:
    """The width of all shared experts, and their number where it comes out whole."""
    if architecture in _WIDTH_OF_ONE:
        keys.size("expert_shared_feed_forward_length", lambda config: config.intermediate_size)
    else:
        keys.size(
            "expert_shared_feed_forward_length", lambda config: config.shared_intermediate_size
        )
    if all(
        config.shared_intermediate_size % config.intermediate_size == 0
        for config in keys.layers.values()
    ):
        keys.size(
            "expert_shared_count",
            lambda config: config.shared_intermediate_size // config.intermediate_size,
        )

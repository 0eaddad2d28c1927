"""Parts of a model by ``prefix=``; ``config=`` and ``top_k=`` in place of config.json."""

import json
import pickle

import numpy as np
import pytest
from files import write_checkpoint
from values import expert_weights, normal

import moesaic as mo
from moesaic.safetensors import CheckpointExperts

E, H, I = 4, 32, 64
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "norm_topk_prob": True,
}  # fmt: skip


def block_of(stem: str, seed: int, experts: int = E) -> dict[str, np.ndarray]:
    """The tensors of a block without shared experts."""
    gate, up, down = expert_weights(experts, H, I, seed=seed)
    tensors = {f"{stem}mlp.gate.weight": normal(experts, H, seed=seed)}
    for e in range(experts):
        for part, weights in (("gate", gate), ("up", up), ("down", down)):
            tensors[f"{stem}mlp.experts.{e}.{part}_proj.weight"] = weights[e]
    return tensors


def seed_of(layer: mo.MoeLayer, seeds: int = 4) -> int:
    """Which of the blocks a layer was made of."""
    down = layer.stack.dequantize("down", 0)
    return next(
        seed
        for seed in range(seeds)
        if np.array_equal(expert_weights(E, H, I, seed=seed)[2][0], down)
    )


#: The stems of two or three sets, and the set that each prefix means; None where it is an error.
SETS = {
    "drafts beside": (
        ("model.layers.0.", "mtp.layers.0."),
        {None: 0, "model": 0, "model.": 0, "mtp": 1, "mtp.": 1, "mtp.layers": 1, "eagle": None},
    ),
    "drafts inside": (
        ("model.layers.0.", "model.mtp.layers.0."),
        {None: 0, "mtp": 1, "model.mtp": 1, "model.layers": 0},
    ),
    "drafts alone": (("mtp.layers.0.",), {None: None, "mtp": 0}),
    "eagle": (
        ("model.layers.0.", "eagle.layers.0."),
        {None: None, "eagle.": 1, "model": 0, "layers": None},
    ),
    "eagle without a model's name": (("layers.0.", "eagle.layers.0."), {"eagle": 1, "layers": 0}),
    "a speaker": (
        ("thinker.model.layers.0.", "talker.model.layers.0.", "mtp.layers.0."),
        {None: None, "thinker": 0, "talker": 1, "talker.model": 1, "model": None, "mtp": 2},
    ),
}


@pytest.mark.parametrize("case", SETS)
def test_prefixes(tmp_path, case):
    stems, wanted = SETS[case]
    tensors = {k: v for seed, stem in enumerate(stems) for k, v in block_of(stem, seed).items()}
    write_checkpoint(tmp_path, tensors, CONFIG)
    for prefix, seed in wanted.items():
        if seed is None:
            for load in (mo.MoeLayer.from_safetensors, mo.ExpertStack.load_from_safetensors):
                with pytest.raises(mo.FormatError, match=r"layers\.0\..*prefix="):
                    load(tmp_path, 0, prefix=prefix)
            continue
        with mo.MoeLayer.from_safetensors(tmp_path, 0, prefix=prefix) as layer:
            assert seed_of(layer) == seed, prefix
        stack = mo.ExpertStack.load_from_safetensors(tmp_path, 0, prefix=prefix)
        want = expert_weights(E, H, I, seed=seed)[1][3]
        np.testing.assert_array_equal(stack.dequantize("up", 3), want)


def test_parts_have_configurations_of_their_own(tmp_path):
    """Qwen3-Omni: a model that thinks, and one that speaks, with shared experts and other rules."""
    tensors = block_of("thinker.model.layers.0.", 0) | block_of("talker.model.layers.0.", 1)
    shared = "talker.model.layers.0.mlp.shared_expert"
    for part, shape in (("gate", (16, H)), ("up", (16, H)), ("down", (H, 16))):
        tensors[f"{shared}.{part}_proj.weight"] = normal(*shape, seed=7)
    tensors[f"{shared}_gate.weight"] = normal(1, H, seed=8)
    sizes = {k: CONFIG[k] for k in ("hidden_size", "moe_intermediate_size", "num_experts")}
    thinker = {"model_type": "qwen3_omni_moe_text", "num_experts_per_tok": 3, **sizes}
    talker = {
        "model_type": "qwen3_omni_moe_talker_text", "num_experts_per_tok": 1,
        "shared_expert_intermediate_size": 16, **sizes,
    }  # fmt: skip
    config = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": thinker},
        "talker_config": {"model_type": "qwen3_omni_moe_talker", "text_config": talker},
    }
    write_checkpoint(tmp_path, tensors, config)
    with mo.MoeLayer.from_safetensors(tmp_path, 0, prefix="thinker") as layer:
        assert (seed_of(layer), layer.config.top_k, layer.config.shared) == (0, 3, "none")
        assert layer.config.router.renormalize
    with mo.MoeLayer.from_safetensors(tmp_path, 0, prefix="talker.") as layer:
        assert (seed_of(layer), layer.config.top_k, layer.config.shared) == (1, 1, "sigmoid_gated")
        assert not layer.config.router.renormalize


def test_stores_of_a_part(tmp_path):
    """Each store has the blocks of its part, also where parts have different ones."""
    stems = ["thinker.model.layers.0.", "thinker.model.layers.1.", "talker.model.layers.0."]
    tensors = {k: v for seed, stem in enumerate(stems) for k, v in block_of(stem, seed).items()}
    write_checkpoint(tmp_path, tensors, CONFIG)
    x = normal(3, H)
    for prefix, blocks in {"thinker": [0, 1], "talker.model": [0]}.items():
        store = mo.open_store(tmp_path, "16MiB", prefix=prefix)
        assert store.blocks == pickle.loads(pickle.dumps(store)).blocks == blocks
        limited = mo.MoeExpertStore.from_safetensors(tmp_path, prefix=prefix, memory_limit=1 << 24)
        assert [view.layer_index for view in limited.layers] == blocks
        for block in blocks:
            with (
                mo.MoeLayer.from_safetensors(tmp_path, block, prefix=prefix) as whole,
                store.layer(block) as layer,
                pickle.loads(pickle.dumps(store)).layer(block) as again,
                mo.MoeLayer.from_store(limited, block) as unpooled,
            ):
                for other in (layer, again, unpooled):
                    np.testing.assert_array_equal(other(x), whole(x))
    with pytest.raises(mo.FormatError, match=r"one set of experts.*prefix="):
        mo.open_store(tmp_path, "16MiB")
    with pytest.raises(mo.FormatError, match=r"'eagle'.*talker.*prefix="):
        mo.open_store(tmp_path, "16MiB", prefix="eagle")


def test_a_prefix_of_what_has_no_parts(tmp_path, small):
    for file in (small.path, mo.GgufFile(small.path)):
        with pytest.raises(mo.ConfigError, match=r"prefix.*one model"):
            mo.open_store(file, "16MiB", prefix="talker")
    write_checkpoint(tmp_path, block_of("model.layers.1.", 0), CONFIG)
    opened = CheckpointExperts(tmp_path, "model")
    for load in (
        lambda: mo.open_store(opened, "16MiB", prefix="model"),
        lambda: mo.MoeExpertStore.from_safetensors(opened, prefix="model", memory_limit=1 << 24),
    ):
        with pytest.raises(mo.ConfigError, match="prefix"):
            load()
    assert mo.open_store(opened, "16MiB").blocks == [1]


def test_drafts_of_a_model_with_dense_layers(tmp_path):
    """Blocks that draft count their layers anew: the rule of dense layers is the model's alone."""
    write_checkpoint(tmp_path, block_of("mtp.layers.0.", 2), CONFIG | {"mlp_only_layers": [0]})
    with mo.MoeLayer.from_safetensors(tmp_path, 0, prefix="mtp") as layer:
        assert seed_of(layer) == 2


def test_top_k(tmp_path):
    write_checkpoint(tmp_path, block_of("model.layers.1.", 0), CONFIG)
    x = normal(5, H)
    for top_k in (1, 3, E):
        with mo.MoeLayer.from_safetensors(tmp_path, 1, top_k=top_k) as layer:
            assert layer.config.top_k == top_k
            _, routing = layer(x, return_routing=True)
            assert routing.topk_ids.shape == (5, top_k)
    for bad in (0, E + 1, -1):
        with pytest.raises(mo.ConfigError, match="top_k"):
            mo.MoeLayer.from_safetensors(tmp_path, 1, top_k=bad)


def test_a_configuration_of_ones_own(tmp_path):
    """For a type that has no row, with config.json or without it."""
    write_checkpoint(tmp_path, block_of("model.layers.1.", 3), CONFIG)
    want = mo.MoeLayer.from_safetensors(tmp_path, 1)
    own = mo.MoeConfig.from_hf(CONFIG, 1)
    x = normal(5, H)
    for text in (json.dumps({"model_type": "of_tomorrow"}), json.dumps(CONFIG), None):
        (tmp_path / "config.json").unlink()
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with mo.MoeLayer.from_safetensors(tmp_path, 1, config=own) as layer:
            np.testing.assert_array_equal(layer(x), want(x))
        with mo.MoeLayer.from_safetensors(tmp_path, 1, config=own, top_k=1) as layer:
            assert layer.config.top_k == 1
        (tmp_path / "config.json").write_text("{}")
    other = own.replace(num_experts=E + 1, router=mo.RouterConfig(E + 1, 2))
    with pytest.raises(mo.FormatError, match="experts"):
        mo.MoeLayer.from_safetensors(tmp_path, 1, config=other)
    with pytest.raises(TypeError):
        mo.MoeLayer.from_safetensors(tmp_path, 1, config=CONFIG)


def test_biases_of_a_configuration_of_ones_own(tmp_path):
    """A bias that is stored counts, as nothing is left out."""
    bias = normal(E, seed=5, scale=0.1)
    tensors = block_of("model.layers.1.", 3)
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = bias
    write_checkpoint(tmp_path, tensors, {"model_type": "of_tomorrow"})
    own = mo.MoeConfig.from_hf(CONFIG, 1)
    own = own.replace(router=own.router.replace(score="sigmoid"))
    with mo.MoeLayer.from_safetensors(tmp_path, 1, config=own) as layer:
        np.testing.assert_array_equal(np.float32(layer.config.router.selection_bias), bias)

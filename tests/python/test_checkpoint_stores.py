"""Stores of safetensors checkpoints: experts that are read one by one are those of a whole load."""

import json
import pickle

import numpy as np
import pytest
from files import bf16_bits, write_checkpoint, write_safetensors
from hf_experts import codes, e8m0_scales, fp4
from test_hf_integers import ZERO_POINTS, Ints, gptq_config
from values import expert_weights, normal

import moesaic as mo
from moesaic.safetensors import CheckpointExperts
from moesaic.simulate import Disk, stored

E, H, I, TOP_K = 6, 256, 128, 2
BLOCKS = (1, 2)
ROLES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
FUSED = {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}
QWEN = {
    "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
    "num_experts_per_tok": TOP_K, "norm_topk_prob": True,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": H, "intermediate_size": I, "num_local_experts": E,
    "num_experts_per_tok": TOP_K,
}  # fmt: skip


class Written:
    """The tensors of a checkpoint of two layers, by name, and its configuration."""

    def __init__(self, config=QWEN, router="gate"):
        self.config, self.router = config, router
        self.tensors, self.types = {}, {}

    def add(self, tensors, types=None):
        self.tensors |= tensors
        self.types |= types or {}

    def write(self, folder):
        for block in BLOCKS:
            stem = f"model.layers.{block}.mlp.{self.router}"
            self.tensors[f"{stem}.weight"] = normal(E, H, seed=block)
            if self.router == "router":
                self.tensors[f"{stem}.bias"] = normal(E, seed=block)
        folder.mkdir(exist_ok=True)
        return write_checkpoint(folder, self.tensors, self.config, self.types)


def matrices(roles=ROLES):
    """The base, rows, columns and seed of each expert's matrices."""
    for block in BLOCKS:
        for e in range(E):
            for i, (name, (n, k)) in enumerate(roles.items()):
                yield f"model.layers.{block}.mlp.experts.{e}.{name}", n, k, 50 * block + 5 * e + i


def stacks(roles=FUSED):
    """The base, rows, columns and seed of tensors of all experts."""
    for block in BLOCKS:
        for i, (name, (n, k)) in enumerate(roles.items()):
            yield f"model.layers.{block}.mlp.experts.{name}", n, k, 50 * block + i


def floats(dtype):
    written = Written()
    for base, n, k, seed in matrices():
        values = normal(n, k, seed=seed, scale=k**-0.5)
        if dtype == "BF16":
            written.add({f"{base}.weight": bf16_bits(values)}, {f"{base}.weight": "BF16"})
        else:
            written.add({f"{base}.weight": values.astype(dtype)})
    return written


def fused(transposed):
    written = Written()
    for base, n, k, seed in stacks():
        values = bf16_bits(normal(E, n, k, seed=seed, scale=k**-0.5))
        values = values.swapaxes(1, 2) if transposed else values
        written.add({base: values}, {base: "BF16"})
    return written


def gpt_oss_floats():
    """Transposed, with rows of gate and up in turn, and biases."""
    written = Written(GPT_OSS, "router")
    for base, n, k, seed in stacks():
        written.add({f"{base}_bias": normal(E, n, seed=seed)})
        written.add({base: bf16_bits(normal(E, k, n, seed=seed, scale=k**-0.5))}, {base: "BF16"})
    return written


def gpt_oss_mxfp4():
    written = Written(GPT_OSS, "router")
    for base, n, k, seed in stacks():
        packed, scales = [], []
        for e in range(E):
            packed.append(fp4(n, k, seed + e)[0].reshape(n, k // 32, 16))
            scales.append(e8m0_scales((n, k // 32), seed + e)[0] - 3)
        written.add({
            f"{base}_blocks": np.stack(packed), f"{base}_scales": np.stack(scales),
            f"{base}_bias": normal(E, n, seed=seed),
        })  # fmt: skip
    return written


def fp8(block, dtype="f4", suffix="weight_scale_inv", kind="F8_E4M3"):
    """Codes with scales of blocks; 0: all rows or columns."""
    quantization = {"quant_method": "fp8", "weight_block_size": list(block) if all(block) else None}
    written = Written({**QWEN, "quantization_config": quantization})
    for base, n, k, seed in matrices():
        rows, cols = (b or size for b, size in zip(block, (n, k), strict=True))
        grid = (-(-n // rows), -(-k // cols))
        scales = np.random.default_rng(seed).uniform(1e-3, 2e-2, grid).astype(dtype)
        types = {f"{base}.weight": kind}
        data = codes((n, k), seed)
        if kind == "F8_E5M2":
            data[(data & 0x7C) == 0x7C] = 1
        if dtype == "u1":
            scales = np.random.default_rng(seed).integers(112, 124, grid).astype(np.uint8)
            types[f"{base}.{suffix}"] = "F8_E8M0"
        written.add({f"{base}.weight": data, f"{base}.{suffix}": scales}, types)
    return written


def fp8_fused(cols):
    """Gate and up in one tensor of all experts, with scales of blocks that start anew in up."""
    written = Written({**QWEN, "quantization_config": {"quant_method": "fp8"}})
    for base, n, k, seed in stacks():
        grid = (E, 2 * -(-(n // 2) // 48) if n == 2 * I else -(-n // 48), -(-k // cols))
        scales = np.random.default_rng(seed).uniform(1e-3, 2e-2, grid).astype(np.float32)
        written.config["quantization_config"]["weight_block_size"] = [48, cols]
        written.add({base: codes((E, n, k), seed), f"{base}_scale_inv": scales}, {base: "F8_E4M3"})
    return written


def bitsandbytes_int8():
    written = Written({**QWEN, "quantization_config": {"quant_method": "bitsandbytes"}})
    for base, n, k, seed in matrices():
        rng = np.random.default_rng(seed)
        written.add({
            f"{base}.weight": rng.integers(-127, 128, (n, k)).astype(np.int8),
            f"{base}.SCB": rng.uniform(0.1, 1, n).astype(np.float32),
        })  # fmt: skip
    return written


def nvfp4():
    written = Written()
    for base, n, k, seed in matrices():
        scale = codes((n, k // 16), seed) & 0x3F
        written.add({
            f"{base}.weight": fp4(n, k, seed)[0], f"{base}.weight_scale": scale,
            f"{base}.weight_scale_2": np.float32(2.0**-4 * (1 + seed % 3)),
        }, {f"{base}.weight_scale": "F8_E4M3"})  # fmt: skip
    return written


def packed(group, symmetric, scale=np.float16, bf16=False):
    scheme = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group",
        "group_size": group,
    }  # fmt: skip
    written = Written({**QWEN, "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": scheme, "targets": ["Linear"]}},
    }})  # fmt: skip
    for base, n, k, seed in matrices():
        one = Ints(n, k, seed, group=group, symmetric=symmetric, scale=scale)
        tensors = one.packed(base, zeros=not symmetric)
        types = {}
        if bf16:
            tensors[f"{base}.weight_scale"] = bf16_bits(one.scales)
            types[f"{base}.weight_scale"] = "BF16"
        written.add(tensors, types)
    return written


def gptq(symmetric, stored, config):
    written = Written({**QWEN, "quantization_config": gptq_config(**config)})
    for base, n, k, seed in matrices():
        written.add(Ints(n, k, seed, symmetric=symmetric).gptq(base, stored))
    return written


def awq():
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    written = Written({**QWEN, "quantization_config": {**quantization, "version": "gemm"}})
    for base, n, k, seed in matrices():
        written.add(Ints(n, k, seed, symmetric=False).awq(base))
    return written


FORMS = {
    "f32": lambda: floats("f4"),
    "f16": lambda: floats("f2"),
    "bf16": lambda: floats("BF16"),
    "fused": lambda: fused(transposed=False),
    "fused, transposed": lambda: fused(transposed=True),
    "gpt-oss": gpt_oss_floats,
    "gpt-oss MXFP4": gpt_oss_mxfp4,
    "FP8 of blocks": lambda: fp8((48, 32)),
    "FP8 of 128 columns": lambda: fp8((48, 128)),
    "FP8 of rows, f16 scales": lambda: fp8((1, 0), "f2"),
    "FP8 of tensors, f64 scales": lambda: fp8((0, 0), "f8", "weight_scale"),
    "FP8 E5M2": lambda: fp8((32, 32), kind="F8_E5M2"),
    "MXFP8": lambda: fp8((1, 32), "u1"),
    "FP8, fused": lambda: fp8_fused(32),
    "FP8 of 128 columns, fused": lambda: fp8_fused(128),
    "int8 of bitsandbytes": bitsandbytes_int8,
    "NVFP4": nvfp4,
    "4 bits in groups of 32": lambda: packed(32, symmetric=True),
    "4 bits in groups of 32, bf16": lambda: packed(32, True, np.float32, bf16=True),
    "4 bits in groups of 16": lambda: packed(16, symmetric=True),
    "4 bits, zero points": lambda: packed(32, symmetric=False),
    "4 bits, f32 scales": lambda: packed(64, symmetric=False, scale=np.float32),
    "GPTQ": lambda: gptq(False, -1, {"sym": False}),
    "AWQ": awq,
    **{f"GPTQ, {name}": lambda case=case: gptq(*case) for name, case in ZERO_POINTS.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_those_of_a_whole_load(tmp_path, form):
    folder = FORMS[form]().write(tmp_path)
    store = mo.MoeExpertStore.from_safetensors(folder, memory_limit=16 << 20)
    assert [view.layer_index for view in store.layers] == list(BLOCKS)
    for on_miss in ("compute", "stage"):
        for block in BLOCKS:
            whole = mo.MoeLayer.from_safetensors(folder, block)
            pool = mo.ExpertPool(E, 2)
            with mo.MoeLayer.from_store(store, block, pool, on_miss) as layer:
                assert layer.config == whole.config
                for tokens in (0, 1, 5, 40):
                    x = normal(tokens, H, seed=tokens)
                    np.testing.assert_array_equal(layer(x), whole(x))
                    np.testing.assert_array_equal(
                        layer(x, precision="fast"), whole(x, precision="fast")
                    )
            whole.close()
    assert store.io_stats()["bytes"] > 0


@pytest.fixture
def folder(tmp_path):
    return fp8((48, 32)).write(tmp_path / "model")


def test_open_store_takes_a_folder(folder):
    store = mo.open_store(folder, "16MiB", max_tokens=64)
    assert store.blocks == list(BLOCKS)
    for path in (folder / "model.safetensors", str(folder)):
        assert mo.open_store(path, "16MiB").blocks == list(BLOCKS)
    for block in BLOCKS:
        with store.layer(block) as layer, mo.MoeLayer.from_safetensors(folder, block) as whole:
            x = normal(9, H)
            np.testing.assert_array_equal(layer(x), whole(x))
            np.testing.assert_array_equal(
                layer.expert_rows(x, layer.route(x)), whole.expert_rows(x, whole.route(x))
            )
        with store.layer(block, top_k=1) as layer:
            assert layer(x, return_routing=True)[1].topk_ids.shape == (9, 1)
    memory = store.memory()
    assert memory["slots"] + memory["staging"] + memory["other"] <= memory["limit"] == 16 << 20
    assert store.hit_rate() > 0
    assert store.profile().counts.sum() > 0


# Any memory that is accepted is enough, buffers of what is stored and of what is decoded included.
def test_every_accepted_limit_holds(folder):
    opened = 0
    for limit in range(1 << 17, 3 << 20, 1 << 17):
        try:
            store = mo.open_store(folder, limit, max_tokens=4)
        except mo.ConfigError:
            assert not opened, "more memory was refused than less"
            continue
        opened += 1
        for block in BLOCKS:
            with store.layer(block) as layer:
                layer(normal(4, H))
        memory = store.memory()
        assert memory["slots"] + memory["staging"] + memory["other"] <= limit
    assert opened > 4


def test_what_is_prefetched_is_there(folder):
    store = mo.open_store(folder, "16MiB", read_ahead=0)
    store.prefetch(2, [3, 4])
    routing = mo.Routing(np.array([[3, 4]]), np.full((1, 2), 0.5, np.float32))
    with store.layer(2) as layer:
        layer(normal(1, H), routing=routing)
    stats = store.io_stats()
    assert stats["ahead"] == stats["ahead_used"] == 2


def test_shards_are_found_by_their_index(folder, tmp_path):
    written = fp8((48, 32))
    written.write(tmp_path / "again")
    index = {}
    for i in range(3):
        tensors = {n: t for k, (n, t) in enumerate(written.tensors.items()) if k % 3 == i}
        types = {name: written.types[name] for name in tensors if name in written.types}
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        write_safetensors(tmp_path / shard, tensors, types)
        index |= dict.fromkeys(tensors, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(written.config))
    x = normal(5, H)
    with (
        mo.open_store(tmp_path, "16MiB").layer(1) as layer,
        mo.MoeLayer.from_safetensors(folder, 1) as whole,
    ):
        np.testing.assert_array_equal(layer(x), whole(x))


def test_shared_experts_and_biases_come_from_the_checkpoint(tmp_path):
    written = floats("f4")
    written.config = {
        "model_type": "qwen2_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
        "num_experts_per_tok": TOP_K, "shared_expert_intermediate_size": 96,
        "norm_topk_prob": False,
    }  # fmt: skip
    for block in BLOCKS:
        stem = f"model.layers.{block}.mlp"
        gate, up, down = (part[0] for part in expert_weights(1, H, 96, seed=block))
        written.add({
            f"{stem}.shared_expert.gate_proj.weight": gate,
            f"{stem}.shared_expert.up_proj.weight": up,
            f"{stem}.shared_expert.down_proj.weight": down,
            f"{stem}.shared_expert_gate.weight": normal(1, H, seed=block),
        })  # fmt: skip
    folder = written.write(tmp_path)
    with (
        mo.open_store(folder, "16MiB").layer(2) as layer,
        mo.MoeLayer.from_safetensors(folder, 2) as whole,
    ):
        assert layer.shared is not None
        x = normal(5, H)
        np.testing.assert_array_equal(layer(x), whole(x))


def test_pickles_as_the_way_to_open_it(folder):
    store = mo.open_store(folder, "16MiB")
    pickled = pickle.dumps(store)
    x = normal(2, H)
    with pickle.loads(pickled).layer(1) as one, store.layer(1) as other:
        np.testing.assert_array_equal(one(x), other(x))
    fp8((64, 64)).write(folder)
    with pytest.raises(mo.FormatError, match="pickled"):
        pickle.loads(pickled)


@pytest.mark.parametrize("cols", [32, 128])
def test_what_is_no_number_is_an_error_of_the_call_that_reads_it(tmp_path, cols):
    written = fp8((48, cols))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    written.tensors[name][5, 7] = 0x7F
    store = mo.open_store(written.write(tmp_path), "16MiB", read_ahead=0)
    weights = np.ones((1, 1), np.float32)
    with store.layer(1) as layer:
        layer(normal(1, H), routing=mo.Routing(np.array([[2]]), weights))
        out = np.full((1, H), np.nan, np.float32)
        with pytest.raises(mo.FormatError, match=name.replace(".", r"\.")):
            layer(normal(1, H), routing=mo.Routing(np.array([[3]]), weights), out=out)
        assert np.isnan(out).all()
    with pytest.raises(mo.FormatError, match=r"experts\.3\.up_proj"):
        mo.MoeLayer.from_safetensors(tmp_path, 1)


def ordered_columns():
    written = gptq(False, -1, {"sym": False, "desc_act": True})
    for name, order in written.tensors.items():
        if name.endswith("g_idx"):
            written.tensors[name] = np.ascontiguousarray(order[::-1])
    return written


def mixed():
    written = fp8((48, 32))
    base = "model.layers.2.mlp.experts.4.up_proj"
    del written.tensors[f"{base}.weight_scale_inv"], written.types[f"{base}.weight"]
    written.tensors[f"{base}.weight"] = normal(I, H)
    return written


REFUSED = {
    "f64": (lambda: floats("f8"), r"experts\.0\.gate_proj.*F64"),
    "columns in an order": (ordered_columns, r"g?.*experts\.0\..*order"),
    "several forms": (mixed, "several forms|another"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_one_by_one_says_which_and_the_way_out(tmp_path, kind):
    make, message = REFUSED[kind]
    folder = make().write(tmp_path)
    with pytest.raises(mo.UnsupportedError, match=message) as caught:
        mo.open_store(folder, "16MiB")
    assert "moesaic convert" in str(caught.value)
    mo.MoeLayer.from_safetensors(folder, 1).close()  # which reads it as a whole


def test_fp8_stays_8_bits_where_blocks_fit(tmp_path):
    folder = fp8((48, 128)).write(tmp_path)
    view = mo.MoeExpertStore.from_safetensors(folder, memory_limit=1 << 22).layers[0]
    assert {view.gate.quant, view.up.quant, view.down.quant} == {"E4M3"}
    assert view.expert_bytes == 3 * H * I * 132 // 128


def test_what_a_miss_costs_is_measured(folder):
    """Every expert of a cold call is read and decoded anew; FP8 becomes BF16, twice as large."""
    source = CheckpointExperts(folder)
    store, few = stored._store_of(source)
    assert few == E and store.reading.startswith("page cache")
    with mo.MoeLayer.from_store(store, BLOCKS[0], mo.ExpertPool(E, 0)) as layer:
        stored._Calls(layer.config, few).median(layer)
    stats = store.io_stats()
    sizes = source.layers[0]["ranges"][:, :, 2].sum(axis=1)
    assert stats["bytes"] == 40 * TOP_K * sizes[0]
    costs = stored.measure_costs(source, Disk(1e9))
    assert costs.expert_bytes == 3 * 2 * H * I
    assert costs.stored_bytes == sizes[0] < 0.6 * costs.expert_bytes
    for measured in (costs.fast, costs.slow, costs.move, costs.fixed):
        assert 0 < measured < np.inf


def test_experts_have_no_bytes_outside_of_calls(folder):
    store = mo.MoeExpertStore.from_safetensors(folder, memory_limit=1 << 20)
    view = store.layers[0]
    assert view.up.quant == "BF16" and view.expert_bytes == 3 * 2 * H * I
    with pytest.raises(mo.UnsupportedError, match="load_from_safetensors"):
        view.up.expert_slice(0)
    with pytest.raises(mo.UnsupportedError):
        view.up.as_slice()
    assert view.stack.experts == []
    with pytest.raises(mo.ConfigError, match="memory_limit"):
        mo.MoeExpertStore.from_safetensors(folder, memory_limit=1000)


def test_a_folder_without_experts(tmp_path):
    write_checkpoint(tmp_path, {"model.norm.weight": normal(H)}, QWEN)
    with pytest.raises(mo.FormatError, match="experts"):
        mo.open_store(tmp_path, "16MiB")
    with pytest.raises(FileNotFoundError):
        mo.open_store(tmp_path / "none", "16MiB")

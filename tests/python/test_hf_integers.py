"""Experts of integers in groups: every tool's layout, bits and rules for single matrices."""

import json

import numpy as np
import pytest
from files import bf16_bits, write_checkpoint, write_safetensors
from int4 import AWQ_ORDER
from oracle import moe_f64, rel_l2
from values import normal, random_routing

import moesaic as mo

E, H, I, LAYER, GROUP = 3, 128, 64, 1, 32
BLOCK = f"model.layers.{LAYER}.mlp"
BASE = f"{BLOCK}.experts"
ROLES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


def stream(codes, bits):
    """Codes of any number of bits along the last axis, low bits first, as words i32."""
    count = codes.shape[-1]
    out = np.zeros((*codes.shape[:-1], -(-count * bits // 32)), np.uint64)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        value = codes[..., i].astype(np.uint64) << np.uint64(shift)
        out[..., word] |= value & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            out[..., word + 1] |= value >> np.uint64(32)
    return out.astype(np.uint32).view(np.int32)


def padded(codes, bits):
    """Codes of 3, 5, 6 or 7 bits that keep within words."""
    per_word = 32 // bits
    out = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word)), np.uint32)
    for i in range(codes.shape[-1]):
        out[..., i // per_word] |= codes[..., i].astype(np.uint32) << np.uint32(i % per_word * bits)
    return out.view(np.int32)


class Ints:
    """Random codes [n, k], zero points and scales [n, groups], and what they mean."""

    def __init__(self, n, k, seed, *, bits=4, group=GROUP, symmetric=True, scale=np.float16):
        rng = np.random.default_rng(seed)
        self.n, self.k, self.bits, self.group = n, k, bits, k if group == -1 else group
        self.codes = rng.integers(0, 1 << bits, (n, k))
        count = -(-k // self.group)
        middle = 1 << (bits - 1)
        self.zeros = np.full((n, count), middle)
        if not symmetric:
            self.zeros = rng.integers(1, 1 << bits, (n, count))
        self.scales = rng.uniform(0.001, 0.01, (n, count)).astype(scale)
        columns = np.arange(k) // self.group
        self.values = (self.codes - self.zeros[:, columns]) * self.scales.astype(np.float64)[
            :, columns
        ]

    def gptq(self, base, stored=-1):
        """``stored`` is added to the zero points."""
        return {
            f"{base}.qweight": stream(self.codes.T.swapaxes(0, 1), self.bits).T,
            f"{base}.qzeros": stream((self.zeros + stored).T, self.bits),
            f"{base}.scales": self.scales.T,
            f"{base}.g_idx": (np.arange(self.k) // self.group).astype(np.int32),
        }

    def awq(self, base):
        def words(values):
            return stream(values.reshape(len(values), -1, 8)[..., AWQ_ORDER].reshape(
                values.shape), 4)  # fmt: skip

        return {
            f"{base}.qweight": words(self.codes.T),
            f"{base}.qzeros": words(self.zeros.T),
            f"{base}.scales": self.scales.T,
        }

    def packed(self, base, zeros=False, pack=stream, sep=".weight_"):
        out = {
            f"{base}{sep}packed": pack(self.codes, self.bits),
            f"{base}{sep}scale": self.scales,
            f"{base}{sep}shape": np.array([self.n, self.k], np.int64),
        }
        if zeros:
            out[f"{base}{sep}zero_point"] = pack(self.zeros.T, self.bits).T
        return out


def experts(recipe=lambda e, name: {}):
    """Matrices by expert and part; ``recipe`` gives what is special of one."""
    return {
        (e, name): Ints(n, k, 100 * e + i, **recipe(e, name))
        for e in range(E)
        for i, (name, (n, k)) in enumerate(ROLES.items())
    }


def check(folder, matrices, tolerance=1e-6, dequantize=None):
    """``matrices``: Ints or values by expert and part."""
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER, dequantize)
    for (e, name), one in matrices.items():
        got = stack.dequantize(name.split("_")[0], e)
        want = one.values if isinstance(one, Ints) else one
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)
    return stack


def write(folder, tensors, quantization, **config):
    base = {"model_type": "qwen3_moe", "num_experts": E}
    return write_checkpoint(
        folder, tensors, {**base, "quantization_config": quantization, **config}
    )


def gptq_config(**changes):
    base = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    return {k: v for k, v in {**base, **changes}.items() if v is not ...}


# What is stored beside the true zero point, and what the configuration says.
ZERO_POINTS = {
    "sym, one below": (True, -1, {}),
    "sym, the middle itself": (True, 0, {}),
    "sym, gptq_v2": (True, 0, {"checkpoint_format": "gptq_v2"}),
    "sym, gptq_v2, one below": (True, -1, {"checkpoint_format": "gptq_v2"}),
    "nothing said, gptq_v2": (True, 0, {"sym": ..., "checkpoint_format": "gptq_v2"}),
    "nothing said, gptq_v2, one below": (True, -1, {"sym": ..., "checkpoint_format": "gptq_v2"}),
    "nothing said, one below": (True, -1, {"sym": ...}),
    "nothing said, the middle itself": (True, 0, {"sym": ...}),
    "nothing said, asymmetric": (False, -1, {"sym": ...}),
    "asymmetric": (False, -1, {"sym": False}),
    "asymmetric, gptq_v2": (False, 0, {"sym": False, "checkpoint_format": "gptq_v2"}),
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("case", ZERO_POINTS)
def test_zero_points_of_gptq(tmp_path, case, bits):
    symmetric, stored, changes = ZERO_POINTS[case]
    matrices = experts(lambda e, name: {"bits": bits, "symmetric": symmetric})
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= one.gptq(f"{BASE}.{e}.{name}", stored)
    folder = write(tmp_path, tensors, gptq_config(bits=bits, **changes))
    stack = check(folder, matrices, 1e-6 if bits < 8 else 2.0**-8)
    assert stack.kind == ("marlin" if bits == 4 else "stacked")
    check(folder, matrices, 1e-6, "f32")


def test_zero_points_that_contradict_sym(tmp_path):
    matrices = experts(lambda e, name: {"bits": 8, "symmetric": False})
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= one.gptq(f"{BASE}.{e}.{name}")
    with pytest.raises(mo.FormatError, match=r"qzeros.*sym=true"):
        check(write(tmp_path, tensors, gptq_config(bits=8)), matrices)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "form", ["auto_round:auto_gptq", "auto_round:auto_awq", None, "gptq", "awq"]
)
def test_auto_round(tmp_path, form, symmetric):
    matrices = experts(lambda e, name: {"symmetric": symmetric})
    tensors = {}
    for (e, name), one in matrices.items():
        base = f"{BASE}.{e}.{name}"
        tensors |= one.awq(base) if form and "awq" in form else one.gptq(base)
    config = {"bits": 4, "group_size": GROUP, "sym": symmetric, "data_type": "int"}
    if form in ("gptq", "awq"):
        config["quant_method"] = form
    else:
        config |= {"quant_method": "auto-round"} | ({"packing_format": form} if form else {})
    check(write(tmp_path, tensors, config), matrices)


def test_unknown_packing_of_auto_round(tmp_path):
    tensors = {}
    for (e, name), one in experts().items():
        tensors |= one.gptq(f"{BASE}.{e}.{name}")
    config = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:new"}
    with pytest.raises(mo.UnsupportedError, match="packing_format"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, config), LAYER)


DOWN = r".*\.down_proj"
RULES = {
    "GPTQModel": {"dynamic": {r"-:.*\.self_attn\..*": {}, f"+:{DOWN}": {"bits": 8}}},
    "GPTQModel, no sign": {"dynamic": {DOWN: {"bits": 8}}},
    "GPTQModel, the first that matches": {
        "dynamic": {DOWN: {"bits": 8}, r".*experts.*": {"bits": 4}}
    },
    "AutoRound, by names": {
        "quant_method": "auto-round",
        "extra_config": {f"{BASE}.{e}.down_proj": {"bits": 8} for e in range(E)},
    },
    "AutoRound, by an expression": {
        "quant_method": "auto-round",
        "extra_config": {r"layers\.1\..*down_proj": {"bits": 8}},
    },
}


@pytest.mark.parametrize("case", RULES)
def test_rules_for_some_matrices(tmp_path, case):
    matrices = experts(lambda e, name: {"bits": 8 if name == "down_proj" else 4})
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= one.gptq(f"{BASE}.{e}.{name}")
    folder = write(tmp_path, tensors, gptq_config(**RULES[case]))
    assert check(folder, matrices).quants == {"gate": "Q4_0", "up": "Q4_0", "down": "Q8_0"}


def scheme(**weights):
    given = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", **weights}
    return {"group_size": GROUP, **given}


def compressed(*groups, **more):
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    base = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**base, "config_groups": named, **more}


EIGHT, FOUR = scheme(num_bits=8), scheme()
FP8 = {"weights": {"num_bits": 8, "type": "float"}, "format": "float-quantized"}
TARGETS = {
    "expressions": compressed(
        {"weights": FOUR, "targets": ["re:.*(gate|up)_proj"]},
        {"weights": EIGHT, "targets": ["re:.*down_proj"]},
    ),
    "an expression before a class": compressed(
        {"weights": FOUR, "targets": ["Linear"]},
        {"weights": EIGHT, "targets": ["re:.*down_proj"]},
    ),
    "names before expressions": compressed(
        {"weights": FOUR, "targets": ["re:.*experts.*"]},
        {"weights": EIGHT, "targets": [f"{BASE}.{e}.down_proj" for e in range(E)]},
    ),
    "names of the model before it was renamed": compressed(
        {"weights": FOUR, "targets": ["Linear"]},
        {"weights": EIGHT, "targets": [
            f"model.language_model.layers.1.mlp.experts.{e}.down_proj" for e in range(E)
        ]},
    ),
    "a format of the group": compressed(
        FP8 | {"targets": ["re:.*self_attn.*"]},
        {"weights": FOUR, "targets": ["re:.*(gate|up)_proj"], "format": "pack-quantized"},
        {"weights": EIGHT, "targets": ["re:.*down_proj"], "format": "pack-quantized"},
        format="mixed-precision",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_several_groups(tmp_path, case):
    matrices = experts(lambda e, name: {"bits": 8 if name == "down_proj" else 4})
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= one.packed(f"{BASE}.{e}.{name}")
    check(write(tmp_path, tensors, TARGETS[case]), matrices)


BAD_GROUPS = {
    "none matches": compressed(
        {"weights": FOUR, "targets": ["re:.*self_attn.*"]},
        {"weights": EIGHT, "targets": ["re:.*lm_head"]},
    ),
    "two match": compressed(
        {"weights": FOUR, "targets": ["Linear"]}, {"weights": EIGHT, "targets": ["Linear"]}
    ),
    "no expression": compressed({"weights": FOUR, "targets": ["re:*("]}),
    "no names": compressed({"weights": FOUR, "targets": [3]}),
    "no list": compressed({"weights": FOUR, "targets": "Linear"}),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_groups_without_an_answer(tmp_path, case):
    tensors = {}
    for (e, name), one in experts().items():
        tensors |= one.packed(f"{BASE}.{e}.{name}")
    with pytest.raises(mo.Error, match="config_groups"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, BAD_GROUPS[case]), LAYER)


@pytest.mark.parametrize("pack", [stream, padded], ids=["dense", "padded"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [GROUP, -1, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bits_of_compressed_tensors(tmp_path, bits, group, symmetric, pack):
    recipe = {"bits": bits, "group": group, "symmetric": symmetric}
    matrices = experts(lambda e, name: recipe)
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= one.packed(f"{BASE}.{e}.{name}", not symmetric, pack)
    weights = scheme(num_bits=bits, symmetric=symmetric, group_size=group)
    if group == -1:
        weights |= {"strategy": "channel", "group_size": None}
    folder = write(tmp_path, tensors, compressed({"weights": weights, "targets": ["Linear"]}))
    check(folder, matrices, 2.0**-8)
    check(folder, matrices, 1e-6, "f32")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_in_bytes(tmp_path, symmetric, bits):
    """Older compressed-tensors: signed, and there for symmetric ones too."""
    matrices = experts(lambda e, name: {"bits": bits, "symmetric": symmetric})
    tensors = {}
    for (e, name), one in matrices.items():
        base = f"{BASE}.{e}.{name}"
        zeros = (one.zeros - (1 << (bits - 1))).astype(np.int8)
        tensors |= one.packed(base) | {f"{base}.weight_zero_point": zeros}
    weights = scheme(num_bits=bits, symmetric=symmetric)
    folder = write(tmp_path, tensors, compressed({"weights": weights, "targets": ["Linear"]}))
    check(folder, matrices, 2.0**-8)
    check(folder, matrices, 1e-6, "f32")


def test_scales_in_bf16(tmp_path):
    matrices = experts(lambda e, name: {"bits": 8, "scale": np.float32})
    tensors, types = {}, {}
    for (e, name), one in matrices.items():
        base = f"{BASE}.{e}.{name}"
        bits = bf16_bits(one.scales)
        real = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        one.values = (one.codes - 128) * np.repeat(real, GROUP, 1)
        tensors |= one.packed(base) | {f"{base}.weight_scale": bits}
        types[f"{base}.weight_scale"] = "BF16"
    config = {
        "num_experts": E,
        "quantization_config": compressed({"weights": EIGHT, "targets": ["Linear"]}),
    }
    stack = check(write_checkpoint(tmp_path, tensors, config, types), matrices)
    assert set(stack.quants.values()) == {"Q8_0"}


STACKED = {"compressed-tensors": ".weight_", "llm-compressor": "_", "both": "_weight_"}


@pytest.mark.parametrize("group", [GROUP, 64], ids=["Q4_0", "INT4"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("case", STACKED)
def test_experts_in_one_tensor(tmp_path, case, model_type, group):
    gate_up = [Ints(2 * I, H, e, group=group) for e in range(E)]
    down = [Ints(H, I, 50 + e, group=group) for e in range(E)]
    tensors = {}
    for name, ones in (("gate_up_proj", gate_up), ("down_proj", down)):
        each = [one.packed(f"{BASE}.{name}", sep=STACKED[case]) for one in ones]
        for tensor in each[0]:
            shape = tensor.endswith("shape")
            tensors[tensor] = each[0][tensor] if shape else np.stack([t[tensor] for t in each])
    folder = write(
        tmp_path,
        tensors,
        compressed({"weights": scheme(group_size=group), "targets": ["Linear"]}),
        model_type=model_type,
        num_local_experts=E,
    )
    halves = (slice(I), slice(I, None)) if model_type == "qwen3_moe" else (
        slice(0, None, 2), slice(1, None, 2))  # fmt: skip
    matrices = {(e, "down_proj"): down[e] for e in range(E)}
    for e in range(E):
        matrices[e, "gate_proj"], matrices[e, "up_proj"] = (gate_up[e].values[h] for h in halves)
    stack = check(folder, matrices)
    marlin = group == 64 and model_type == "qwen3_moe"
    assert stack.kind == ("marlin" if marlin else "stacked")


def test_experts_behind_their_part(tmp_path):
    """ModelOpt: experts.gate_proj.0.weight."""
    rng = np.random.default_rng(0)
    matrices, tensors = {}, {}
    for name, (n, k) in ROLES.items():
        for e in range(E):
            matrices[e, name] = rng.standard_normal((n, k)).astype(np.float32)
            tensors[f"{BASE}.{name}.{e}.weight"] = matrices[e, name]
    check(write(tmp_path, tensors, None), matrices)
    del tensors[f"{BASE}.up_proj.1.weight"]
    with pytest.raises(mo.FormatError, match=r"experts\.up_proj\.1\.weight"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors, None), LAYER)


@pytest.mark.parametrize("name", ["gate_up_proj.{}", "gate_up_projs.{}", "{}.gate_up_proj"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
def test_rows_that_alternate(tmp_path, name, model_type):
    """gpt-oss by expert: slices of its tensor alternate, modules of other names may or may not."""
    rng = np.random.default_rng(0)
    matrices, tensors = {}, {}
    odd = model_type == "gpt_oss"
    for e in range(E):
        fused = rng.standard_normal((2 * I, H)).astype(np.float32)
        matrices[e, "gate_proj"] = fused[0::2] if odd else fused[:I]
        matrices[e, "up_proj"] = fused[1::2] if odd else fused[I:]
        matrices[e, "down_proj"] = rng.standard_normal((H, I)).astype(np.float32)
        tensors[f"{BASE}.{name.format(e)}.weight"] = fused
        down = name.replace("gate_up", "down").format(e)
        tensors[f"{BASE}.{down}.weight"] = matrices[e, "down_proj"]
    folder = write(tmp_path, tensors, None, model_type=model_type, num_local_experts=E)
    if odd and name.startswith("{}"):
        with pytest.raises(mo.UnsupportedError, match=r"experts\.0\.gate_up_proj.*alternate"):
            mo.ExpertStack.load_from_safetensors(folder, LAYER)
    else:
        check(folder, matrices)


@pytest.mark.parametrize("left", [0, E - 1])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, "BF16"])
@pytest.mark.parametrize("form", ["gptq", "awq", "packed"])
def test_an_expert_left_in_floats(tmp_path, form, dtype, left):
    matrices = experts()
    tensors, types = {}, {}
    for (e, name), one in list(matrices.items()):
        base = f"{BASE}.{e}.{name}"
        if e != left:
            tensors |= getattr(one, form)(base)
            continue
        types |= {f"{base}.weight": "BF16"} if dtype == "BF16" else {}
        values = one.values.astype(np.float32 if dtype == "BF16" else dtype)
        if dtype == "BF16":
            tensors[f"{base}.weight"] = bf16_bits(values)
            values = (bf16_bits(values).astype(np.uint32) << 16).view(np.float32)
        else:
            tensors[f"{base}.weight"] = values
        matrices[e, name] = values.astype(np.float64)
    config = {
        "gptq": gptq_config(),
        "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
        "packed": compressed({"weights": FOUR, "targets": ["Linear"]}),
    }[form]
    model = {"model_type": "qwen3_moe", "num_experts": E, "quantization_config": config}
    folder = write_checkpoint(tmp_path, tensors, model, types)
    check(folder, matrices, 2.0**-8)
    check(folder, matrices, 1e-6, "f32")


def test_gptq_without_gates(tmp_path):
    matrices = {key: one for key, one in experts().items() if key[1] != "gate_proj"}
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= one.gptq(f"{BASE}.{e}.{name}")
    stack = check(write(tmp_path, tensors, gptq_config()), matrices)
    assert not stack.gated and set(stack.quants.values()) == {"Q4_0"}


QUANTISED_ROUTERS = {
    "gptq": lambda one: one.gptq(f"{BLOCK}.gate"),
    "packed": lambda one: one.packed(f"{BLOCK}.gate"),
}


@pytest.mark.parametrize("form", QUANTISED_ROUTERS)
def test_a_quantised_router(tmp_path, form):
    one, count = Ints(8, H, 9), 8
    rng = np.random.default_rng(1)
    tensors = QUANTISED_ROUTERS[form](one)
    for name, (n, k) in ROLES.items():
        for e in range(count):
            weight = rng.standard_normal((n, k)).astype(np.float32)
            tensors[f"{BASE}.{e}.{name}.weight"] = weight
    config = {
        "model_type": "qwen3_moe", "hidden_size": H, "num_experts": count, "hidden_act": "silu",
        "num_experts_per_tok": 2, "moe_intermediate_size": I, "num_hidden_layers": 2,
        "quantization_config": gptq_config() if form == "gptq" else compressed(
            {"weights": FOUR, "targets": ["Linear"]}
        ),
    }  # fmt: skip
    layer = mo.MoeLayer.from_safetensors(write_checkpoint(tmp_path, tensors, config), LAYER)
    np.testing.assert_allclose(layer.router_weight, one.values, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": 9}, "bits"),
        ({"bits": 8}, "at 8 bits"),
        ({"dynamic": {"-:.*experts.*": {}}}, "dynamic"),
        ({"dynamic": {".*": 3}}, "dynamic"),
        ({"dynamic": {"(": {}}}, "dynamic"),
        ({"dynamic": 3}, "dynamic"),
        ({"data_type": "nv_fp"}, "data_type"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, changes, match):
    tensors = {}
    for (e, name), one in experts().items():
        tensors |= one.gptq(f"{BASE}.{e}.{name}")
    with pytest.raises(mo.Error, match=match):
        mo.ExpertStack.load_from_safetensors(
            write(tmp_path, tensors, gptq_config(**changes)), LAYER
        )


def test_configuration_of_older_tools(tmp_path):
    matrices = experts()
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= one.awq(f"{BASE}.{e}.{name}")
    write_safetensors(tmp_path / "model.safetensors", tensors)
    config = {"w_bit": 4, "q_group_size": GROUP, "zero_point": True, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(config))
    check(tmp_path, matrices)


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "in one tensor"])
@pytest.mark.parametrize("group", [GROUP, 64, -1])
def test_factors_on_the_outputs_of_experts(tmp_path, group, stacked):
    """Gemma 4 keeps them beside its router; INT4 takes them into its scales."""
    matrices = experts(lambda e, name: {"group": group})
    factors = np.array([0.5, 1.7, -3], np.float32)
    layer = f"model.layers.{LAYER}"
    tensors = {
        f"{layer}.router.proj.weight": np.eye(E, H, dtype=np.float32),
        f"{layer}.router.scale": np.ones(H, np.float32),
        f"{layer}.router.per_expert_scale": factors,
        f"{layer}.pre_feedforward_layernorm_2.weight": np.ones(H, np.float32),
    }
    for (e, name), one in matrices.items():
        if not stacked:
            tensors |= one.packed(f"{layer}.experts.{e}.{name}")
    if stacked:
        for name, parts in (
            ("gate_up_proj", ("gate_proj", "up_proj")),
            ("down_proj", ("down_proj",)),
        ):
            for kind in ("packed", "scale"):
                tensors[f"{layer}.experts.{name}_{kind}"] = np.stack(
                    [
                        np.concatenate(
                            [matrices[e, part].packed("x")[f"x.weight_{kind}"] for part in parts]
                        )
                        for e in range(E)
                    ]
                )
    weights = scheme(strategy="channel", group_size=None) if group == -1 else scheme(
        group_size=group)  # fmt: skip
    config = {
        "model_type": "gemma4_text", "hidden_size": H, "num_experts": E, "top_k_experts": 2,
        "moe_intermediate_size": I, "num_hidden_layers": 2, "enable_moe_block": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "quantization_config": compressed({"weights": weights, "targets": ["Linear"]}),
    }  # fmt: skip
    got = mo.MoeLayer.from_safetensors(write_checkpoint(tmp_path, tensors, config), LAYER)
    gate, up, down = (np.stack([matrices[e, name].values for e in range(E)]) for name in ROLES)
    x, routing = normal(5, H), random_routing(5, E, 2)
    ids, shares = np.asarray(routing.topk_ids), np.asarray(routing.topk_weights)
    want = moe_f64(x, ids, shares * factors[ids], gate, up, down)
    assert rel_l2(mo.moe_forward_cpu(x, routing, got.stack), want) < 1e-5
    bare = mo.ExpertStack.load_from_safetensors(tmp_path, LAYER)
    assert rel_l2(mo.moe_forward_cpu(x, routing, bare), want) < 1e-5


@pytest.mark.parametrize("same", ["none", "gate alone", "both"])
def test_gate_and_up_in_orders_of_their_own(tmp_path, same):
    """Stacks of INT4 have one order for both; columns in two orders are decoded."""
    matrices, tensors = experts(), {}
    for (e, name), one in matrices.items():
        base = f"{BASE}.{e}.{name}"
        tensors |= one.gptq(base)
        if name == "down_proj" or (same == "gate alone" and name == "up_proj"):
            continue
        seed = e if same == "both" else 10 * e + len(name)
        order = np.random.default_rng(seed).permutation(one.k) // one.group
        tensors[f"{base}.g_idx"] = order.astype(np.int32)
        scales = one.scales.astype(np.float64)
        one.values = (one.codes - one.zeros[:, order]) * scales[:, order]
    folder = write(tmp_path, tensors, gptq_config(desc_act=True))
    stack = check(folder, matrices, 1e-6 if same == "both" else 2.0**-8)
    assert stack.kind == ("marlin" if same == "both" else "stacked")
    check(folder, matrices, 1e-6, "f32")


def gemv(one, base):
    """AWQ's layout for single tokens, as AutoAWQ writes it: by rows, filled up with zeros."""
    words = -(-one.zeros.shape[1] // 8)
    together = {64: 2, 32: 4}.get(one.group, 1)
    words = -(-words // together) * together
    scales = np.zeros((one.n, 8 * words), np.float16)
    scales[:, : one.scales.shape[1]] = one.scales
    zeros = np.zeros((one.n, 8 * words), int)
    zeros[:, : one.zeros.shape[1]] = one.zeros
    return {
        f"{base}.qweight": stream(one.codes, 4),
        f"{base}.qzeros": stream(zeros, 4),
        f"{base}.scales": scales,
    }


@pytest.mark.parametrize("bias", [False, True], ids=["marlin", "blocks"])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_awq_for_single_tokens(tmp_path, group, bias):
    matrices = experts(lambda e, name: {"group": group, "symmetric": False})
    tensors = {}
    for (e, name), one in matrices.items():
        tensors |= gemv(one, f"{BASE}.{e}.{name}")
    if bias:
        tensors |= {f"{BASE}.{e}.up_proj.bias": np.ones(I, np.float16) for e in range(E)}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    stack = check(write(tmp_path, tensors, config | {"version": "gemv"}), matrices)
    assert stack.kind == ("stacked" if bias else "marlin")
    folder = write(tmp_path, tensors, config | {"version": "gemv_fast"})
    with pytest.raises(
        mo.UnsupportedError, match="version: expected gemm or gemv, got 'gemv_fast'"
    ):
        mo.ExpertStack.load_from_safetensors(folder, LAYER)

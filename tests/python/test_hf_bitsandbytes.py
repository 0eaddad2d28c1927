"""Experts as bitsandbytes stores them: 4 bits in blocks, 8 bits in rows."""

import json

import numpy as np
import pytest
from hf_experts import BASE, LAYER, QWEN, E, H, I, check, write

import moesaic as mo

#: The table of nf4 as its authors publish it, and fp4: 2^-7.58 and thirds.
NF4 = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
FP4 = np.float32([0, 0.0052083335, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25])
FP4 = np.concatenate([FP4, -FP4])
SHAPES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}


def state_of(kind, shape, block, dtype, **more):
    facts = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(shape), **more}
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)


def four_bits(name, shape, kind="nf4", block=64, dtype="bfloat16", nested=False, seed=0):
    """The tensors of one matrix, and its values in f32."""
    rng = np.random.default_rng(seed)
    table = NF4 if kind == "nf4" else FP4
    codes = rng.integers(0, 16, shape[0] * shape[1]).astype(np.uint8)
    blocks = -(-len(codes) // block)
    tensors = {
        f"{name}.weight": (codes[0::2] << 4 | codes[1::2])[:, None],
        f"{name}.weight.quant_map": table,
    }
    more = {}
    if nested:
        absmax = rng.integers(0, 256, blocks).astype(np.uint8)
        scales = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
        nested_map = np.linspace(-1, 1, 256).astype(np.float32)
        more = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
        tensors |= {
            f"{name}.weight.nested_absmax": scales,
            f"{name}.weight.nested_quant_map": nested_map,
        }
        magnitudes = nested_map[absmax] * scales[np.arange(blocks) // 256] + np.float32(0.03)
    else:
        absmax = magnitudes = rng.uniform(0.02, 0.05, blocks).astype(np.float32)
    tensors[f"{name}.weight.absmax"] = absmax
    state = state_of(kind, shape, block, dtype, **more)
    tensors[f"{name}.weight.quant_state.bitsandbytes__{kind}"] = state
    values = table[codes] * magnitudes.astype(np.float32)[np.arange(len(codes)) // block]
    return tensors, values.reshape(shape)


def experts(**form):
    tensors, values = {}, {name: [] for name in QWEN}
    for e in range(E):
        for i, name in enumerate(QWEN):
            more, one = four_bits(f"{BASE}.{e}.{name}", SHAPES[name], seed=3 * e + i, **form)
            tensors |= more
            values[name].append(one)
    return tensors, [np.stack(values[name]) for name in QWEN]


def rounded(values, dtype):
    if dtype != "bfloat16":
        return values.astype(dtype).astype(np.float32)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_four_bits(tmp_path, kind, dtype, nested):
    tensors, want = experts(kind=kind, dtype=dtype, nested=nested)
    folder = write(tmp_path, tensors, quantization_config={"quant_method": "bitsandbytes"})
    stack = mo.ExpertStack.load_from_safetensors(folder, LAYER)
    check(stack, [rounded(one, dtype) for one in want])
    check(mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32"), want)
    assert "bitsandbytes" in str(stack.report)


def test_blocks_may_go_over_rows(tmp_path):
    tensors, want = experts(block=4096)
    check(mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER, "f32"), want)


def test_eight_bits(tmp_path):
    rng = np.random.default_rng(1)
    tensors, want = {}, []
    for name in QWEN:
        codes = rng.integers(-127, 128, (E, *SHAPES[name])).astype(np.int8)
        largest = rng.uniform(0.1, 1, (E, SHAPES[name][0])).astype(np.float32)
        for e in range(E):
            base = f"{BASE}.{e}.{name}"
            tensors |= {
                f"{base}.weight": codes[e], f"{base}.SCB": largest[e],
                f"{base}.weight_format": np.array(0, np.uint8),
            }  # fmt: skip
        want.append(codes * (largest.astype(np.float64) / 127)[..., None])
    folder = write(tmp_path, tensors, quantization_config={"quant_method": "bitsandbytes"})
    check(mo.ExpertStack.load_from_safetensors(folder, LAYER, "f32"), want, exact=3e-7)
    check(mo.ExpertStack.load_from_safetensors(folder, LAYER), want, exact=2**-8)
    tensors[f"{BASE}.1.up_proj.weight_format"] = np.array(2, np.uint8)
    with pytest.raises(mo.UnsupportedError, match=r"1\.up_proj\.weight_format"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


WRONG = {
    "shape": {"shape": [I, H, 1]}, "number": {"shape": [I + 1, H]}, "block": {"blocksize": 0},
    "type": {"dtype": "int4"}, "large": {"shape": [1 << 40, 1 << 40]},
    "nested": {"nested_blocksize": -1}, "offset": {"nested_blocksize": 256, "nested_offset": None},
    "infinite": {"nested_blocksize": 256, "nested_offset": float("inf")},
}  # fmt: skip


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_descriptions(tmp_path, change):
    tensors, _ = experts()
    name = f"{BASE}.1.up_proj.weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(tensors[name].tobytes()) | change
    tensors[name] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with pytest.raises(mo.FormatError, match=r"1\.up_proj\.weight"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)


@pytest.mark.parametrize("part", ["absmax", "quant_map"])
def test_missing_parts(tmp_path, part):
    tensors, _ = experts()
    del tensors[f"{BASE}.1.up_proj.weight.{part}"]
    with pytest.raises(mo.FormatError, match=rf"1\.up_proj\.weight\.{part}"):
        mo.ExpertStack.load_from_safetensors(write(tmp_path, tensors), LAYER)

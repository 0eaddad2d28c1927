#!/usr/bin/env python3
"""Writes quant_golden.bin: random blocks of every type and their f32 values by the `gguf` package.

Per type, little-endian: u32 type id, u32 blocks, u32 bytes per block, u32 weights per block, then
the bytes of all blocks, then the weights of all blocks as f32. Of the four blocks, the first has a
moderate scale, the second a subnormal one, the third an infinite or NaN one, the last is all
random. Q1_0 and Q2_0, which the package does not decode, follow their formula.
"""

import pathlib
import struct

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

# Byte offsets of the f16 fields; the types not named have none.
F16_FIELDS = {
    "F16": (0,),
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,),
    "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "Q1_0": (0,), "Q2_0": (0,),
}  # fmt: skip
OTHERS = ("F32", "BF16", "IQ1_M", "MXFP4", "NVFP4")
BY_FORMULA = {"Q1_0": (41, 128, 18), "Q2_0": (42, 64, 18)}  # id, weights, bytes


def decode(name, raw):
    with np.errstate(all="ignore"):
        if name not in BY_FORMULA:
            return gguf.quants.dequantize(raw, GGMLQuantizationType[name])
        d = raw[:, :2].copy().view(np.float16).astype(np.float32)
        if name == "Q1_0":
            bits = np.unpackbits(raw[:, 2:], axis=1, bitorder="little")
            return np.where(bits != 0, d, -d)
        codes = raw[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
        return d * (codes.reshape(len(raw), -1).astype(np.float32) - 1)


def main():
    out = bytearray()
    for name in (*F16_FIELDS, *OTHERS):
        if name in BY_FORMULA:
            type_id, elems, size = BY_FORMULA[name]
        else:
            type_id = int(GGMLQuantizationType[name])
            elems, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        rng = np.random.default_rng(1000 + type_id)
        raw = rng.integers(0, 256, (4, size), dtype=np.uint8)
        for offset in F16_FIELDS.get(name, ()):
            moderate = np.float16(rng.normal(0, 0.1)).view(np.uint16)
            scales = (moderate, rng.integers(1, 1024), 0x7C00 | rng.integers(0, 2) << 8)
            for block, bits in enumerate(scales):
                raw[block, offset : offset + 2] = np.array([bits], "<u2").view(np.uint8)
        values = decode(name, raw).astype("<f4")
        assert values.shape == (4, elems), name
        out += struct.pack("<4I", type_id, 4, size, elems) + raw.tobytes() + values.tobytes()
    pathlib.Path(__file__).with_name("quant_golden.bin").write_bytes(out)


if __name__ == "__main__":
    main()

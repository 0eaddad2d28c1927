#pragma once

/// One decoder per type: it turns `elems` weights, a multiple of the block, into f32. The comment
/// above each definition is the layout of a block, with byte offsets as "@n": "f16 d@0" is a scale
/// at byte 0.

#include <cstddef>
#include <cstdint>

namespace moesaic::quant {

using DecodeFn = void(const std::byte* blocks, float* out, std::int64_t elems);

// decode_float.cpp
DecodeFn decode_f32, decode_f16, decode_bf16, decode_f64;
// decode_legacy.cpp: one f16 scale, perhaps an f16 minimum, per 32 weights
DecodeFn decode_q4_0, decode_q4_1, decode_q5_0, decode_q5_1, decode_q8_0;
// decode_k.cpp: 256 weights in sub-blocks with small integer scales
DecodeFn decode_q2_k, decode_q3_k, decode_q4_k, decode_q5_k, decode_q6_k;
// decode_fp4.cpp: 4-bit indices into a codebook
DecodeFn decode_iq4_nl, decode_iq4_xs, decode_mxfp4, decode_nvfp4;
// decode_fp8.cpp: 8-bit floats with a scale for 128
DecodeFn decode_e4m3;
// decode_iq.cpp: indices into grids of 4 or 8 weights
DecodeFn decode_iq2_xxs, decode_iq2_xs, decode_iq2_s, decode_iq3_xxs, decode_iq3_s, decode_iq1_s,
    decode_iq1_m;
// decode_ternary.cpp: one scale and 1 to 2 bits per weight
DecodeFn decode_tq1_0, decode_tq2_0, decode_q1_0, decode_q2_0;

}  // namespace moesaic::quant

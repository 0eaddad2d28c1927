#pragma once

/// One encoder per type: it turns `elems` f32 values, a multiple of the block, into quant blocks.
/// Scales beyond f16 saturate; a NaN gives some valid code.

#include <cstddef>
#include <cstdint>

#include "moesaic/quant.hpp"

namespace moesaic::quant {

using EncodeFn = void(const float* values, std::byte* blocks, std::int64_t elems);

// encode_float.cpp
EncodeFn encode_f32, encode_f16, encode_bf16;
// encode_legacy.cpp
EncodeFn encode_q4_0, encode_q4_1, encode_q5_0, encode_q5_1, encode_q8_0;
// encode_k.cpp
EncodeFn encode_q2_k, encode_q3_k, encode_q4_k, encode_q5_k, encode_q6_k;
// encode_fp4.cpp
EncodeFn encode_iq4_nl, encode_iq4_xs, encode_mxfp4, encode_nvfp4;

/// The encoder of a type; null when it has none.
EncodeFn* encoder_of(QuantType type) noexcept;

}  // namespace moesaic::quant

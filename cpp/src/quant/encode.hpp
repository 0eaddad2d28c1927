#pragma once

/// One encoder per type: it turns `elems` f32 values, a multiple of the block, into quant blocks.
/// All search for the scales with the smallest (weighted) squared error; none writes bytes that
/// depend on more than the values of the block and their importance, so a row can be cut anywhere
/// between blocks.

#include <cstddef>
#include <cstdint>

#include "moesaic/quant.hpp"

namespace moesaic::quant {

/// `importance` weighs the squared error of each value; null weighs all alike, as do encoders of
/// types that take none. Values are finite and at most Encoder::largest in magnitude, importances
/// finite and not negative.
using EncodeFn = void(const float* values, const float* importance, std::byte* blocks,
                      std::int64_t elems);

// encode_float.cpp
EncodeFn encode_f32, encode_f16, encode_bf16;
// encode_legacy.cpp
EncodeFn encode_q4_0, encode_q4_1, encode_q5_0, encode_q5_1, encode_q8_0;
// encode_k.cpp
EncodeFn encode_q2_k, encode_q3_k, encode_q4_k, encode_q5_k, encode_q6_k;
// encode_iq4.cpp
EncodeFn encode_iq4_nl, encode_iq4_xs;
// encode_grid.cpp
EncodeFn encode_iq2_xxs, encode_iq2_xs, encode_iq2_s, encode_iq3_xxs, encode_iq3_s, encode_iq1_s,
    encode_iq1_m;
// encode_fp4.cpp
EncodeFn encode_mxfp4, encode_nvfp4;
// encode_fp8.cpp
EncodeFn encode_e4m3;
// encode_ternary.cpp
EncodeFn encode_tq1_0, encode_tq2_0, encode_q1_0, encode_q2_0;

struct Encoder {
  EncodeFn* encode = nullptr;  ///< null: the type has none
  bool takes_importance = false;
  float largest = 0.0f;  ///< the largest magnitude it accepts; infinity: also infinities and NaN
};
Encoder encoder_of(QuantType type) noexcept;

}  // namespace moesaic::quant

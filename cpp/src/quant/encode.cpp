#include "quant/encode.hpp"

#include <limits>

namespace moesaic::quant {
namespace {

constexpr float kAny = std::numeric_limits<float>::infinity();
/// Types with f16 scales could hold a few times more, each another number; no weight comes near.
constexpr float kF16 = 65504.0f;
constexpr float kNvfp4 = 448.0f * 6.0f;
/// Half of what f32 holds, so that no code decodes to more than that.
constexpr float kE4m3 = 0x1p127f;
/// 6 at the largest scale with which no code decodes to more than f32 holds.
constexpr float kMxfp4 = 6.0f * 0x1p125f;

}  // namespace

// Which types take an importance is what ggml's encoders do.
Encoder encoder_of(QuantType type) noexcept {
  switch (type) {
    case QuantType::F32:
      return {encode_f32, false, kAny};
    case QuantType::F16:
      return {encode_f16, false, kAny};
    case QuantType::BF16:
      return {encode_bf16, false, kAny};
    case QuantType::Q4_0:
      return {encode_q4_0, true, kF16};
    case QuantType::Q4_1:
      return {encode_q4_1, true, kF16};
    case QuantType::Q5_0:
      return {encode_q5_0, true, kF16};
    case QuantType::Q5_1:
      return {encode_q5_1, true, kF16};
    case QuantType::Q8_0:
      return {encode_q8_0, false, kF16};
    case QuantType::Q2_K:
      return {encode_q2_k, true, kF16};
    case QuantType::Q3_K:
      return {encode_q3_k, true, kF16};
    case QuantType::Q4_K:
      return {encode_q4_k, true, kF16};
    case QuantType::Q5_K:
      return {encode_q5_k, true, kF16};
    case QuantType::Q6_K:
      return {encode_q6_k, true, kF16};
    case QuantType::IQ4_NL:
      return {encode_iq4_nl, true, kF16};
    case QuantType::IQ4_XS:
      return {encode_iq4_xs, true, kF16};
    case QuantType::IQ2_XXS:
      return {encode_iq2_xxs, true, kF16};
    case QuantType::IQ2_XS:
      return {encode_iq2_xs, true, kF16};
    case QuantType::IQ2_S:
      return {encode_iq2_s, true, kF16};
    case QuantType::IQ3_XXS:
      return {encode_iq3_xxs, true, kF16};
    case QuantType::IQ3_S:
      return {encode_iq3_s, true, kF16};
    case QuantType::IQ1_S:
      return {encode_iq1_s, true, kF16};
    case QuantType::IQ1_M:
      return {encode_iq1_m, true, kF16};
    case QuantType::MXFP4:
      return {encode_mxfp4, false, kMxfp4};
    case QuantType::NVFP4:
      return {encode_nvfp4, false, kNvfp4};
    case QuantType::E4M3:
      return {encode_e4m3, false, kE4m3};
    case QuantType::TQ1_0:
      return {encode_tq1_0, false, kF16};
    case QuantType::TQ2_0:
      return {encode_tq2_0, false, kF16};
    case QuantType::Q1_0:
      return {encode_q1_0, false, kF16};
    case QuantType::Q2_0:
      return {encode_q2_0, false, kF16};
    default:
      return {};
  }
}

}  // namespace moesaic::quant

#include "quant/encode.hpp"

namespace moesaic::quant {

EncodeFn* encoder_of(QuantType type) noexcept {
  switch (type) {
    case QuantType::F32:
      return encode_f32;
    case QuantType::F16:
      return encode_f16;
    case QuantType::BF16:
      return encode_bf16;
    case QuantType::Q4_0:
      return encode_q4_0;
    case QuantType::Q4_1:
      return encode_q4_1;
    case QuantType::Q5_0:
      return encode_q5_0;
    case QuantType::Q5_1:
      return encode_q5_1;
    case QuantType::Q8_0:
      return encode_q8_0;
    case QuantType::Q2_K:
      return encode_q2_k;
    case QuantType::Q3_K:
      return encode_q3_k;
    case QuantType::Q4_K:
      return encode_q4_k;
    case QuantType::Q5_K:
      return encode_q5_k;
    case QuantType::Q6_K:
      return encode_q6_k;
    case QuantType::IQ4_NL:
      return encode_iq4_nl;
    case QuantType::IQ4_XS:
      return encode_iq4_xs;
    case QuantType::MXFP4:
      return encode_mxfp4;
    case QuantType::NVFP4:
      return encode_nvfp4;
    default:
      return nullptr;
  }
}

}  // namespace moesaic::quant

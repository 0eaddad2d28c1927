#include "quant/block.hpp"
#include "quant/decode.hpp"

namespace moesaic::quant {
namespace {

/// `bytes` bytes of `digits` ternary digits each: digit n of byte i is weight bytes*n + i.
/// A byte over 256 is a fraction written in base 3, so multiplying it by 3^n (modulo 256) brings
/// digit n to the front.
inline void decode_digits(const std::uint8_t* packed, int bytes, int digits, float d, float* y) {
  int power = 1;
  for (int n = 0; n < digits; ++n, power *= 3) {
    for (int i = 0; i < bytes; ++i) {
      const int fraction = packed[i] * power & 255;
      y[bytes * n + i] = d * static_cast<float>((fraction * 3 >> 8) - 1);
    }
  }
}

}  // namespace

// u8 of 5 digits[48]@0 (a run of 32 bytes, then one of 16), u8 of 4 digits[4]@48, f16 d@52
void decode_tq1_0(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 54>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b + 52);
    decode_digits(b, 32, 5, d, y);
    decode_digits(b + 32, 16, 5, d, y + 160);
    decode_digits(b + 48, 4, 4, d, y + 240);
  });
}

// u8 codes[64]@0, f16 d@64. A run of 32 bytes holds 128 weights, pair g of bits 32g .. 32g+31.
void decode_tq2_0(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 66>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b + 64);
    for (int g = 0; g < 8; ++g) {
      const std::uint8_t* codes = b + 32 * (g / 4);
      for (int i = 0; i < 32; ++i) {
        y[32 * g + i] = d * static_cast<float>((codes[i] >> (2 * (g % 4)) & 3) - 1);
      }
    }
  });
}

// f16 d@0, u8 signs[16]@2: a set bit is +d, a clear one -d
void decode_q1_0(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<128, 18>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int i = 0; i < 128; ++i) y[i] = (b[2 + i / 8] >> (i % 8) & 1) != 0 ? d : -d;
  });
}

// f16 d@0, u8 codes[16]@2, four neighbours to a byte
void decode_q2_0(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<64, 18>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int i = 0; i < 64; ++i) {
      y[i] = d * static_cast<float>((b[2 + i / 4] >> (2 * (i % 4)) & 3) - 1);
    }
  });
}

}  // namespace moesaic::quant

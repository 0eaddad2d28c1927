// Bytes of scale records to floats, for every byte and every place in a word.
#include "formats/scales.cuh"

#include <gtest/gtest.h>

#include <cmath>

namespace moesaic::cuda {
namespace {

// The byte in one place of a word of others.
uint32_t word_with(uint32_t byte, int at) {
  return (0xA5C37E19U & ~(255U << 8 * at)) | byte << 8 * at;
}

TEST(Scales, BytesAreMultipliedExactly) {
  for (int at = 0; at < 4; ++at) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t word = word_with(byte, at);
      // The largest, a subnormal and some other f16: the product with a byte fits in an f32.
      for (const float d : {65504.0F, 0x1p-24F, -0x1.ff8p-3F, 0.0F}) {
        const auto value = static_cast<float>(byte);
        EXPECT_EQ(times_byte(d, word, at), d * value);
        EXPECT_EQ(times_byte<32>(d, word, at), d * (value - 32.0F));
        EXPECT_EQ((times_byte<128>(d, word ^ 0x80808080U, at)),
                  d * static_cast<float>(static_cast<int8_t>(byte)));
        EXPECT_EQ((times_byte<0, 2>(d, word, at)), d * value / 4.0F);
        EXPECT_EQ((times_byte<0, 4>(d, word, at)), d * value / 16.0F);
      }
    }
  }
}

TEST(Scales, HalvesOfTinyFloats) {
  for (int at = 0; at < 4; ++at) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t word = word_with(byte, at);
      EXPECT_EQ(HalfE8m0::decode(word, at), std::ldexp(1.0F, static_cast<int>(byte) - 128));
      // E4M3 without its sign; the NaN code is zero.
      const uint32_t exponent = byte >> 3 & 15U, mantissa = byte & 7U;
      const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                        : std::ldexp(1.0F + static_cast<float>(mantissa) / 8.0F,
                                                     static_cast<int>(exponent) - 7);
      EXPECT_EQ(HalfUe4m3::decode(word, at), (byte & 127U) == 127U ? 0.0F : value / 2.0F);
    }
  }
}

}  // namespace
}  // namespace moesaic::cuda

#include <algorithm>
#include <bit>
#include <cmath>

#include "quant/block.hpp"
#include "quant/codebooks.hpp"
#include "quant/encode.hpp"

namespace moesaic::quant {
namespace {

/// The code of the nearest value, ties to the even one; beyond the largest, that one.
inline std::uint8_t nearest_e4m3(float v) {
  const std::uint8_t sign = std::signbit(v) ? 0x80 : 0;
  const float size = std::min(std::fabs(v), kLargestE4m3);
  if (size < 0x1p-6f) {
    // Adding 2^23 leaves the nearest multiple of 2^-9 in the low bits; 8 of them are 2^-6.
    const auto steps = std::bit_cast<std::uint32_t>(size * 512.0f + 0x1p23f);
    return static_cast<std::uint8_t>(sign | (steps & 15u));
  }
  const auto bits = std::bit_cast<std::uint32_t>(size);
  const std::uint32_t rounded = (bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
  return static_cast<std::uint8_t>(sign | (rounded - (127u - 7u) * 8u));
}

}  // namespace

// Floats are about as exact at any scale, so there is nothing to search: the largest weight gets
// the largest code.
void encode_e4m3(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<128, 132>(values, importance, blocks, elems,
                           [](const float* x, const float*, std::uint8_t* b) {
                             float largest = 0.0f;
                             for (int i = 0; i < 128; ++i) {
                               largest = std::max(largest, std::fabs(x[i]));
                             }
                             const float d = largest / kLargestE4m3;
                             const auto bits = std::bit_cast<std::uint32_t>(d);
                             store_u16(b, static_cast<std::uint16_t>(bits));
                             store_u16(b + 2, static_cast<std::uint16_t>(bits >> 16));
                             for (int i = 0; i < 128; ++i) {
                               b[4 + i] = d > 0.0f ? nearest_e4m3(x[i] / d) : std::uint8_t{0};
                             }
                           });
}

}  // namespace moesaic::quant

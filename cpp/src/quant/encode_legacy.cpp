#include <algorithm>
#include <cmath>

#include "quant/block.hpp"
#include "quant/encode.hpp"
#include "quant/fit.hpp"

// These encoders write the bytes that ggml's reference encoders write: the scale comes from the
// extremes of the block, and codes are rounded with the scale before it becomes f16.

namespace moesaic::quant {
namespace {

inline float inverse(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

/// v rounded down to 0..high; NaN gives 0.
inline unsigned code_below(float v, int high) {
  return static_cast<unsigned>(clamped(v, 0.0f, static_cast<float>(high)));
}

inline void pack4(const unsigned* codes, std::uint8_t* nibbles) {
  for (int i = 0; i < 16; ++i) {
    nibbles[i] = static_cast<std::uint8_t>((codes[i] & 15u) | (codes[i + 16] & 15u) << 4);
  }
}

inline void pack5(const unsigned* codes, std::uint8_t* high_bits, std::uint8_t* nibbles) {
  std::uint32_t high = 0;
  for (int i = 0; i < 32; ++i) high |= (codes[i] >> 4) << i;
  store_u16(high_bits, static_cast<std::uint16_t>(high));
  store_u16(high_bits + 2, static_cast<std::uint16_t>(high >> 16));
  pack4(codes, nibbles);
}

/// Makes code 0 of the value of largest magnitude, so that its side of zero has `half` codes and
/// the other side one less.
inline void symmetric_codes(const float* x, int half, std::uint8_t* d, unsigned* codes) {
  const float scale = extreme(x, 32) / static_cast<float>(-half);
  const float inv = inverse(scale);
  store_scale(d, scale);
  for (int i = 0; i < 32; ++i) {
    codes[i] = code_below(x[i] * inv + (static_cast<float>(half) + 0.5f), 2 * half - 1);
  }
}

/// Makes code 0 of the smallest value and code `high` of the largest.
inline void affine_codes(const float* x, int high, std::uint8_t* d, std::uint8_t* m,
                         unsigned* codes) {
  const auto [min, max] = std::minmax_element(x, x + 32);
  const float scale = (*max - *min) / static_cast<float>(high);
  const float inv = inverse(scale);
  store_scale(d, scale);
  store_scale(m, *min);
  for (int i = 0; i < 32; ++i) codes[i] = code_below((x[i] - *min) * inv + 0.5f, high);
}

}  // namespace

void encode_q4_0(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<32, 18>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    unsigned codes[32];
    symmetric_codes(x, 8, b, codes);
    pack4(codes, b + 2);
  });
}

void encode_q4_1(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<32, 20>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    unsigned codes[32];
    affine_codes(x, 15, b, b + 2, codes);
    pack4(codes, b + 4);
  });
}

void encode_q5_0(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<32, 22>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    unsigned codes[32];
    symmetric_codes(x, 16, b, codes);
    pack5(codes, b + 2, b + 6);
  });
}

void encode_q5_1(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<32, 24>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    unsigned codes[32];
    affine_codes(x, 31, b, b + 2, codes);
    pack5(codes, b + 4, b + 8);
  });
}

void encode_q8_0(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<32, 34>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    const float scale = std::fabs(extreme(x, 32)) / 127.0f;
    const float inv = inverse(scale);
    store_scale(b, scale);
    for (int i = 0; i < 32; ++i) {
      const float q = std::round(clamped(x[i] * inv, -127.0f, 127.0f));
      b[2 + i] = static_cast<std::uint8_t>(static_cast<std::int8_t>(q));
    }
  });
}

}  // namespace moesaic::quant

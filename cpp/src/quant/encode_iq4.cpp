#include <algorithm>
#include <array>

#include "quant/block.hpp"
#include "quant/codebooks.hpp"
#include "quant/encode.hpp"
#include "quant/scaled_block.hpp"

namespace moesaic::quant {
namespace {

constexpr Starts kStarts{0.7f, 1.1f, 7};

/// Index of the IQ4 level nearest to v, for v = -128, -127.5, ..: the midpoint of two levels is
/// always among these values, so rounding v down to one of them changes no answer.
constexpr auto kNearestIq4 = [] {
  std::array<std::uint8_t, 512> nearest{};
  for (std::size_t n = 0; n < nearest.size(); ++n) {
    const int v2 = static_cast<int>(n) - 256;  // twice the value
    for (std::size_t k = 0; k + 1 < kIq4Levels.size(); ++k) {
      if (v2 >= kIq4Levels[k] + kIq4Levels[k + 1]) nearest[n] = static_cast<std::uint8_t>(k + 1);
    }
  }
  return nearest;
}();

inline std::uint8_t nearest_iq4(float v) {
  return kNearestIq4[static_cast<std::size_t>(2.0f * (std::clamp(v, -128.0f, 127.0f) + 128.0f))];
}

inline void pack_iq4(const float* x, float scale, std::uint8_t* codes) {
  const float inv = inverse(scale);
  for (int i = 0; i < 16; ++i) {
    const int low = nearest_iq4(x[i] * inv);
    const int high = nearest_iq4(x[i + 16] * inv);
    codes[i] = static_cast<std::uint8_t>(low | high << 4);
  }
}

}  // namespace

void encode_iq4_nl(const float* values, const float* importance, std::byte* blocks,
                   std::int64_t elems) {
  for_each_block<32, 18>(
      values, importance, blocks, elems,
      [](const float* x, const float* importances, std::uint8_t* b) {
        const Importance<32> w(importances);
        pack_iq4(x, store_scale(b, fit_scale<Iq4Levels, 32>(x, w.w, kStarts).scale), b + 2);
      });
}

void encode_iq4_xs(const float* values, const float* importance, std::byte* blocks,
                   std::int64_t elems) {
  for_each_block<256, 136>(
      values, importance, blocks, elems,
      [](const float* x, const float* importances, std::uint8_t* b) {
        std::fill_n(b, 8, std::uint8_t{0});
        const Importance<256> w(importances);
        const ScaledBlock<Iq4Levels, 32, 32> block(x, w.w, kStarts, b);
        int high = 0;
        for (int j = 0; j < 8; ++j) {
          const int code = block.scale[j] + 32;
          b[4 + j / 2] = static_cast<std::uint8_t>(b[4 + j / 2] | (code & 15) << (4 * (j % 2)));
          high |= (code >> 4) << (2 * j);
          pack_iq4(x + 32 * j, block.d * static_cast<float>(block.scale[j]), b + 8 + 16 * j);
        }
        store_u16(b + 2, static_cast<std::uint16_t>(high));
      });
}

}  // namespace moesaic::quant

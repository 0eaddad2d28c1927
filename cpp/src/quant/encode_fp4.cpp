#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "quant/block.hpp"
#include "quant/codebooks.hpp"
#include "quant/encode.hpp"
#include "quant/fit.hpp"

namespace moesaic::quant {
namespace {

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
  return kNearestIq4[static_cast<std::size_t>(2.0f * (clamped(v, -128.0f, 127.0f) + 128.0f))];
}

inline float fit_iq4(const float* x) {
  return fit_scale(x, 32, static_cast<float>(kIq4Levels[0]),
                   [](float v) { return static_cast<float>(kIq4Levels[nearest_iq4(v)]); });
}

inline void pack_iq4(const float* x, float scale, std::uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    const int low = nearest_iq4(ratio(x[i], scale));
    const int high = nearest_iq4(ratio(x[i + 16], scale));
    codes[i] = static_cast<std::uint8_t>(low | high << 4);
  }
}

/// Index of the doubled E2M1 value nearest to x / scale, the lowest index among equals.
inline int nearest_e2m1(float x, float scale) {
  int best = 0;
  float best_error = std::numeric_limits<float>::infinity();
  for (std::size_t k = 0; k < kE2m1Doubled.size(); ++k) {
    const float error = std::fabs(scale * static_cast<float>(kE2m1Doubled[k]) - x);
    if (error < best_error) {
      best_error = error;
      best = static_cast<int>(k);
    }
  }
  return best;
}

/// Packs 2 * kBytes weights and returns the squared error.
template <int kBytes>
inline float pack_e2m1(const float* x, float scale, std::uint8_t* codes) {
  float error = 0.0f;
  const auto code_of = [&](float value) {
    const int code = nearest_e2m1(value, scale);
    const float rest =
        scale * static_cast<float>(kE2m1Doubled[static_cast<std::size_t>(code)]) - value;
    error += rest * rest;
    return code;
  };
  for (int i = 0; i < kBytes; ++i) {
    const int low = code_of(x[i]);
    codes[i] = static_cast<std::uint8_t>(low | code_of(x[i + kBytes]) << 4);
  }
  return error;
}

/// The smallest UE4M3 code with half_ue4m3(code) >= half_scale, at most 0x7e.
inline int ue4m3_at_least(float half_scale) {
  int low = 0;
  int high = 0x7e;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (half_ue4m3(static_cast<std::uint8_t>(middle)) < half_scale) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace

void encode_iq4_nl(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<32, 18>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    pack_iq4(x, store_scale(b, fit_iq4(x)), b + 2);
  });
}

void encode_iq4_xs(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<256, 136>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    std::fill_n(b, 8, std::uint8_t{0});
    float fits[8];
    for (int j = 0; j < 8; ++j) fits[j] = fit_iq4(x + 32 * j);
    const float d = store_scale(b, extreme(fits, 8) / -32.0f);
    int high = 0;
    for (int j = 0; j < 8; ++j) {
      const int scale = nearest_int(ratio(fits[j], d), -32, 31);
      const int code = scale + 32;
      b[4 + j / 2] = static_cast<std::uint8_t>(b[4 + j / 2] | (code & 15) << (4 * (j % 2)));
      high |= (code >> 4) << (2 * j);
      pack_iq4(x + 32 * j, d * static_cast<float>(scale), b + 8 + 16 * j);
    }
    store_u16(b + 2, static_cast<std::uint16_t>(high));
  });
}

// The scale is that of the OCP specification: the power of two that brings the largest weight into
// the largest binade of E2M1, [4, 8).
void encode_mxfp4(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<32, 17>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    const float top = std::min(std::fabs(extreme(x, 32)), std::numeric_limits<float>::max());
    const int exponent = top > 0.0f ? std::ilogb(top) - 2 + 127 : 0;
    b[0] = static_cast<std::uint8_t>(std::clamp(exponent, 0, 254));
    pack_e2m1<16>(x, half_e8m0(b[0]), b + 1);
  });
}

// The scale is the one that brings the largest weight to 6, rounded up or down, whichever gives the
// smaller error.
void encode_nvfp4(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<64, 36>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    for (int j = 0; j < 4; ++j) {
      const float* const values16 = x + 16 * j;
      const int up = ue4m3_at_least(std::fabs(extreme(values16, 16)) / 12.0f);
      const int down = std::max(up - 1, 0);
      std::uint8_t codes_up[8];
      std::uint8_t codes_down[8];
      const float error_up =
          pack_e2m1<8>(values16, half_ue4m3(static_cast<std::uint8_t>(up)), codes_up);
      const float error_down =
          pack_e2m1<8>(values16, half_ue4m3(static_cast<std::uint8_t>(down)), codes_down);
      const bool take_down = error_down < error_up;
      b[j] = static_cast<std::uint8_t>(take_down ? down : up);
      std::memcpy(b + 4 + 8 * j, take_down ? codes_down : codes_up, 8);
    }
  });
}

}  // namespace moesaic::quant

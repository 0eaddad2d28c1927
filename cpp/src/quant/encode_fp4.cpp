#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "quant/block.hpp"
#include "quant/codebooks.hpp"
#include "quant/encode.hpp"
#include "quant/search.hpp"

// The scales of these types have few values, so all that may be best are tried.

namespace moesaic::quant {
namespace {

/// The magnitudes of E2M1 doubled, 0 1 2 3 4 6 8 12, nearest to v >= 0.
inline F4 nearest_e2m1(F4 v) {
  const F4 fine = round4(v);
  const F4 middle = round4(v * 0.5f) * 2.0f;
  const F4 coarse = v < splat(10.0f) ? splat(8.0f) : splat(12.0f);
  return v < splat(4.0f) ? fine : (v < splat(7.0f) ? middle : coarse);
}

/// Squared error of N values as doubled E2M1 times a scale.
template <int N>
inline float error_at(const float* x, float scale) {
  const F4 inv = splat(inverse(scale));
  const F4 step = splat(scale);
  F4 error{};
  for (int i = 0; i < N; i += 4) {
    const F4 v = abs4(load4(x + i));
    const F4 rest = v - nearest_e2m1(v * inv) * step;
    error += rest * rest;
  }
  return sum4(error);
}

template <int kBytes>
inline void pack_e2m1(const float* x, float scale, std::uint8_t* codes) {
  const F4 inv = splat(inverse(scale));
  std::uint8_t code[2 * kBytes];
  for (int i = 0; i < 2 * kBytes; i += 4) {
    const F4 v = load4(x + i);
    const F4 level = nearest_e2m1(abs4(v) * inv);
    for (int k = 0; k < 4; ++k) {
      constexpr std::uint8_t kCode[] = {0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7};
      const std::uint8_t magnitude = kCode[static_cast<int>(level[k])];
      code[i + k] =
          static_cast<std::uint8_t>(magnitude != 0 && v[k] < 0.0f ? magnitude | 8 : magnitude);
    }
  }
  for (int i = 0; i < kBytes; ++i) {
    codes[i] = static_cast<std::uint8_t>(code[i] | code[i + kBytes] << 4);
  }
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

// The OCP specification takes the power of two that brings the largest weight into the largest
// binade of E2M1, [4, 8), where it may be cut to 6; the next power never cuts, but is coarser.
void encode_mxfp4(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  for_each_block<32, 17>(
      values, importance, blocks, elems, [](const float* x, const float*, std::uint8_t* b) {
        const float top = std::fabs(extreme(x, 32));
        const int exponent = top > 0.0f ? std::clamp(std::ilogb(top) - 2 + 127, 0, 254) : 0;
        // The values over 2^(exponent - 128), so that squares neither overflow nor vanish.
        float scaled[32];
        for (int i = 0; i < 32; ++i) scaled[i] = std::ldexp(x[i], 128 - exponent);
        const bool coarser =
            exponent < 254 && error_at<32>(scaled, 2.0f) < error_at<32>(scaled, 1.0f);
        b[0] = static_cast<std::uint8_t>(exponent + (coarser ? 1 : 0));
        pack_e2m1<16>(scaled, coarser ? 2.0f : 1.0f, b + 1);
      });
}

// From the scale that cuts the largest weight a little to the one that brings it to 4.
void encode_nvfp4(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  for_each_block<64, 36>(
      values, importance, blocks, elems, [](const float* x, const float*, std::uint8_t* b) {
        for (int j = 0; j < 4; ++j) {
          const float* const sub = x + 16 * j;
          const float top = std::fabs(extreme(sub, 16));
          const int first = std::max(ue4m3_at_least(top / 15.0f) - 1, 0);
          const int last = ue4m3_at_least(top / 8.0f);
          int best = first;
          float best_error = std::numeric_limits<float>::infinity();
          for (int code = first; code <= last; ++code) {
            const float error = error_at<16>(sub, half_ue4m3(static_cast<std::uint8_t>(code)));
            if (error < best_error) {
              best_error = error;
              best = code;
            }
          }
          b[j] = static_cast<std::uint8_t>(best);
          pack_e2m1<8>(sub, half_ue4m3(b[j]), b + 4 + 8 * j);
        }
      });
}

}  // namespace moesaic::quant

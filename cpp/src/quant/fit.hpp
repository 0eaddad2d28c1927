#pragma once

/// Scales for the encoders. The extremes of a sub-block give a first scale; a few rounds of least
/// squares follow (codes for the scale, then the best scale for these codes), and the scale with
/// the smallest error is kept.

#include <cmath>
#include <cstdint>
#include <limits>

#include "quant/block.hpp"

namespace moesaic::quant {

inline constexpr int kFitRounds = 4;

/// `v` in [low, high]; NaN gives low.
inline float clamped(float v, float low, float high) {
  return v > low ? (v < high ? v : high) : low;
}

/// The integer nearest to `v` in [low, high].
inline int nearest_int(float v, int low, int high) {
  const float offset =
      clamped(v, static_cast<float>(low), static_cast<float>(high)) - static_cast<float>(low);
  return static_cast<int>(offset + 0.5f) + low;
}

/// Writes a scale as f16, saturating, and returns the value a decoder will see.
inline float store_scale(std::uint8_t* p, float scale) {
  constexpr float kMaxF16 = 65504.0f;
  const std::uint16_t bits = f32_to_f16(clamped(scale, -kMaxF16, kMaxF16));
  store_u16(p, bits);
  return f16_to_f32(bits);
}

/// v / scale, or 0 for scale 0.
inline float ratio(float v, float scale) { return scale != 0.0f ? v / scale : 0.0f; }

/// The value of largest magnitude with its sign, the first one among equals.
inline float extreme(const float* x, int n) {
  float best = 0.0f;
  for (int i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(best)) best = x[i];
  }
  return best;
}

/// A scale of either sign for x ~ scale * level, where `level(v)` is the level nearest to v and
/// `largest` the one of largest magnitude.
template <class Level>
float fit_scale(const float* x, int n, float largest, Level&& level) {
  const float top = extreme(x, n);
  if (top == 0.0f) return 0.0f;
  float best = top / largest;
  float best_error = std::numeric_limits<float>::infinity();
  for (const float start : {top / largest, -top / largest}) {
    float scale = start;
    for (int round = 0; round < kFitRounds && scale != 0.0f; ++round) {
      float error = 0.0f;
      float level_x = 0.0f;
      float level_level = 0.0f;
      for (int i = 0; i < n; ++i) {
        const float q = level(x[i] / scale);
        const float rest = x[i] - scale * q;
        error += rest * rest;
        level_x += q * x[i];
        level_level += q * q;
      }
      if (error < best_error) {
        best_error = error;
        best = scale;
      }
      scale = ratio(level_x, level_level);
    }
  }
  return best;
}

/// A fit x ~ scale * q - min with q in 0..max_code; scale and min are at least 0.
struct Affine {
  float scale;
  float min;
};

inline Affine fit_affine(const float* x, int n, int max_code) {
  float low = 0.0f;  // the decoder cannot add, so the range always includes 0
  float high = x[0];
  for (int i = 0; i < n; ++i) {
    if (x[i] < low) low = x[i];
    if (x[i] > high) high = x[i];
  }
  if (!(high > low)) return {0.0f, -low};
  Affine best{(high - low) / static_cast<float>(max_code), -low};
  float best_error = std::numeric_limits<float>::infinity();
  Affine fit = best;
  for (int round = 0; round < kFitRounds && fit.scale > 0.0f; ++round) {
    float error = 0.0f;
    float sum_q = 0.0f;
    float sum_x = 0.0f;
    float sum_qq = 0.0f;
    float sum_qx = 0.0f;
    for (int i = 0; i < n; ++i) {
      const auto q = static_cast<float>(nearest_int((x[i] + fit.min) / fit.scale, 0, max_code));
      const float rest = fit.scale * q - fit.min - x[i];
      error += rest * rest;
      sum_q += q;
      sum_x += x[i];
      sum_qq += q * q;
      sum_qx += q * x[i];
    }
    if (error < best_error) {
      best_error = error;
      best = fit;
    }
    const auto count = static_cast<float>(n);
    fit.scale = ratio(count * sum_qx - sum_q * sum_x, count * sum_qq - sum_q * sum_q);
    fit.min = (fit.scale * sum_q - sum_x) / count;
    if (fit.min < 0.0f) fit = {ratio(sum_qx, sum_qq), 0.0f};
  }
  return best;
}

}  // namespace moesaic::quant

#pragma once

/// Scales for the encoders, by least squares. For given codes the best scale has a formula, and for
/// a given scale the best codes are the nearest ones, so a search tries some scales, scores each by
/// the error that its codes leave under the best scale for them, and goes on from the winner until
/// nothing improves. Types differ in which levels a code can mean.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/lanes.hpp"
#include "quant/block.hpp"
#include "quant/codebooks.hpp"

namespace moesaic::quant {

/// Writes a scale as f16, saturating, and returns the value a decoder will see.
inline float store_scale(std::uint8_t* p, float scale) {
  constexpr float kMaxF16 = 65504.0f;
  const std::uint16_t bits = f32_to_f16(std::clamp(scale, -kMaxF16, kMaxF16));
  store_u16(p, bits);
  return f16_to_f32(bits);
}

/// 1 / scale, or 0 where that is no number, so that all values become code 0.
inline float inverse(float scale) {
  const float inv = scale != 0.0f ? 1.0f / scale : 0.0f;
  return std::isfinite(inv) ? inv : 0.0f;
}

/// The integer nearest to v in [low, high].
inline int nearest_int(float v, int low, int high) {
  const float offset =
      std::clamp(v, static_cast<float>(low), static_cast<float>(high)) - static_cast<float>(low);
  return static_cast<int>(offset + 0.5f) + low;
}

/// The value of largest magnitude with its sign, the first one among equals.
inline float extreme(const float* x, int n) {
  float best = 0.0f;
  for (int i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(best)) best = x[i];
  }
  return best;
}

/// The importances of a block with mean 1. A value of importance 0 keeps a trace of it, so that its
/// code is the nearest one where nothing else is at stake; a block of zeros weighs all alike.
template <int N>
struct Importance {
  alignas(16) float w[N];

  explicit Importance(const float* importance) {
    double sum = 0.0;
    if (importance != nullptr) {
      for (int i = 0; i < N; ++i) sum += importance[i];
    }
    constexpr float kTrace = 1e-6f;
    for (int i = 0; i < N; ++i) {
      w[i] = sum > 0.0 ? static_cast<float>(importance[i] * (N / sum)) + kTrace : 1.0f;
    }
  }
};

// ---- levels: `nearest` gives the level nearest to v

template <int kLow, int kHigh>
struct IntegerLevels {
  static constexpr float kLowest = kLow;
  static constexpr float kHighest = kHigh;
  static F4 nearest(F4 v) { return round4(min4(max4(v, splat(kLow)), splat(kHigh))); }
};

/// 1, 3 .. kHigh
template <int kHigh>
struct OddLevels {
  static constexpr float kLowest = 1;
  static constexpr float kHighest = kHigh;
  static F4 nearest(F4 v) {
    return IntegerLevels<0, (kHigh - 1) / 2>::nearest((v - 1.0f) * 0.5f) * 2.0f + 1.0f;
  }
};

struct Iq4Levels {
  static constexpr float kLowest = kIq4Levels[0];
  static constexpr float kHighest = kIq4Levels[15];
  static F4 nearest(F4 v) {
    F4 level = splat(kLowest);
    for (std::size_t k = 0; k + 1 < kIq4Levels.size(); ++k) {
      const float middle = 0.5f * static_cast<float>(kIq4Levels[k] + kIq4Levels[k + 1]);
      const F4 step = splat(static_cast<float>(kIq4Levels[k + 1] - kIq4Levels[k]));
      level += as_float(as_int(step) & (v >= splat(middle)));
    }
    return level;
  }
};

// ---- x ~ scale * level

/// With r levels: sums of w * r * x and w * r * r.
struct ScaleSums {
  float rx = 0.0f;
  float rr = 0.0f;
  float scale() const { return rr > 0.0f ? rx / rr : 0.0f; }
  /// How much of the squared error of all zeros the best scale takes away.
  float gain() const { return rr > 0.0f ? rx * (rx / rr) : 0.0f; }
  /// How much of the squared error of all zeros this scale takes away.
  float gain(float scale) const { return scale * (2.0f * rx - scale * rr); }
};

template <class Levels, int N>
inline ScaleSums sums_at(const float* x, const float* w, float inverse_scale) {
  const F4 inv = splat(inverse_scale);
  F4 rx{}, rr{};
  for (int i = 0; i < N; i += 4) {
    const F4 v = load4(x + i);
    const F4 r = Levels::nearest(v * inv);
    const F4 wr = load4(w + i) * r;
    rx += wr * v;
    rr += wr * r;
  }
  return {sum4(rx), sum4(rr)};
}

/// Where a search starts: the value of largest magnitude is put on `from` to `to` times the outmost
/// level, in `count` equal steps.
struct Starts {
  float from;
  float to;
  int count;
};

struct ScaleFit {
  float scale;
  float weight;  ///< half the second derivative of the error: sum of w * r * r
};

inline constexpr int kRounds = 4;

template <class Levels, int N>
ScaleFit fit_scale(const float* x, const float* w, const Starts& starts) {
  const float top = extreme(x, N);
  if (top == 0.0f) return {0.0f, 0.0f};
  ScaleSums best;
  const auto consider = [&](float inv) {
    const ScaleSums sums = sums_at<Levels, N>(x, w, inv);
    const bool better = sums.gain() > best.gain();
    if (better) best = sums;
    return better;
  };
  const float step = (starts.to - starts.from) / static_cast<float>(starts.count - 1);
  for (int n = 0; n < starts.count; ++n) {
    const float reach = starts.from + step * static_cast<float>(n);
    consider(Levels::kHighest * reach / top);
    if (Levels::kLowest < 0.0f) consider(Levels::kLowest * reach / top);
  }
  for (int round = 0; round < kRounds && consider(inverse(best.scale())); ++round) {
  }
  return {best.scale(), best.rr};
}

// ---- x ~ scale * code + offset, codes 0 .. kMax

/// With q codes: sums of w * q, w * q * q and w * q * x, and of w, w * x and w * x * x.
struct AffineSums {
  float w = 0.0f, wx = 0.0f, wxx = 0.0f;
  float q = 0.0f, qq = 0.0f, qx = 0.0f;
};

struct Affine {
  float scale;
  float offset;
  float gain;  ///< how much of the squared error of all zeros it takes away
};

/// The best fit for given codes. With `downward` the offset is at most 0.
inline Affine solve(const AffineSums& s, bool downward) {
  const float determinant = s.w * s.qq - s.q * s.q;
  if (determinant > 1e-5f * s.w * s.qq) {  // else all codes are alike
    const float scale = (s.w * s.qx - s.q * s.wx) / determinant;
    const float offset = (s.wx - scale * s.q) / s.w;
    if (!downward || offset <= 0.0f) return {scale, offset, scale * s.qx + offset * s.wx};
  }
  if (s.qq > 0.0f && downward) return {s.qx / s.qq, 0.0f, s.qx * (s.qx / s.qq)};
  const float offset = s.w > 0.0f ? s.wx / s.w : 0.0f;
  if (downward && offset > 0.0f) return {0.0f, 0.0f, 0.0f};
  return {0.0f, offset, offset * s.wx};
}

template <int kMax, int N>
inline AffineSums sums_at(const float* x, const float* w, float inverse_scale, float offset) {
  const F4 inv = splat(inverse_scale);
  const F4 shift = splat(-offset * inverse_scale);
  F4 q_sum{}, qq{}, qx{};
  for (int i = 0; i < N; i += 4) {
    const F4 v = load4(x + i);
    const F4 q = IntegerLevels<0, kMax>::nearest(v * inv + shift);
    const F4 wq = load4(w + i) * q;
    q_sum += wq;
    qq += wq * q;
    qx += wq * v;
  }
  AffineSums sums;
  sums.q = sum4(q_sum);
  sums.qq = sum4(qq);
  sums.qx = sum4(qx);
  return sums;
}

template <int N>
inline AffineSums sums_of_values(const float* x, const float* w) {
  F4 w_sum{}, wx{}, wxx{};
  for (int i = 0; i < N; i += 4) {
    const F4 v = load4(x + i);
    const F4 weight = load4(w + i);
    w_sum += weight;
    wx += weight * v;
    wxx += weight * v * v;
  }
  AffineSums sums;
  sums.w = sum4(w_sum);
  sums.wx = sum4(wx);
  sums.wxx = sum4(wxx);
  return sums;
}

struct AffineFit {
  float scale = 0.0f;
  float offset = 0.0f;
  AffineSums sums;  ///< of the codes for it
};

/// The search starts from ranges `starts` times as wide as that of the values, which cut both ends
/// alike, the upper end alone or the lower one alone.
template <int kMax, int N>
AffineFit fit_affine(const float* x, const float* w, bool downward, const Starts& starts) {
  float low = x[0];
  float high = x[0];
  for (int i = 1; i < N; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  if (downward) low = std::min(low, 0.0f);
  const AffineSums values = sums_of_values<N>(x, w);
  AffineFit best;
  float best_gain = -1.0f;
  const auto consider = [&](float inv, float offset) {
    AffineSums sums = sums_at<kMax, N>(x, w, inv, offset);
    sums.w = values.w;
    sums.wx = values.wx;
    sums.wxx = values.wxx;
    const Affine fit = solve(sums, downward);
    if (!(fit.gain > best_gain)) return false;
    best_gain = fit.gain;
    best = {fit.scale, fit.offset, sums};
    return true;
  };
  if (!(high > low)) {
    consider(0.0f, low);
    return best;
  }
  const float step = (starts.to - starts.from) / static_cast<float>(starts.count - 1);
  for (int n = 0; n < starts.count; ++n) {
    const float width = (high - low) * (starts.from + step * static_cast<float>(n));
    const float inv = static_cast<float>(kMax) / width;
    for (const float from : {0.5f * (low + high - width), low, high - width}) {
      consider(inv, downward ? std::min(from, 0.0f) : from);
    }
  }
  for (int round = 0; round < kRounds && best.scale > 0.0f; ++round) {
    if (!consider(inverse(best.scale), best.offset)) break;
  }
  return best;
}

}  // namespace moesaic::quant

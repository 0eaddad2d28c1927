#pragma once

/// Blocks of 256 weights in sub-blocks whose scales are small integers times the block's own scale.

#include "quant/search.hpp"

namespace moesaic::quant {

inline constexpr int kBlock = 256;

/// Sub-blocks of kSub weights, x ~ d * scale * level with scales -kHalfScale .. kHalfScale - 1.
///
/// Each sub-block is fitted alone. Near its best scale the error grows as a parabola, so d is again
/// a scale to be fitted: of levels that are integers to values that are scales, weighed by the
/// parabolas. Last, d is fitted anew to the weights themselves.
template <class Levels, int kSub, int kHalfScale>
struct ScaledBlock {
  static constexpr int kSubs = kBlock / kSub;
  using Scales = IntegerLevels<-kHalfScale, kHalfScale - 1>;
  float d;
  int scale[kSubs];

  ScaledBlock(const float* x, const float* w, const Starts& starts, std::uint8_t* d_field) {
    float fits[kSubs];
    float weights[kSubs];
    for (int j = 0; j < kSubs; ++j) {
      const ScaleFit fit = fit_scale<Levels, kSub>(x + kSub * j, w + kSub * j, starts);
      fits[j] = fit.scale;
      weights[j] = fit.weight;
    }
    constexpr Starts kScaleStarts{0.85f, 1.1f, 8};
    d = store_scale(d_field, fit_scale<Scales, kSubs>(fits, weights, kScaleStarts).scale);
    ScaleSums all;
    for (int j = 0; j < kSubs; ++j) {
      scale[j] = nearest_int(fits[j] * inverse(d), -kHalfScale, kHalfScale - 1);
      const auto factor = static_cast<float>(scale[j]);
      const ScaleSums sums = sums_at<Levels, kSub>(x + kSub * j, w + kSub * j, inverse(d * factor));
      all.rx += factor * sums.rx;
      all.rr += factor * factor * sums.rr;
    }
    std::uint8_t field[2];
    const float refitted = store_scale(field, all.scale());
    if (all.gain(refitted) > all.gain(d)) {
      d = refitted;
      std::copy_n(field, 2, d_field);
    }
  }
};

/// Sub-blocks of kSub weights, x ~ d * scale * code - dmin * min with codes 0 .. kMax and scales
/// and minima 0 .. kMaxScale, fitted in the same way.
template <int kSub, int kMax, int kMaxScale>
struct AffineBlock {
  static constexpr int kSubs = kBlock / kSub;
  using Scales = IntegerLevels<0, kMaxScale>;
  std::uint8_t scale[kSubs];
  std::uint8_t min[kSubs];
  std::uint8_t codes[kBlock];

  AffineBlock(const float* x, const float* w, const Starts& starts, std::uint8_t* d_field,
              std::uint8_t* dmin_field) {
    AffineFit fits[kSubs];
    float values[kSubs];
    float weights[kSubs];
    for (int j = 0; j < kSubs; ++j) {
      fits[j] = fit_affine<kMax, kSub>(x + kSub * j, w + kSub * j, true, starts);
      const AffineSums& s = fits[j].sums;
      values[j] = std::max(fits[j].scale, 0.0f);
      // A minimum above 0 follows the scale, which makes the parabola of the scale alone flatter.
      const bool follows = fits[j].offset < 0.0f && s.w > 0.0f;
      weights[j] = follows ? std::max(s.qq - s.q * s.q / s.w, 1e-3f * s.qq) : s.qq;
    }
    constexpr Starts kScaleStarts{0.8f, 1.1f, 10};
    float d = store_scale(d_field, fit_scale<Scales, kSubs>(values, weights, kScaleStarts).scale);
    for (int j = 0; j < kSubs; ++j) {
      scale[j] = static_cast<std::uint8_t>(nearest_int(values[j] * inverse(d), 0, kMaxScale));
      const float step = d * static_cast<float>(scale[j]);
      const AffineSums& s = fits[j].sums;
      values[j] = s.w > 0.0f ? std::max((step * s.q - s.wx) / s.w, 0.0f) : 0.0f;
      weights[j] = s.w;
    }
    float dmin =
        store_scale(dmin_field, fit_scale<Scales, kSubs>(values, weights, kScaleStarts).scale);
    for (int j = 0; j < kSubs; ++j) {
      min[j] = static_cast<std::uint8_t>(nearest_int(values[j] * inverse(dmin), 0, kMaxScale));
    }
    refit(x, w, d_field, dmin_field, d, dmin);
    for (int j = 0; j < kSubs; ++j) {
      const float inv = inverse(d * static_cast<float>(scale[j]));
      const float offset = dmin * static_cast<float>(min[j]);
      for (int i = kSub * j; i < kSub * (j + 1); ++i) {
        codes[i] = static_cast<std::uint8_t>(nearest_int((x[i] + offset) * inv, 0, kMax));
      }
    }
  }

 private:
  /// Fits d and dmin to the weights, for the codes that belong to them so far.
  void refit(const float* x, const float* w, std::uint8_t* d_field, std::uint8_t* dmin_field,
             float& d, float& dmin) {
    // x ~ d * a - dmin * b: sums of w times the products of a, b and x
    double aa = 0.0, ab = 0.0, bb = 0.0, ax = 0.0, bx = 0.0;
    for (int j = 0; j < kSubs; ++j) {
      const float* const sub_x = x + kSub * j;
      const float* const sub_w = w + kSub * j;
      const double s = scale[j], m = min[j];
      const float step = d * static_cast<float>(scale[j]);
      const float offset = dmin * static_cast<float>(min[j]);
      const AffineSums codes_sums = sums_at<kMax, kSub>(sub_x, sub_w, inverse(step), -offset);
      const AffineSums value_sums = sums_of_values<kSub>(sub_x, sub_w);
      aa += s * s * codes_sums.qq;
      ab += s * m * codes_sums.q;
      bb += m * m * value_sums.w;
      ax += s * codes_sums.qx;
      bx += m * value_sums.wx;
    }
    const double determinant = aa * bb - ab * ab;
    if (!(determinant > 1e-9 * aa * bb)) return;
    std::uint8_t fields[4];
    const float new_d = store_scale(fields, static_cast<float>((ax * bb - bx * ab) / determinant));
    const float new_dmin =
        store_scale(fields + 2, static_cast<float>((ax * ab - bx * aa) / determinant));
    const auto error = [&](double u, double v) {
      return u * u * aa + v * v * bb - 2.0 * (u * v * ab + u * ax - v * bx);
    };
    if (!(new_d > 0.0f && new_dmin >= 0.0f && error(new_d, new_dmin) < error(d, dmin))) return;
    d = new_d;
    dmin = new_dmin;
    std::copy_n(fields, 2, d_field);
    std::copy_n(fields + 2, 2, dmin_field);
  }
};

}  // namespace moesaic::quant

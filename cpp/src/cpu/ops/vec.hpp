#pragma once

/// Functions of four f32 lanes. Nothing here is contracted or reordered, so results are the same on
/// every machine and for every batch.

#include "base/lanes.hpp"

namespace moesaic::cpu {

inline constexpr int kLanes = 4;

/// e^x to 2 ulp; 0 below -87.3, infinity above 88.7, NaN stays NaN.
inline F4 exp4(F4 x) {
  const F4 overflow = splat(88.722836F);
  const F4 underflow = splat(-87.33654F);
  const F4 clamped = max4(min4(x, overflow), underflow);
  // x = n ln 2 + r, |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer.
  const F4 magic = splat(12582912.0F);
  const F4 shifted = clamped * 1.44269504088896F + magic;
  const F4 n = shifted - magic;
  const F4 r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
  F4 p = splat(1.9875691500e-4F);
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = (p * (r * r) + r) + 1.0F;
  // 2^n in two factors, since n can be 128.
  const I4 integer = as_int(shifted) - as_int(magic);
  const I4 half = integer >> 1;
  const F4 scaled = p * as_float((half + 127) << 23) * as_float((integer - half + 127) << 23);
  F4 result = select(x > overflow, splat(__builtin_inff()), scaled);
  result = select(x < underflow, F4{}, result);
  return select(x != x, x, result);
}

inline F4 sigmoid4(F4 x) { return 1.0F / (1.0F + exp4(-x)); }

/// To 3 ulp, also near 0.
inline F4 tanh4(F4 x) {
  const F4 size = abs4(x);
  const F4 large = 1.0F - 2.0F / (exp4(size + size) + 1.0F);
  const F4 square = x * x;
  F4 p = splat(-5.70498872745e-3F);
  p = p * square + 2.06390887954e-2F;
  p = p * square + -5.37397155531e-2F;
  p = p * square + 1.33314422036e-1F;
  p = p * square + -3.33332819422e-1F;
  const F4 small = p * square * x + x;
  const F4 signed_large = as_float((as_int(large) & 0x7fffffff) | (as_int(x) & ~0x7fffffff));
  return select(size < splat(0.625F), small, select(x != x, x, signed_large));
}

}  // namespace moesaic::cpu

// Selection keys: floats as integers of the same order, the way of the host router
// (cpp/src/route/route.cpp). NaN, masked and already picked experts come below every number, so one
// integer maximum picks the next expert.
#pragma once

#include <cstdint>

#include "device.cuh"

namespace moesaic::cuda {

inline constexpr float kLargestFloat = 3.402823466e+38F;
inline constexpr int32_t kMinusInfinityKey = static_cast<int32_t>(0x807FFFFFu);  // float_key(-inf)
inline constexpr int32_t kNanKey = INT32_MIN + 2;
inline constexpr int32_t kMaskedKey = INT32_MIN + 1;
inline constexpr int32_t kPickedKey = INT32_MIN;

// -0 becomes +0 first.
MOESAIC_DEV int32_t float_key(float value) {
  const int32_t bits = __float_as_int(value + 0.0F);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

MOESAIC_DEV float key_float(int32_t key) {
  return __int_as_float(key ^ ((key >> 31) & 0x7FFFFFFF));
}

MOESAIC_DEV bool is_nonfinite(float value) {
  return (__float_as_uint(value) & 0x7F800000u) == 0x7F800000u;
}

// Finite, or +inf, which counts as the largest float.
MOESAIC_DEV bool is_usable(float logit) { return logit > -INFINITY; }

MOESAIC_DEV float clamp_finite(float value) {
  return fminf(fmaxf(value, -kLargestFloat), kLargestFloat);
}

}  // namespace moesaic::cuda

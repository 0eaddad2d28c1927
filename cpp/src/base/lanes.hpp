#pragma once

/// Four f32 lanes in the baseline instruction set (SSE2, NEON), by compiler vector types. Nothing
/// here is contracted or reordered, so results are the same on every machine.

#include <bit>
#include <cstdint>
#include <cstring>

namespace moesaic {

using F4 = float __attribute__((vector_size(16)));
using I4 = std::int32_t __attribute__((vector_size(16)));

inline F4 splat(float value) { return F4{value, value, value, value}; }
inline F4 load4(const float* from) {
  F4 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline void store4(float* to, F4 value) { std::memcpy(to, &value, sizeof(value)); }
inline F4 as_float(I4 bits) { return std::bit_cast<F4>(bits); }
inline I4 as_int(F4 value) { return std::bit_cast<I4>(value); }

/// mask ? a : b, for masks of all ones or zeros.
inline F4 select(I4 mask, F4 a, F4 b) { return as_float((mask & as_int(a)) | (~mask & as_int(b))); }
/// As std::min and std::max: the first argument where one is NaN.
inline F4 min4(F4 a, F4 b) { return b < a ? b : a; }
inline F4 max4(F4 a, F4 b) { return a < b ? b : a; }
inline F4 abs4(F4 x) { return as_float(as_int(x) & 0x7fffffff); }
/// To the nearest integer, ties to even, for |x| <= 2^22: adding 1.5 * 2^23 leaves no fraction bits.
inline F4 round4(F4 x) {
  const F4 magic = splat(12582912.0F);
  return (x + magic) - magic;
}
inline float sum4(F4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

}  // namespace moesaic

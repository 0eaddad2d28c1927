// bf16 and f16 as bit patterns: conversions round to nearest even, pair operations round once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cuda/qualifiers.hpp"

namespace moesaic::dev {

inline float bf16_to_f32(uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); }

inline uint16_t f32_to_bf16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if (f != f) return 0x7FFF;  // the only NaN that cvt.rn.bf16.f32 makes
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_f32(uint16_t h) {
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  const int exponent = h >> 10 & 31;
  const auto mantissa = static_cast<float>(h & 1023);
  if (exponent == 31) return h & 1023 ? std::bit_cast<float>(0x7FFFFFFFu) : sign * HUGE_VALF;
  if (exponent == 0) return sign * mantissa * 0x1p-24f;
  return sign * std::ldexp(1024.0f + mantissa, exponent - 25);
}

inline uint16_t f32_to_f16(float f) {
  if (f != f) return 0x7FFF;
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7C00;  // halfway between the largest value and 2^16
  if (magnitude < 0x1p-24f / 2) return sign;
  // The unit in the last place; nearbyint rounds ties to even.
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const float steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  const auto code = static_cast<int>(steps) + ((exponent + 14) << 10);
  return static_cast<uint16_t>(sign | code);
}

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t{f32_to_bf16(high)} << 16 | f32_to_bf16(low);
}
inline uint32_t pack_f16(float low, float high) {
  return uint32_t{f32_to_f16(high)} << 16 | f32_to_f16(low);
}
inline float2 unpack_bf16(uint32_t pair) {
  return {bf16_to_f32(static_cast<uint16_t>(pair)), bf16_to_f32(static_cast<uint16_t>(pair >> 16))};
}
inline float2 unpack_f16(uint32_t pair) {
  return {f16_to_f32(static_cast<uint16_t>(pair)), f16_to_f32(static_cast<uint16_t>(pair >> 16))};
}

namespace detail {

// A double as the f32 that a second rounding to 16 bits cannot tell from it (round to odd).
inline float round_to_odd(double exact) {
  const auto f = static_cast<float>(exact);
  if (static_cast<double>(f) == exact || !std::isfinite(f)) return f;
  const float down =
      std::fabs(static_cast<double>(f)) > std::fabs(exact) ? std::nextafter(f, 0.0f) : f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(down) | 1u);
}

}  // namespace detail

inline uint32_t bf16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = unpack_bf16(a), y = unpack_bf16(b), z = unpack_bf16(c);
  const auto fma = [](float p, float q, float r) {
    return detail::round_to_odd(std::fma(double{p}, double{q}, double{r}));
  };
  return pack_bf16(fma(x.x, y.x, z.x), fma(x.y, y.y, z.y));
}

// One times a is exact before the rounding.
inline uint32_t bf16x2_add(uint32_t a, uint32_t b) { return bf16x2_fma(a, 0x3F803F80u, b); }

}  // namespace moesaic::dev

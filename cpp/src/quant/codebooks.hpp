#pragma once

/// Codebooks of the 4-bit types, the 8-bit scale formats that go with them, and 8-bit floats.

#include <array>
#include <bit>
#include <cstdint>
#include <limits>

namespace moesaic::quant {

/// The levels of IQ4_NL and IQ4_XS (a constant of ggml, MIT licence: see iq_grids.hpp).
inline constexpr std::array<std::int8_t, 16> kIq4Levels = {
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/// Twice the E2M1 values 0 .5 1 1.5 2 3 4 6 and their negatives, so that they are integers. The
/// scale functions below give half the scale in return.
inline constexpr std::array<std::int8_t, 16> kE2m1Doubled = {0, 1,  2,  3,  4,  6,  8,  12,
                                                             0, -1, -2, -3, -4, -6, -8, -12};

/// 2^(e - 128), half an E8M0 scale. The two smallest are subnormal; 0xff is not special.
constexpr float half_e8m0(std::uint8_t e) {
  const std::uint32_t bits = e < 2 ? 0x00200000u << e : static_cast<std::uint32_t>(e - 1) << 23;
  return std::bit_cast<float>(bits);
}

/// Half an unsigned E4M3 scale (bias 7, the top bit ignored); the NaN code 0x7f gives 0.
constexpr float half_ue4m3(std::uint8_t code) {
  if (code == 0x7f) return 0.0f;
  const std::uint32_t exponent = code >> 3 & 15u;
  const std::uint32_t mantissa = code & 7u;
  if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-10f;
  return std::bit_cast<float>((exponent + 127u - 8u) << 23 | mantissa << 20);
}

/// An E4M3 value: a sign, 4 bits of exponent (bias 7), 3 of mantissa. The largest is 448; there are
/// no infinities, and 0x7f and 0xff are NaN. (OCP 8-bit Floating Point Specification, 2023)
constexpr float e4m3(std::uint8_t code) {
  const std::uint32_t sign = code >> 7;
  const std::uint32_t exponent = code >> 3 & 15u;
  const std::uint32_t mantissa = code & 7u;
  if ((code & 0x7f) == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  if (exponent != 0) {
    return std::bit_cast<float>(sign << 31 | (exponent + 127u - 7u) << 23 | mantissa << 20);
  }
  const float small = static_cast<float>(mantissa) * 0x1p-9f;
  return sign != 0 ? -small : small;
}
inline constexpr float kLargestE4m3 = 448.0f;

}  // namespace moesaic::quant

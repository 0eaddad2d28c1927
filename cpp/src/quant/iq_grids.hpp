#pragma once

/// The grids of the IQ1, IQ2 and IQ3 types: lists of the points (8 or 4 weights) that a code can
/// mean. They follow no formula; they are constants of ggml (MIT licence, notice in iq_points.inc).

#include <array>
#include <cstddef>
#include <cstdint>

namespace moesaic::quant {

/// N points of K levels, byte after byte: a point is one aligned 4- or 8-byte load.
template <std::size_t N, std::size_t K>
using Grid = std::array<std::array<std::int8_t, K>, N>;

alignas(64) extern const Grid<256, 8> kGridIq2xxs;  ///< levels 8, 25, 43
alignas(64) extern const Grid<512, 8> kGridIq2xs;   ///< levels 8, 25, 43
alignas(64) extern const Grid<1024, 8> kGridIq2s;   ///< levels 8, 25, 43
alignas(64) extern const Grid<256, 4> kGridIq3xxs;  ///< levels 4, 12, 20, 28, 36, 44, 52, 62
alignas(64) extern const Grid<512, 4> kGridIq3s;    ///< levels 1, 3, .. 15
alignas(64) extern const Grid<2048, 8> kGridIq1;    ///< levels -1, 0, 1

/// IQ2_XXS, IQ2_XS and IQ3_XXS store 7 signs; the eighth makes the number of minus signs even.
/// Bit k of the result is set when weight k is negative. Static: kernels of an instruction set may
/// include this header, and the linker must not share their copy.
static constexpr std::uint8_t full_signs(std::uint32_t signs7) {
  std::uint32_t parity = signs7;
  parity ^= parity >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return static_cast<std::uint8_t>(signs7 | (parity & 1u) << 7);
}

}  // namespace moesaic::quant

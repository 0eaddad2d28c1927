#pragma once

/// Loads points of a grid, entries of 8 or 4 bytes of a table, into 128 bits: what pick8 and pick4
/// of AVX2 and AVX-512 are made of. Included by their simd.hpp.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace moesaic::cpu {
namespace {

/// Two points of 8 bytes: entries rows[0] and rows[1].
MOESAIC_ALWAYS_INLINE __m128d two_points(const std::uint8_t* points, const std::uint32_t* rows) {
  const auto at = [&](int row) __attribute__((always_inline)) {
    return reinterpret_cast<const double*>(points + std::size_t{8} * rows[row]);
  };
  return _mm_loadh_pd(_mm_load_sd(at(0)), at(1));
}
/// Four points of 4 bytes: entries rows[0] .. rows[3].
MOESAIC_ALWAYS_INLINE __m128i four_points(const std::uint8_t* points, const std::uint32_t* rows) {
  const auto at = [&](int row) __attribute__((always_inline)) {
    const auto* point = reinterpret_cast<const float*>(points + std::size_t{4} * rows[row]);
    return _mm_castps_si128(_mm_load_ss(point));
  };
  return _mm_unpacklo_epi64(_mm_unpacklo_epi32(at(0), at(1)), _mm_unpacklo_epi32(at(2), at(3)));
}

}  // namespace
}  // namespace moesaic::cpu

#pragma once

/// The vector operations of AVX2: 8 lanes, so a panel is done in two halves. avxvnni/simd.hpp
/// includes this file with MOESAIC_AVX_VNNI defined, which replaces the dot product.

#include <immintrin.h>

#include <cstdint>

#define MOESAIC_ALWAYS_INLINE inline __attribute__((always_inline))

#include "cpu/kernels/x86_points.hpp"

namespace moesaic::cpu {
namespace {

constexpr int kLanes = 8;
constexpr bool kSignedDot = false;
constexpr int kMaxBundle[3] = {4, 4, 2};
constexpr int kMaxFused = 2;

using V = __m256i;
using I = __m256i;
using F = __m256;

MOESAIC_ALWAYS_INLINE V load(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
MOESAIC_ALWAYS_INLINE void store(std::uint8_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
MOESAIC_ALWAYS_INLINE V bit_or(V a, V b) { return _mm256_or_si256(a, b); }
MOESAIC_ALWAYS_INLINE V flip_sign(V v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }

/// Bits [From, From + width) of each byte, moved to bit To; kMask has the lowest `width` bits set.
template <int From, int To, int kMask>
MOESAIC_ALWAYS_INLINE V bits(V v) {
  if constexpr (From > To) v = _mm256_srli_epi16(v, From - To);
  if constexpr (From < To) v = _mm256_slli_epi16(v, To - From);
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(kMask << To)));
}
/// table[v] for bytes below 16.
MOESAIC_ALWAYS_INLINE V lookup(V v, const std::uint8_t* table) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), v);
}
/// All ones in byte j of each lane whose bit 4 * k4 + j of the lane's word is set, else 0.
template <int k4>
MOESAIC_ALWAYS_INLINE V spread_mask(V words) {
  constexpr char b = k4 / 2;
  const V bytes =
      _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                     b, b, b, b, b + 4, b + 4, b + 4, b + 4, b + 8, b + 8, b + 8,
                                     b + 8, b + 12, b + 12, b + 12, b + 12)));
  const V select = _mm256_set1_epi32(k4 % 2 == 0 ? 0x08040201 : static_cast<int>(0x80402010));
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, select), select);
}
/// 16 in byte j of each lane whose bit 4 * k4 + j of the lane's word is set, else 0.
template <int k4>
MOESAIC_ALWAYS_INLINE V spread_bits(V words) {
  return _mm256_and_si256(spread_mask<k4>(words), _mm256_set1_epi8(16));
}
/// v with those of its bytes negated whose bit of the lane's word is set, as in spread_bits.
template <int k4>
MOESAIC_ALWAYS_INLINE V negate_where(V v, V words) {
  const V mask = spread_mask<k4>(words);
  return _mm256_sub_epi8(_mm256_xor_si256(v, mask), mask);
}
/// Lane i of `low` is bytes 0 .. 3, lane i of `high` bytes 4 .. 7 of entry rows[i] of a table whose
/// entries have 8 bytes.
MOESAIC_ALWAYS_INLINE void pick8(const std::uint8_t* points, const std::uint32_t* rows, V& low,
                                 V& high) {
  const auto pair = [&](int i)
                        __attribute__((always_inline)) { return two_points(points, rows + i); };
  const __m256 a = _mm256_castpd_ps(_mm256_set_m128d(pair(4), pair(0)));
  const __m256 b = _mm256_castpd_ps(_mm256_set_m128d(pair(6), pair(2)));
  low = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
  high = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
}
/// Lane i is entry rows[i] of a table whose entries have 4 bytes.
MOESAIC_ALWAYS_INLINE V pick4(const std::uint8_t* points, const std::uint32_t* rows) {
  return _mm256_set_m128i(four_points(points, rows + 4), four_points(points, rows));
}

/// acc + the dot product of each row's 4 weights and the 4 activations at `a`, which all rows
/// share. Without VNNI two products are first added in 16 bits. Weights up to 127 cannot saturate
/// such a pair (127 * 128 * 2 < 32768); wide ones are multiplied one of each pair at a time.
template <bool kWide>
MOESAIC_ALWAYS_INLINE I dot(I acc, V weights, const std::int32_t* a) {
  const V act = _mm256_set1_epi32(*a);
#ifdef MOESAIC_AVX_VNNI
  return _mm256_dpbusd_avx_epi32(acc, weights, act);
#else
  const V ones = _mm256_set1_epi16(1);
  if constexpr (kWide) {
    const V low = _mm256_set1_epi16(255);
    const V even = _mm256_maddubs_epi16(_mm256_and_si256(weights, low), act);
    const V odd = _mm256_maddubs_epi16(_mm256_andnot_si256(low, weights), act);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, ones));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(odd, ones));
  } else {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, act), ones));
  }
#endif
}

MOESAIC_ALWAYS_INLINE I zero_i() { return _mm256_setzero_si256(); }
template <int kShift>
MOESAIC_ALWAYS_INLINE I broadcast_shifted(const std::int32_t* p) {
  return _mm256_slli_epi32(_mm256_set1_epi32(*p), kShift);
}
/// 256 * high + low
MOESAIC_ALWAYS_INLINE I join_planes(I high, I low) {
  return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
}
MOESAIC_ALWAYS_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
/// 2^n for integral n in [-126, 127]
MOESAIC_ALWAYS_INLINE F power_of_two(F n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
MOESAIC_ALWAYS_INLINE F load_f(const float* p) { return _mm256_loadu_ps(p); }
MOESAIC_ALWAYS_INLINE void store_f(float* p, F v) { _mm256_storeu_ps(p, v); }
MOESAIC_ALWAYS_INLINE F broadcast_f(const float* p) { return _mm256_broadcast_ss(p); }
MOESAIC_ALWAYS_INLINE F set_f(float v) { return _mm256_set1_ps(v); }
MOESAIC_ALWAYS_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
MOESAIC_ALWAYS_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
MOESAIC_ALWAYS_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
MOESAIC_ALWAYS_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
MOESAIC_ALWAYS_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
/// v limited to [low, high]; a NaN in v stays.
MOESAIC_ALWAYS_INLINE F clamp(F v, F low, F high) {
  return _mm256_max_ps(low, _mm256_min_ps(high, v));
}
MOESAIC_ALWAYS_INLINE F round_f(F v) { return _mm256_round_ps(v, 8); }
/// Loads kLanes f16 (or bf16) values as f32.
MOESAIC_ALWAYS_INLINE F load_f16(const std::uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MOESAIC_ALWAYS_INLINE F load_bf16(const std::uint8_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
/// Loads E4M3 codes of 4 columns x kLanes rows, two columns of a row side by side and the other two
/// 32 bytes further, as f32 times 2^-8. As the upper bytes of 16 bits, with their exponents moved to
/// its place, they are f16.
MOESAIC_ALWAYS_INLINE void load_e4m3(const std::uint8_t* p, F (&columns)[4]) {
  const auto half = [&](int at) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + at));
  };
  const __m256i codes = _mm256_set_m128i(half(32), half(0));
  const __m256i keep = _mm256_set1_epi16(static_cast<short>(0xbf80));  // all but what moved in
  const __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1), keep);
  const __m256i odd = _mm256_and_si256(_mm256_srai_epi16(codes, 1), keep);
  columns[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(even));
  columns[1] = _mm256_cvtph_ps(_mm256_castsi256_si128(odd));
  columns[2] = _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1));
  columns[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1));
}
/// Loads kLanes unsigned (or signed) bytes as f32.
MOESAIC_ALWAYS_INLINE F load_u8(const std::uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
MOESAIC_ALWAYS_INLINE F load_i8(const std::uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
MOESAIC_ALWAYS_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace
}  // namespace moesaic::cpu

#pragma once

/// The vector operations of AVX-512 with VNNI: 16 lanes, one per row of a panel.

// GCC 12 warns of the deliberately undefined operands in its own header, so that is silenced here.
#ifndef __clang__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#ifndef __clang__
#pragma GCC diagnostic pop
#endif

#include <cstdint>

#define MOESAIC_ALWAYS_INLINE inline __attribute__((always_inline))

#include "cpu/kernels/x86_points.hpp"

namespace moesaic::cpu {
namespace {

constexpr int kLanes = 16;
constexpr bool kSignedDot = false;        // the dot product takes unsigned weights
constexpr int kMaxBundle[3] = {4, 8, 4};  // tokens whose sums fit in registers: f32, Fast, Exact
constexpr int kMaxFused = 8;  // tokens x planes up to which decoding happens in registers

using V = __m512i;  // 16 rows x 4 small integers
using I = __m512i;  // 16 x int32
using F = __m512;   // 16 x f32

MOESAIC_ALWAYS_INLINE V load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
MOESAIC_ALWAYS_INLINE void store(std::uint8_t* p, V v) { _mm512_storeu_si512(p, v); }
MOESAIC_ALWAYS_INLINE V bit_or(V a, V b) { return _mm512_or_si512(a, b); }
MOESAIC_ALWAYS_INLINE V flip_sign(V v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }

/// Bits [From, From + width) of each byte, moved to bit To; kMask has the lowest `width` bits set.
template <int From, int To, int kMask>
MOESAIC_ALWAYS_INLINE V bits(V v) {
  if constexpr (From > To) v = _mm512_srli_epi16(v, From - To);
  if constexpr (From < To) v = _mm512_slli_epi16(v, To - From);
  return _mm512_and_si512(v, _mm512_set1_epi8(static_cast<char>(kMask << To)));
}
/// table[v] for bytes below 16.
MOESAIC_ALWAYS_INLINE V lookup(V v, const std::uint8_t* table) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), v);
}
/// A mask of the bytes j of each lane whose bit 4 * k4 + j of the lane's word is set.
template <int k4>
MOESAIC_ALWAYS_INLINE __mmask64 spread_mask(V words) {
  constexpr char b = k4 / 2;
  const V bytes = _mm512_shuffle_epi8(
      words,
      _mm512_broadcast_i32x4(_mm_setr_epi8(b, b, b, b, b + 4, b + 4, b + 4, b + 4, b + 8, b + 8,
                                           b + 8, b + 8, b + 12, b + 12, b + 12, b + 12)));
  return _mm512_test_epi8_mask(bytes, _mm512_set1_epi32(k4 % 2 == 0 ? 0x08040201 : 0x80402010));
}
/// 16 in byte j of each lane whose bit 4 * k4 + j of the lane's word is set, else 0.
template <int k4>
MOESAIC_ALWAYS_INLINE V spread_bits(V words) {
  return _mm512_maskz_set1_epi8(spread_mask<k4>(words), 16);
}
/// v with those of its bytes negated whose bit of the lane's word is set, as in spread_bits.
template <int k4>
MOESAIC_ALWAYS_INLINE V negate_where(V v, V words) {
  return _mm512_mask_sub_epi8(v, spread_mask<k4>(words), _mm512_setzero_si512(), v);
}
/// Lane i of `low` is bytes 0 .. 3, lane i of `high` bytes 4 .. 7 of entry rows[i] of a table whose
/// entries have 8 bytes.
MOESAIC_ALWAYS_INLINE void pick8(const std::uint8_t* points, const std::uint32_t* rows, V& low,
                                 V& high) {
  const auto pair = [&](int i)
                        __attribute__((always_inline)) { return two_points(points, rows + i); };
  const auto four_pairs = [&](int i) __attribute__((always_inline)) {
    const __m256d first = _mm256_set_m128d(pair(i + 4), pair(i));
    const __m256d second = _mm256_set_m128d(pair(i + 12), pair(i + 8));
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(first), second, 1));
  };
  const __m512 a = four_pairs(0);  // rows 0 1, 4 5, 8 9, 12 13
  const __m512 b = four_pairs(2);
  low = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
  high = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
}
/// Lane i is entry rows[i] of a table whose entries have 4 bytes.
MOESAIC_ALWAYS_INLINE V pick4(const std::uint8_t* points, const std::uint32_t* rows) {
  const auto four = [&](int i)
                        __attribute__((always_inline)) { return four_points(points, rows + i); };
  const __m256i first = _mm256_set_m128i(four(4), four(0));
  const __m256i second = _mm256_set_m128i(four(12), four(8));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

/// acc + the dot product of each row's 4 weights and the 4 activations at `a`, which all rows
/// share.
template <bool kWide>
MOESAIC_ALWAYS_INLINE I dot(I acc, V weights, const std::int32_t* a) {
  return _mm512_dpbusd_epi32(acc, weights, _mm512_set1_epi32(*a));
}

MOESAIC_ALWAYS_INLINE I zero_i() { return _mm512_setzero_si512(); }
template <int kShift>
MOESAIC_ALWAYS_INLINE I broadcast_shifted(const std::int32_t* p) {
  return _mm512_slli_epi32(_mm512_set1_epi32(*p), kShift);
}
/// 256 * high + low
MOESAIC_ALWAYS_INLINE I join_planes(I high, I low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}
MOESAIC_ALWAYS_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
/// 2^n for integral n in [-126, 127]
MOESAIC_ALWAYS_INLINE F power_of_two(F n) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
MOESAIC_ALWAYS_INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
MOESAIC_ALWAYS_INLINE void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
MOESAIC_ALWAYS_INLINE F broadcast_f(const float* p) { return _mm512_set1_ps(*p); }
MOESAIC_ALWAYS_INLINE F set_f(float v) { return _mm512_set1_ps(v); }
MOESAIC_ALWAYS_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
MOESAIC_ALWAYS_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
MOESAIC_ALWAYS_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
MOESAIC_ALWAYS_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
MOESAIC_ALWAYS_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
/// v limited to [low, high]; a NaN in v stays.
MOESAIC_ALWAYS_INLINE F clamp(F v, F low, F high) {
  return _mm512_max_ps(low, _mm512_min_ps(high, v));
}
MOESAIC_ALWAYS_INLINE F round_f(F v) { return _mm512_roundscale_ps(v, 8); }
/// Loads kLanes f16 (or bf16) values as f32.
MOESAIC_ALWAYS_INLINE F load_f16(const std::uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MOESAIC_ALWAYS_INLINE F load_bf16(const std::uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
/// Loads E4M3 codes of 4 columns x kLanes rows, two columns of a row side by side and the other two
/// 32 bytes further, as f32 times 2^-8. As the upper bytes of 16 bits, with their exponents moved to
/// its place, they are f16.
MOESAIC_ALWAYS_INLINE void load_e4m3(const std::uint8_t* p, F (&columns)[4]) {
  const __m512i codes = _mm512_loadu_si512(p);
  const __m512i keep = _mm512_set1_epi16(static_cast<short>(0xbf80));  // all but what moved in
  const __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 1), keep);
  const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(codes, 1), keep);
  columns[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(even));
  columns[1] = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
  columns[2] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
  columns[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
}
/// Loads kLanes unsigned (or signed) bytes as f32.
MOESAIC_ALWAYS_INLINE F load_u8(const std::uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
MOESAIC_ALWAYS_INLINE F load_i8(const std::uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
MOESAIC_ALWAYS_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace
}  // namespace moesaic::cpu

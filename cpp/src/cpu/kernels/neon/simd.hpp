#pragma once

/// The vector operations of NEON with dotprod: 4 lanes, so a panel is done in four quarters. The
/// dot product is signed, so weights of 8 bits stay signed and need no offset.

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#define MOESAIC_ALWAYS_INLINE inline __attribute__((always_inline))

namespace moesaic::cpu {
namespace {

constexpr int kLanes = 4;
constexpr bool kSignedDot = true;
constexpr int kMaxBundle[3] = {4, 8, 4};
constexpr int kMaxFused = 4;

using V = uint8x16_t;
using I = int32x4_t;
using F = float32x4_t;

MOESAIC_ALWAYS_INLINE V load(const std::uint8_t* p) { return vld1q_u8(p); }
MOESAIC_ALWAYS_INLINE void store(std::uint8_t* p, V v) { vst1q_u8(p, v); }
MOESAIC_ALWAYS_INLINE V bit_or(V a, V b) { return vorrq_u8(a, b); }
MOESAIC_ALWAYS_INLINE V flip_sign(V v) { return veorq_u8(v, vdupq_n_u8(128)); }

/// Bits [From, From + width) of each byte, moved to bit To; kMask has the lowest `width` bits set.
template <int From, int To, int kMask>
MOESAIC_ALWAYS_INLINE V bits(V v) {
  if constexpr (From > To) v = vshrq_n_u8(v, From - To);
  if constexpr (From < To) v = vshlq_n_u8(v, To - From);
  return vandq_u8(v, vdupq_n_u8(kMask << To));
}
/// table[v] for bytes below 16.
MOESAIC_ALWAYS_INLINE V lookup(V v, const std::uint8_t* table) {
  return vqtbl1q_u8(vld1q_u8(table), v);
}
/// All ones in byte j of each lane whose bit 4 * k4 + j of the lane's word is set, else 0.
template <int k4>
MOESAIC_ALWAYS_INLINE V spread_mask(V words) {
  constexpr std::uint8_t b = k4 / 2;
  const V index = {b,     b,     b,     b,     b + 4,  b + 4,  b + 4,  b + 4,
                   b + 8, b + 8, b + 8, b + 8, b + 12, b + 12, b + 12, b + 12};
  const V select = vreinterpretq_u8_u32(vdupq_n_u32(k4 % 2 == 0 ? 0x08040201U : 0x80402010U));
  return vtstq_u8(vqtbl1q_u8(words, index), select);
}
/// 16 in byte j of each lane whose bit 4 * k4 + j of the lane's word is set, else 0.
template <int k4>
MOESAIC_ALWAYS_INLINE V spread_bits(V words) {
  return vandq_u8(spread_mask<k4>(words), vdupq_n_u8(16));
}
/// v with those of its bytes negated whose bit of the lane's word is set, as in spread_bits.
template <int k4>
MOESAIC_ALWAYS_INLINE V negate_where(V v, V words) {
  const V mask = spread_mask<k4>(words);
  return vsubq_u8(veorq_u8(v, mask), mask);
}
/// Lane i of `low` is bytes 0 .. 3, lane i of `high` bytes 4 .. 7 of entry rows[i] of a table whose
/// entries have 8 bytes.
MOESAIC_ALWAYS_INLINE void pick8(const std::uint8_t* points, const std::uint32_t* rows, V& low,
                                 V& high) {
  const auto at = [&](int row) { return vld1_u8(points + std::size_t{8} * rows[row]); };
  const auto a = vreinterpretq_u32_u8(vcombine_u8(at(0), at(1)));
  const auto b = vreinterpretq_u32_u8(vcombine_u8(at(2), at(3)));
  low = vreinterpretq_u8_u32(vuzp1q_u32(a, b));
  high = vreinterpretq_u8_u32(vuzp2q_u32(a, b));
}
/// Lane i is entry rows[i] of a table whose entries have 4 bytes.
MOESAIC_ALWAYS_INLINE V pick4(const std::uint8_t* points, const std::uint32_t* rows) {
  uint32x4_t v = vdupq_n_u32(0);
  v = vld1q_lane_u32(reinterpret_cast<const std::uint32_t*>(points + std::size_t{4} * rows[0]), v,
                     0);
  v = vld1q_lane_u32(reinterpret_cast<const std::uint32_t*>(points + std::size_t{4} * rows[1]), v,
                     1);
  v = vld1q_lane_u32(reinterpret_cast<const std::uint32_t*>(points + std::size_t{4} * rows[2]), v,
                     2);
  v = vld1q_lane_u32(reinterpret_cast<const std::uint32_t*>(points + std::size_t{4} * rows[3]), v,
                     3);
  return vreinterpretq_u8_u32(v);
}

/// acc + the dot product of each row's 4 weights and the 4 activations at `a`, which all rows
/// share.
template <bool kWide>
MOESAIC_ALWAYS_INLINE I dot(I acc, V weights, const std::int32_t* a) {
  return vdotq_s32(acc, vreinterpretq_s8_u8(weights), vreinterpretq_s8_s32(vld1q_dup_s32(a)));
}

MOESAIC_ALWAYS_INLINE I zero_i() { return vdupq_n_s32(0); }
template <int kShift>
MOESAIC_ALWAYS_INLINE I broadcast_shifted(const std::int32_t* p) {
  return vshlq_n_s32(vld1q_dup_s32(p), kShift);
}
/// 256 * high + low
MOESAIC_ALWAYS_INLINE I join_planes(I high, I low) { return vaddq_s32(vshlq_n_s32(high, 8), low); }
MOESAIC_ALWAYS_INLINE F to_float(I v) { return vcvtq_f32_s32(v); }
/// 2^n for integral n in [-126, 127]
MOESAIC_ALWAYS_INLINE F power_of_two(F n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
MOESAIC_ALWAYS_INLINE F load_f(const float* p) { return vld1q_f32(p); }
MOESAIC_ALWAYS_INLINE void store_f(float* p, F v) { vst1q_f32(p, v); }
MOESAIC_ALWAYS_INLINE F broadcast_f(const float* p) { return vld1q_dup_f32(p); }
MOESAIC_ALWAYS_INLINE F set_f(float v) { return vdupq_n_f32(v); }
MOESAIC_ALWAYS_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
MOESAIC_ALWAYS_INLINE F sub(F a, F b) { return vsubq_f32(a, b); }
MOESAIC_ALWAYS_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
MOESAIC_ALWAYS_INLINE F div(F a, F b) { return vdivq_f32(a, b); }
MOESAIC_ALWAYS_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
/// v limited to [low, high]; a NaN in v stays.
MOESAIC_ALWAYS_INLINE F clamp(F v, F low, F high) { return vmaxq_f32(low, vminq_f32(high, v)); }
MOESAIC_ALWAYS_INLINE F round_f(F v) { return vrndnq_f32(v); }
/// Loads kLanes f16 (or bf16) values as f32.
MOESAIC_ALWAYS_INLINE F load_f16(const std::uint8_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
MOESAIC_ALWAYS_INLINE F load_bf16(const std::uint8_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
/// Loads E4M3 codes of 4 columns x kLanes rows, two columns of a row side by side and the other two
/// 32 bytes further, as f32 times 2^-8. As the upper bytes of 16 bits, with their exponents moved to
/// its place, they are f16.
MOESAIC_ALWAYS_INLINE void load_e4m3(const std::uint8_t* p, F (&columns)[4]) {
  const int16x8_t codes = vreinterpretq_s16_u8(vcombine_u8(vld1_u8(p), vld1_u8(p + 32)));
  const int16x8_t keep = vdupq_n_s16(static_cast<std::int16_t>(0xbf80));  // all but what moved in
  const float16x8_t even =
      vreinterpretq_f16_s16(vandq_s16(vshrq_n_s16(vshlq_n_s16(codes, 8), 1), keep));
  const float16x8_t odd = vreinterpretq_f16_s16(vandq_s16(vshrq_n_s16(codes, 1), keep));
  columns[0] = vcvt_f32_f16(vget_low_f16(even));
  columns[1] = vcvt_f32_f16(vget_low_f16(odd));
  columns[2] = vcvt_f32_f16(vget_high_f16(even));
  columns[3] = vcvt_f32_f16(vget_high_f16(odd));
}
/// Loads kLanes unsigned (or signed) bytes as f32.
MOESAIC_ALWAYS_INLINE F load_u8(const std::uint8_t* p) {
  return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
           static_cast<float>(p[3])};
}
MOESAIC_ALWAYS_INLINE F load_i8(const std::uint8_t* p) {
  const auto* s = reinterpret_cast<const std::int8_t*>(p);
  return F{static_cast<float>(s[0]), static_cast<float>(s[1]), static_cast<float>(s[2]),
           static_cast<float>(s[3])};
}
MOESAIC_ALWAYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace
}  // namespace moesaic::cpu

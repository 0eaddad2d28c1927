#pragma once

/// The vector operations as plain loops: the twin that every instruction set is compared with.
/// Integers are the same; fma rounds twice here, so f32 sums may differ in their last bits.

#include <cstdint>
#include <cstring>

#include "moesaic/types.hpp"

#define MOESAIC_ALWAYS_INLINE inline

namespace moesaic::cpu {
namespace {

constexpr int kLanes = 16;
constexpr bool kSignedDot = false;
constexpr int kMaxBundle[3] = {1, 1, 1};
constexpr int kMaxFused = 0;

struct V {
  std::uint8_t b[64];
};
struct I {
  std::int32_t v[16];
};
struct F {
  float v[16];
};

template <class T, class Op>
inline T lanes(Op op) {
  T out;
  for (int i = 0; i < 16; ++i) out.v[i] = op(i);
  return out;
}
template <class Op>
inline V bytes(Op op) {
  V out;
  for (int i = 0; i < 64; ++i) out.b[i] = static_cast<std::uint8_t>(op(i));
  return out;
}

inline V load(const std::uint8_t* p) {
  return bytes([&](int i) { return p[i]; });
}
inline void store(std::uint8_t* p, const V& v) { std::memcpy(p, v.b, sizeof v.b); }
inline V bit_or(const V& a, const V& b) {
  return bytes([&](int i) { return a.b[i] | b.b[i]; });
}
inline V flip_sign(const V& v) {
  return bytes([&](int i) { return v.b[i] ^ 128; });
}

/// Bits [From, From + width) of each byte, moved to bit To; kMask has the lowest `width` bits set.
template <int From, int To, int kMask>
inline V bits(const V& v) {
  return bytes([&](int i) { return (v.b[i] >> From & kMask) << To; });
}
/// table[v] for bytes below 16.
inline V lookup(const V& v, const std::uint8_t* table) {
  return bytes([&](int i) { return table[v.b[i]]; });
}
/// 16 in byte j of each lane whose bit 4 * k4 + j of the lane's word is set, else 0.
template <int k4>
inline V spread_bits(const V& words) {
  return bytes([&](int i) {
    const int bit = 4 * k4 + i % 4;
    return (words.b[i / 4 * 4 + bit / 8] >> (bit % 8) & 1) << 4;
  });
}

/// v with those of its bytes negated whose bit of the lane's word is set, as in spread_bits.
template <int k4>
inline V negate_where(const V& v, const V& words) {
  const V set = spread_bits<k4>(words);
  return bytes([&](int i) { return set.b[i] != 0 ? -v.b[i] : v.b[i]; });
}
/// Lane i of `low` is bytes 0 .. 3, lane i of `high` bytes 4 .. 7 of entry rows[i] of a table whose
/// entries have 8 bytes.
inline void pick8(const std::uint8_t* points, const std::uint32_t* rows, V& low, V& high) {
  low = bytes([&](int i) { return points[8 * rows[i / 4] + i % 4]; });
  high = bytes([&](int i) { return points[8 * rows[i / 4] + 4 + i % 4]; });
}
/// Lane i is entry rows[i] of a table whose entries have 4 bytes.
inline V pick4(const std::uint8_t* points, const std::uint32_t* rows) {
  return bytes([&](int i) { return points[4 * rows[i / 4] + i % 4]; });
}

/// acc + the dot product of each row's 4 weights and the 4 activations at `a`, which all rows
/// share.
template <bool kWide>
inline I dot(const I& acc, const V& weights, const std::int32_t* a) {
  std::int8_t act[4];
  std::memcpy(act, a, 4);
  return lanes<I>([&](int i) {
    const std::uint8_t* w = weights.b + 4 * i;
    return acc.v[i] + w[0] * act[0] + w[1] * act[1] + w[2] * act[2] + w[3] * act[3];
  });
}

inline I zero_i() { return I{}; }
template <int kShift>
inline I broadcast_shifted(const std::int32_t* p) {
  return lanes<I>([&](int) { return *p * (1 << kShift); });
}
/// 256 * high + low
inline I join_planes(const I& high, const I& low) {
  return lanes<I>([&](int i) { return high.v[i] * 256 + low.v[i]; });
}
inline F to_float(const I& v) {
  return lanes<F>([&](int i) { return static_cast<float>(v.v[i]); });
}
/// 2^n for integral n in [-126, 127]; of a NaN any value, for its conversion is not defined.
inline F power_of_two(const F& n) {
  return lanes<F>([&](int i) {
    const float whole = n.v[i] == n.v[i] ? n.v[i] : 0.0F;
    const std::uint32_t b = static_cast<std::uint32_t>(static_cast<std::int32_t>(whole) + 127)
                            << 23;
    float f;
    std::memcpy(&f, &b, 4);
    return f;
  });
}
inline F load_f(const float* p) {
  return lanes<F>([&](int i) { return p[i]; });
}
inline void store_f(float* p, const F& v) { std::memcpy(p, v.v, sizeof v.v); }
inline F set_f(float v) {
  return lanes<F>([&](int) { return v; });
}
inline F broadcast_f(const float* p) { return set_f(*p); }
inline F add(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F div(const F& a, const F& b) {
  return lanes<F>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(const F& a, const F& b, const F& c) {
  return lanes<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
/// v limited to [low, high]; a NaN in v stays.
inline F clamp(const F& v, const F& low, const F& high) {
  return lanes<F>([&](int i) {
    const float x = high.v[i] < v.v[i] ? high.v[i] : v.v[i];
    return low.v[i] > x ? low.v[i] : x;
  });
}
/// To the nearest integer, ties to even; |v| below 2^22 (NaN and larger values are unspecified).
inline F round_f(const F& v) {
  return lanes<F>([&](int i) { return (v.v[i] + 12582912.0F) - 12582912.0F; });
}
/// Loads kLanes f16 (or bf16) values as f32.
inline std::uint16_t half_at(const std::uint8_t* p, int i) {
  std::uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return h;
}
inline F load_f16(const std::uint8_t* p) {
  return lanes<F>([&](int i) { return f16_to_f32(half_at(p, i)); });
}
inline F load_bf16(const std::uint8_t* p) {
  return lanes<F>([&](int i) { return bf16_to_f32(half_at(p, i)); });
}
/// Loads E4M3 codes of 4 columns x kLanes rows, two columns of a row side by side and the other two
/// 32 bytes further, as f32 times 2^-8: f16 has room for their exponents, which are 8 smaller there.
inline void load_e4m3(const std::uint8_t* p, F (&columns)[4]) {
  for (int c = 0; c < 4; ++c) {
    columns[c] = lanes<F>([&](int i) {
      const int code = p[c / 2 * 32 + 2 * i + c % 2];
      return f16_to_f32(static_cast<std::uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7));
    });
  }
}
/// Loads kLanes unsigned (or signed) bytes as f32.
inline F load_u8(const std::uint8_t* p) {
  return lanes<F>([&](int i) { return static_cast<float>(p[i]); });
}
inline F load_i8(const std::uint8_t* p) {
  return lanes<F>([&](int i) { return static_cast<float>(static_cast<std::int8_t>(p[i])); });
}
inline void prefetch(const void*) {}

}  // namespace
}  // namespace moesaic::cpu

#pragma once

/// Decoders of the formats with one f16 scale per block and 1, about 1.6 or 2 bits per weight.

#include "cpu/kernels/decode_block32.hpp"
#include "cpu/kernels/lane_words.hpp"

namespace moesaic::cpu {
namespace {

struct SmallDecoder {
  static constexpr int kSub = 32;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = 0;
  static constexpr bool kWide = false;
  static constexpr bool kFused = true;
};

/// Digit n of a byte that holds five ternary digits. The byte is ceil(256 / 243 * the number that
/// the digits spell), so digit n is the integer part of 3 * (byte * 3^n mod 256) / 256.
template <int n>
MOESAIC_ALWAYS_INLINE V ternary_digit(LaneBytes v) {
  for (int i = 0; i < n; ++i) v = v + v + v;
  // A comparison gives all ones, which is -1, so subtracting two of them gives 0, 1 or 2.
  return from_bytes(LaneBytes{} - __builtin_bit_cast(LaneBytes, v >= 86) -
                    __builtin_bit_cast(LaneBytes, v >= 171));
}

/// TQ1_0 keeps 256 columns in 52 bytes: 32 bytes whose digits n = 0 .. 4 are 32 columns each, then
/// 16 bytes whose five digits are 16 columns each, then 4 bytes whose four digits are 4 columns
/// each.
struct tq1_0 : SmallDecoder {
  static constexpr QuantType kType = QuantType::TQ1_0;
  static constexpr int kPeriod = 8;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales<8>(r.last_field(13 * kVector), 8, scale);
  }
  template <int n>
  static MOESAIC_ALWAYS_INLINE V digit(const std::uint8_t* p, int vector) {
    return ternary_digit<n>(to_bytes(load(p + vector * kVector)));
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int, int lane, V* w) {
    const std::uint8_t* p = r.fields() + lane;
    if constexpr (S < 5) {
      for (int i = 0; i < 8; ++i) w[i] = digit<S>(p, i);
    } else if constexpr (S < 7) {
      for (int i = 0; i < 4; ++i) {
        w[i] = digit<2 * (S - 5)>(p, 8 + i);
        w[4 + i] = digit<2 * (S - 5) + 1>(p, 8 + i);
      }
    } else {
      for (int i = 0; i < 4; ++i) w[i] = digit<4>(p, 8 + i);
      unroll<4>([&](auto n)
                    __attribute__((always_inline)) { w[4 + n.value] = digit<n.value>(p, 12); });
    }
  }
};

/// TQ2_0: bits 2g and 2g + 1 of a run of 32 bytes are the 32 columns of step g; two runs make 8
/// steps.
struct tq2_0 : SmallDecoder {
  static constexpr QuantType kType = QuantType::TQ2_0;
  static constexpr int kPeriod = 4;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales<8>(r.last_field(16 * kVector), 8, scale);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    const std::uint8_t* p = r.fields() + base / 4 * kStep + lane;
    for (int i = 0; i < 8; ++i) w[i] = bits<2 * S, 0, 3>(load(p + i * kVector));
  }
};

/// Q1_0 keeps a sign per column. A set bit decodes to 16 and a clear one to 0; the offset 8 makes
/// them +8 and -8, and the scale is divided by 8 in return.
struct q1_0 : SmallDecoder {
  static constexpr QuantType kType = QuantType::Q1_0;
  static constexpr int kOffset = 3;
  static constexpr int kPeriod = 1;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales<4>(r.p + r.steps * kVector, r.steps, scale, 0.125F);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    const V words = load(r.p + base * kVector + lane);
    unroll<8>([&](auto k4) __attribute__((always_inline)) {
      w[k4.value] = spread_bits<decltype(k4)::value>(words);
    });
  }
};

/// Q2_0: byte k holds columns 4k .. 4k + 3, two bits each.
struct q2_0 : SmallDecoder {
  static constexpr QuantType kType = QuantType::Q2_0;
  static constexpr int kPeriod = 1;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales<2>(r.p + r.steps * 2 * kVector, r.steps, scale);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    for (int k4 = 0; k4 < 8; ++k4) {
      const LaneWords words = load_words(r.p + (2 * base + k4 / 4) * kVector + lane);
      const LaneWords four = words >> (8 * (k4 % 4)) & 255U;
      w[k4] = to_vector((four | four << 6 | four << 12 | four << 18) & 0x03030303U);
    }
  }
};

}  // namespace
}  // namespace moesaic::cpu

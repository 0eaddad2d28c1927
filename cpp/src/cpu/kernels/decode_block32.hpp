#pragma once

/// Decoders of the formats with blocks of 32 columns, which have one scale (f16, or a power of two)
/// and sometimes a minimum; and of NVFP4, whose blocks of 64 have a scale per 16.
///
/// A step of nibbles is 4 vectors of 64 bytes. Vector v holds, for each row, columns 4v .. 4v + 3
/// in the low nibbles and columns 16 + 4v .. 16 + 4v + 3 in the high ones.

#include "cpu/kernels/decode.hpp"
#include "cpu/kernels/lane_words.hpp"

namespace moesaic::cpu {
namespace {

/// out[s] = factor * the f16 d of block s / kSteps, where a block has kSteps steps and the d of its
/// 16 rows follow each other.
template <int kSteps = 1>
MOESAIC_ALWAYS_INLINE void f16_scales(const std::uint8_t* d, int steps, Scales out,
                                      float factor = 1.0F) {
  for (int s = 0; s < steps; ++s) {
    for_lanes([&](int row) {
      store_f(out[s] + row, mul(load_f16(d + s / kSteps * 32 + 2 * row), set_f(factor)));
    });
  }
}

MOESAIC_ALWAYS_INLINE void nibbles(const std::uint8_t* q, V* w) {
  for (int i = 0; i < 4; ++i) {
    const V v = load(q + i * kVector);
    w[i] = bits<0, 0, 15>(v);
    w[i + 4] = bits<4, 0, 15>(v);
  }
}

struct Block32 {
  static constexpr int kSub = 32;
  static constexpr int kPeriod = 1;
  static constexpr bool kFused = true;
};

struct q4_0 : Block32 {
  static constexpr QuantType kType = QuantType::Q4_0;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = 3;
  static constexpr bool kWide = false;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales(r.p + r.steps * kNibbleStep, r.steps, scale);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    nibbles(r.p + base * kNibbleStep + lane, w);
  }
};

struct q4_1 : Block32 {
  static constexpr QuantType kType = QuantType::Q4_1;
  static constexpr bool kAdd = true;
  static constexpr int kOffset = kNoOffset;
  static constexpr bool kWide = false;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales add) {
    const std::uint8_t* d = r.p + r.steps * kNibbleStep;
    f16_scales(d, r.steps, scale);
    f16_scales(d + r.steps * 32, r.steps, add);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    nibbles(r.p + base * kNibbleStep + lane, w);
  }
};

/// Adds the fifth bits to decoded nibbles: bit k of word `row` of `high` belongs to column k.
MOESAIC_ALWAYS_INLINE void fifth_bits(const std::uint8_t* high, V* w) {
  const V words = load(high);
  unroll<8>([&](auto k4) __attribute__((always_inline)) {
    w[k4.value] = bit_or(w[k4.value], spread_bits<decltype(k4)::value>(words));
  });
}

struct q5_0 : Block32 {
  static constexpr QuantType kType = QuantType::Q5_0;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = 4;
  static constexpr bool kWide = false;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales(r.p + r.steps * (kNibbleStep + kVector), r.steps, scale);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    nibbles(r.p + base * kNibbleStep + lane, w);
    fifth_bits(r.p + r.steps * kNibbleStep + base * kVector + lane, w);
  }
};

struct q5_1 : Block32 {
  static constexpr QuantType kType = QuantType::Q5_1;
  static constexpr bool kAdd = true;
  static constexpr int kOffset = kNoOffset;
  static constexpr bool kWide = false;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales add) {
    const std::uint8_t* d = r.p + r.steps * (kNibbleStep + kVector);
    f16_scales(d, r.steps, scale);
    f16_scales(d + r.steps * 32, r.steps, add);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    q5_0::weights<S>(r, base, lane, w);
  }
};

struct q8_0 : Block32 {
  static constexpr QuantType kType = QuantType::Q8_0;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = kByteOffset;
  static constexpr bool kWide = true;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales(r.p + r.steps * kStep, r.steps, scale);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    for (int i = 0; i < 8; ++i) {
      const V v = load(r.p + base * kStep + i * kVector + lane);
      w[i] = kSignedDot ? v : flip_sign(v);
    }
  }
};

/// The IQ4 code book plus kBias.
template <int kBias>
struct Iq4Levels {
  static constexpr std::uint8_t byte(int v) { return static_cast<std::uint8_t>(v + kBias); }
  static constexpr std::uint8_t kTable[16] = {
      byte(-127), byte(-104), byte(-83), byte(-65), byte(-49), byte(-35), byte(-22), byte(-10),
      byte(1),    byte(13),   byte(25),  byte(38),  byte(53),  byte(69),  byte(89),  byte(113)};
};
/// An unsigned dot product takes the levels + 128 (kByteOffset).
constexpr int kIq4Bias = kSignedDot ? 0 : 128;
constexpr const std::uint8_t* kIq4Table = Iq4Levels<kIq4Bias>::kTable;

/// Twice the E2M1 values, so that they are integers, plus 2^kFp4Offset, so that they are unsigned.
constexpr int kFp4Offset = 4;
constexpr std::uint8_t kFp4Table[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                        16, 15, 14, 13, 12, 10, 8,  4};

MOESAIC_ALWAYS_INLINE void code_book(const std::uint8_t* q, const std::uint8_t* table, V* w) {
  nibbles(q, w);
  for (int i = 0; i < 8; ++i) w[i] = lookup(w[i], table);
}

struct iq4_nl : Block32 {
  static constexpr QuantType kType = QuantType::IQ4_NL;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = kByteOffset;
  static constexpr bool kWide = true;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    f16_scales(r.p + r.steps * kNibbleStep, r.steps, scale);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    code_book(r.p + base * kNibbleStep + lane, kIq4Table, w);
  }
};

struct mxfp4 : Block32 {
  static constexpr QuantType kType = QuantType::MXFP4;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = kFp4Offset;
  static constexpr bool kWide = false;
  /// 2^(e - 128): half the E8M0 scale, because the table holds twice the values. The two smallest
  /// are subnormal.
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    const std::uint8_t* e = r.p + r.steps * kNibbleStep;
    for (int s = 0; s < r.steps; ++s) {
      std::uint32_t word[kRows];
      for (int row = 0; row < kRows; ++row) {
        const std::uint32_t exponent = e[16 * s + row];
        word[row] = exponent < 2 ? 0x00200000U << exponent : (exponent - 1) << 23;
      }
      std::memcpy(scale[s], word, sizeof word);
    }
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    code_book(r.p + base * kNibbleStep + lane, kFp4Table, w);
  }
};

struct nvfp4 {
  static constexpr QuantType kType = QuantType::NVFP4;
  static constexpr int kSub = 16;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = kFp4Offset;
  static constexpr bool kWide = false;
  static constexpr int kPeriod = 1;
  static constexpr bool kFused = true;
  /// Half the unsigned E4M3 scale (bias 7), because the table holds twice the values; the NaN code
  /// gives 0. Every such half is an integer times 2^-10, so integers are computed and converted.
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    const std::uint8_t* codes = r.p + r.steps * kNibbleStep;
    for_lanes([&](int row) __attribute__((always_inline)) {
      for (int sub = 0; sub < 2 * r.steps; ++sub) {
        const LaneWords four = load_words(codes + sub / 4 * kVector + 4 * row);
        LaneWords code = four >> (8 * (sub % 4)) & 255U;
        code &= ~__builtin_bit_cast(LaneWords, code == 0x7f);
        const LaneWords exponent = code >> 3 & 15U;
        const LaneWords normal = __builtin_bit_cast(LaneWords, exponent != 0) & 1U;
        const LaneWords value = ((code & 7U) | normal << 3) << (exponent - normal);
        store_f(scale[sub] + row, mul(to_float(value), set_f(0x1p-10F)));
      }
    });
  }
  /// Each 16 columns take 8 bytes: columns 0 .. 7 in the low nibbles, 8 .. 15 in the high ones. So
  /// the vectors come out in another order than in blocks of 32.
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    V part[8];
    code_book(r.p + base * kNibbleStep + lane, kFp4Table, part);
    for (int i = 0; i < 8; ++i) w[i] = part[i / 4 * 2 + i % 2 + i / 2 % 2 * 4];
  }
};

}  // namespace
}  // namespace moesaic::cpu

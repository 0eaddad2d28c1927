#pragma once

/// Decoders of the formats with blocks of 256 columns (ggml's superblocks), the K types and IQ4_XS:
/// a record is one block of each of the 16 rows. A block is cut into sub-blocks of 16 or 32
/// columns, the scale groups, whose small integer scales one or two f16 of the block multiply.

#include "cpu/kernels/decode_block32.hpp"

namespace moesaic::cpu {
namespace {

/// out[j] = sign * f16 factor * byte j of each row.
MOESAIC_ALWAYS_INLINE void scaled_u8(const std::uint8_t* factor, float sign,
                                     const std::uint8_t* codes, int count, Scales out) {
  for_lanes([&](int row) {
    const F d = mul(load_f16(factor + 2 * row), set_f(sign));
    for (int j = 0; j < count; ++j) store_f(out[j] + row, mul(d, load_u8(codes + 16 * j + row)));
  });
}
MOESAIC_ALWAYS_INLINE void scaled_i8(const std::uint8_t* factor, const std::uint8_t* codes,
                                     int count, Scales out) {
  for_lanes([&](int row) {
    const F d = load_f16(factor + 2 * row);
    for (int j = 0; j < count; ++j) store_f(out[j] + row, mul(d, load_i8(codes + 16 * j + row)));
  });
}

/// Unpacks the 8 scales and 8 minima of 6 bits that Q4_K and Q5_K keep in 12 bytes, and multiplies
/// them by the f16 d and dmin that follow.
MOESAIC_ALWAYS_INLINE void six_bit_scales(const std::uint8_t* s, Scales scale, Scales add) {
  alignas(64) std::uint8_t scales[8 * kRows];
  alignas(64) std::uint8_t minima[8 * kRows];
  for (int i = 0; i < 64; ++i) {
    scales[i] = s[i] & 63;
    minima[i] = s[64 + i] & 63;
    scales[64 + i] = static_cast<std::uint8_t>((s[128 + i] & 15) | (s[i] >> 6) << 4);
    minima[64 + i] = static_cast<std::uint8_t>((s[128 + i] >> 4) | (s[64 + i] >> 6) << 4);
  }
  scaled_u8(s + 192, 1.0F, scales, 8, scale);
  scaled_u8(s + 224, -1.0F, minima, 8, add);
}

struct q2_k {
  static constexpr QuantType kType = QuantType::Q2_K;
  static constexpr int kSub = 16;
  static constexpr bool kAdd = true;
  static constexpr int kOffset = kNoOffset;
  static constexpr bool kWide = false;
  static constexpr int kPeriod = 4;
  static constexpr bool kFused = true;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales add) {
    const std::uint8_t* codes = r.p + 16 * kVector;
    alignas(64) std::uint8_t low[16 * kRows];
    alignas(64) std::uint8_t high[16 * kRows];
    for (int i = 0; i < 16 * kRows; ++i) {
      low[i] = codes[i] & 15;
      high[i] = codes[i] >> 4;
    }
    scaled_u8(codes + 256, 1.0F, low, 16, scale);
    scaled_u8(codes + 288, -1.0F, high, 16, add);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    for (int i = 0; i < 8; ++i) {
      w[i] = bits<2 * S, 0, 3>(load(r.p + (base / 4 * 8 + i) * kVector + lane));
    }
  }
};

struct q3_k {
  static constexpr QuantType kType = QuantType::Q3_K;
  static constexpr int kSub = 16;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = 2;
  static constexpr bool kWide = false;
  static constexpr int kPeriod = 8;
  static constexpr bool kFused = true;
  static constexpr int kMain = 24 * kVector + 12 * kRows;  // bytes without d
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    const std::uint8_t* s = r.fields() + 24 * kVector;
    for_lanes([&](int row) __attribute__((always_inline)) {
      const F d = load_f16(r.last_field(kMain) + 2 * row);
      const std::uint8_t* words = s + 4 * row;
      const LaneWords low[2] = {load_words(words), load_words(words + kVector)};
      const LaneWords high = load_words(words + 2 * kVector);
      for (int j = 0; j < 16; ++j) {
        const LaneWords code = (low[j / 4 % 2] >> (8 * (j % 4) + 4 * (j / 8)) & 15U) |
                               (high >> (8 * (j % 4) + 2 * (j / 4)) & 3U) << 4;
        store_f(scale[j] + row, mul(d, sub(to_float(code), set_f(32.0F))));
      }
    });
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int, int lane, V* w) {
    const std::uint8_t* high = r.fields() + lane;
    const std::uint8_t* low = high + 8 * kVector + S / 4 * kStep;
    for (int i = 0; i < 8; ++i) {
      w[i] = bit_or(bits<2 * (S % 4), 0, 3>(load(low + i * kVector)),
                    bits<S, 2, 1>(load(high + i * kVector)));
    }
  }
};

struct q4_k {
  static constexpr QuantType kType = QuantType::Q4_K;
  static constexpr int kSub = 32;
  static constexpr bool kAdd = true;
  static constexpr int kOffset = kNoOffset;
  static constexpr bool kWide = false;
  static constexpr int kPeriod = 2;
  static constexpr bool kFused = true;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales add) {
    six_bit_scales(r.p + 32 * kVector, scale, add);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    for (int i = 0; i < 8; ++i) {
      w[i] = bits<4 * S, 0, 15>(load(r.p + base * kNibbleStep + i * kVector + lane));
    }
  }
};

struct q5_k {
  static constexpr QuantType kType = QuantType::Q5_K;
  static constexpr int kSub = 32;
  static constexpr bool kAdd = true;
  static constexpr int kOffset = kNoOffset;
  static constexpr bool kWide = false;
  static constexpr int kPeriod = 8;
  static constexpr bool kFused = true;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales add) {
    six_bit_scales(r.p + 40 * kVector, scale, add);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int, int lane, V* w) {
    const std::uint8_t* low = r.p + S / 2 * kStep + lane;
    const std::uint8_t* high = r.p + 32 * kVector + lane;
    for (int i = 0; i < 8; ++i) {
      w[i] = bit_or(bits<4 * (S % 2), 0, 15>(load(low + i * kVector)),
                    bits<S, 4, 1>(load(high + i * kVector)));
    }
  }
};

struct q6_k {
  static constexpr QuantType kType = QuantType::Q6_K;
  static constexpr int kSub = 16;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = 5;
  static constexpr bool kWide = false;
  static constexpr int kPeriod = 4;
  static constexpr bool kFused = true;
  static constexpr int kMain = 48 * kVector + 16 * kRows;  // bytes without d
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    scaled_i8(r.last_field(kMain), r.fields() + 48 * kVector, 16, scale);
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    const std::uint8_t* p = r.fields() + lane;
    const std::uint8_t* low = p + base / 4 * 16 * kVector + S % 2 * kStep;
    const std::uint8_t* high = p + 32 * kVector + base / 4 * kStep;
    for (int i = 0; i < 8; ++i) {
      w[i] = bit_or(bits<4 * (S / 2), 0, 15>(load(low + i * kVector)),
                    bits<2 * S, 4, 3>(load(high + i * kVector)));
    }
  }
};

struct iq4_xs {
  static constexpr QuantType kType = QuantType::IQ4_XS;
  static constexpr int kSub = 32;
  static constexpr bool kAdd = false;
  static constexpr int kOffset = kByteOffset;
  static constexpr bool kWide = true;
  static constexpr int kPeriod = 1;
  static constexpr bool kFused = true;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    const std::uint8_t* low = r.p + 32 * kVector;
    for_lanes([&](int row) __attribute__((always_inline)) {
      const LaneWords codes = load_words(low + 4 * row);
      const LaneWords upper = load_halves(low + kVector + 2 * row);
      const F d = load_f16(low + kVector + 32 + 2 * row);
      for (int j = 0; j < 8; ++j) {
        const LaneWords code = (codes >> (4 * j) & 15U) | (upper >> (2 * j) & 3U) << 4;
        store_f(scale[j] + row, mul(d, sub(to_float(code), set_f(32.0F))));
      }
    });
  }
  template <int S>
  static MOESAIC_ALWAYS_INLINE void weights(const Record& r, int base, int lane, V* w) {
    code_book(r.p + base * kNibbleStep + lane, kIq4Table, w);
  }
};

}  // namespace
}  // namespace moesaic::cpu

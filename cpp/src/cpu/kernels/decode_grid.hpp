#pragma once

/// Decoders of IQ1, IQ2 and IQ3. A code names a point of a grid, that is the values of 8 (or, for
/// IQ3, 4) neighbouring columns of a row; the values are then negated by sign bits (IQ2, IQ3) or
/// shifted by +- 1/8 (IQ1).
///
///   a step of a row    [ run 0 ][ run 1 ][ run 2 ][ run 3 ]   4 runs of 8 columns
///                          |  code -> grid[code] = 8 bytes    (IQ3: two codes of 4 bytes)
///                          v
///   a vector of w      rows x 4 columns: points of kLanes rows, transposed
///
/// Codes, signs and scales of 16 rows are unpacked as vectors of words. Only the points themselves
/// are loaded row by row, from a table that stays in the first cache: some 130 ns per record, 215
/// for IQ3, where Q4_K unpacks in 25 (AVX-512 on Zen 5; kernels/README.md). That is more than the
/// products of a few tokens cost, so a record is always decoded whole and shared.

#include "cpu/kernels/decode_block32.hpp"
#include "cpu/kernels/lane_words.hpp"
#include "quant/iq_grids.hpp"

namespace moesaic::cpu {
namespace {

/// What the grid formats share. The decoder D of a format adds
///   kGrid                          the points, of 8 or 4 columns
///   codes(record, step, lane, c)   gives the codes of a step, 4 or 8 for each row
///   finish(record, step, lane, w)  applies signs or shifts to the 8 vectors of a step
template <class D>
struct GridDecoder {
  static constexpr bool kAdd = false;
  static constexpr bool kWide = false;
  static constexpr bool kFused = false;
  /// Loading a point needs its code in an ordinary register. Codes get there through memory, all of
  /// a record before the first is used: taking lanes out of a vector register one by one, or
  /// reading a store back at once, costs more than loading the points.
  static MOESAIC_ALWAYS_INLINE void decode(const Record& r, int lane, std::uint8_t* q) {
    constexpr int kPoints = 32 / static_cast<int>(sizeof D::kGrid[0]);
    const auto* points = reinterpret_cast<const std::uint8_t*>(&D::kGrid);
    alignas(64) std::uint32_t rows[8][kPoints][kLanes];
    for (int step = 0; step < 8; ++step) {
      LaneWords codes[kPoints];
      D::codes(r, step, lane, codes);
      std::memcpy(rows[step], codes, sizeof codes);
    }
    asm("" : "+m"(rows));  // keeps the compiler from turning the stores back into lane extractions
    for (int step = 0; step < 8; ++step, q += kStep) {
      V w[8];
      unroll<kPoints>([&](auto n) __attribute__((always_inline)) {
        if constexpr (kPoints == 4) {
          pick8(points, rows[step][n.value], w[2 * n.value], w[2 * n.value + 1]);
        } else {
          w[n.value] = pick4(points, rows[step][n.value]);
        }
      });
      D::finish(r, step, lane, w);
      for (int k = 0; k < 8; ++k) store(q + k * kVector, w[k]);
    }
  }
};

/// Negates the columns of a step whose bit in `signs` is set, then adds 2^kOffset.
template <int kOffset>
MOESAIC_ALWAYS_INLINE void apply_signs(LaneWords signs, V* w) {
  unroll<8>([&](auto k4) __attribute__((always_inline)) {
    const V v = negate_where<decltype(k4)::value>(w[k4.value], to_vector(signs));
    w[k4.value] = from_bytes(to_bytes(v) + static_cast<std::uint8_t>(1 << kOffset));
  });
}

/// Completes 7 signs in each byte: the eighth makes the number of minus signs even. The first shift
/// lets bits of the next byte into the upper half of a byte; only bit 0 of the parity is used,
/// which they do not reach.
MOESAIC_ALWAYS_INLINE LaneWords even_signs(LaneWords seven) {
  LaneWords parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return seven | (parity & 0x01010101U) << 7;
}
/// The signs of a word that holds four times 7 of them from bit 0 on.
MOESAIC_ALWAYS_INLINE LaneWords packed_signs(LaneWords w) {
  return even_signs((w & 0x7fU) | (w << 1 & 0x7f00U) | (w << 2 & 0x7f0000U) |
                    (w << 3 & 0x7f000000U));
}

/// d * factor * (0.5 + code)
MOESAIC_ALWAYS_INLINE F half_step(const std::uint8_t* d, float factor, LaneWords code) {
  return mul(mul(load_f16(d), set_f(factor)), add(set_f(0.5F), to_float(code)));
}

/// Writes scales of 32 columns from the upper 4 bits of every `stride`-th word.
MOESAIC_ALWAYS_INLINE void word_scales(const std::uint8_t* words, int stride, const std::uint8_t* d,
                                       float factor, Scales scale) {
  for_lanes([&](int row) __attribute__((always_inline)) {
    for (int g = 0; g < 8; ++g) {
      const LaneWords word = load_words(words + g * stride * kVector + 4 * row);
      store_f(scale[g] + row, half_step(d + 2 * row, factor, word >> 28));
    }
  });
}

/// Writes scales of 16 columns from the 16 nibbles of 8 bytes per row.
MOESAIC_ALWAYS_INLINE void nibble_scales(const std::uint8_t* codes, const std::uint8_t* d,
                                         Scales scale) {
  for_lanes([&](int row) __attribute__((always_inline)) {
    for (int sub = 0; sub < 16; ++sub) {
      const LaneWords word = load_words(codes + sub / 8 * kVector + 4 * row);
      store_f(scale[sub] + row, half_step(d + 2 * row, 0.25F, word >> (4 * (sub % 8)) & 15U));
    }
  });
}

/// IQ2_XXS keeps per 32 columns 4 codes of 8 bits, then a word of four times 7 signs and a 4-bit
/// scale.
struct iq2_xxs : GridDecoder<iq2_xxs> {
  static constexpr const auto& kGrid = quant::kGridIq2xxs;
  static constexpr QuantType kType = QuantType::IQ2_XXS;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 6;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    word_scales(r.fields() + kVector, 2, r.last_field(16 * kVector), 0.25F, scale);
  }
  static MOESAIC_ALWAYS_INLINE void codes(const Record& r, int step, int lane, LaneWords* c) {
    const LaneWords four = load_words(r.fields() + 2 * step * kVector + lane);
    for (int l = 0; l < 4; ++l) c[l] = four >> (8 * l) & 255U;
  }
  static MOESAIC_ALWAYS_INLINE void finish(const Record& r, int step, int lane, V* w) {
    const LaneWords word = load_words(r.fields() + (2 * step + 1) * kVector + lane);
    apply_signs<kOffset>(packed_signs(word), w);
  }
};

/// IQ2_XS keeps per 8 columns 16 bits: 9 of code, then 7 signs.
struct iq2_xs : GridDecoder<iq2_xs> {
  static constexpr const auto& kGrid = quant::kGridIq2xs;
  static constexpr QuantType kType = QuantType::IQ2_XS;
  static constexpr int kSub = 16;
  static constexpr int kOffset = 6;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    nibble_scales(r.fields() + 16 * kVector, r.last_field(18 * kVector), scale);
  }
  static MOESAIC_ALWAYS_INLINE void codes(const Record& r, int step, int lane, LaneWords* c) {
    const std::uint8_t* p = r.fields() + 2 * step * kVector + lane;
    for (int l = 0; l < 4; ++l) c[l] = load_words(p + l / 2 * kVector) >> (16 * (l % 2)) & 511U;
  }
  static MOESAIC_ALWAYS_INLINE void finish(const Record& r, int step, int lane, V* w) {
    const std::uint8_t* p = r.fields() + 2 * step * kVector + lane;
    const LaneWords first = load_words(p);
    const LaneWords second = load_words(p + kVector);
    apply_signs<kOffset>(even_signs((first >> 9 & 0x7fU) | (first >> 17 & 0x7f00U) |
                                    (second << 7 & 0x7f0000U) | (second >> 1 & 0x7f000000U)),
                         w);
  }
};

/// IQ2_S keeps codes of 8 bits with 2 more bits in a field of their own, and all 8 signs.
struct iq2_s : GridDecoder<iq2_s> {
  static constexpr const auto& kGrid = quant::kGridIq2s;
  static constexpr QuantType kType = QuantType::IQ2_S;
  static constexpr int kSub = 16;
  static constexpr int kOffset = 6;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    nibble_scales(r.fields() + 18 * kVector, r.last_field(20 * kVector), scale);
  }
  static MOESAIC_ALWAYS_INLINE void codes(const Record& r, int step, int lane, LaneWords* c) {
    const std::uint8_t* p = r.fields() + lane;
    const LaneWords low = load_words(p + step * kVector);
    const LaneWords high = load_words(p + (16 + step / 4) * kVector) >> (8 * (step % 4));
    for (int l = 0; l < 4; ++l) c[l] = (low >> (8 * l) & 255U) | (high >> (2 * l) & 3U) << 8;
  }
  static MOESAIC_ALWAYS_INLINE void finish(const Record& r, int step, int lane, V* w) {
    apply_signs<kOffset>(load_words(r.fields() + (8 + step) * kVector + lane), w);
  }
};

/// IQ3_XXS keeps per 32 columns 8 codes, each of 4 columns, and in another field a word of four
/// times 7 signs and a 4-bit scale.
struct iq3_xxs : GridDecoder<iq3_xxs> {
  static constexpr const auto& kGrid = quant::kGridIq3xxs;
  static constexpr QuantType kType = QuantType::IQ3_XXS;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 6;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    word_scales(r.fields() + 16 * kVector, 1, r.last_field(24 * kVector), 0.5F, scale);
  }
  static MOESAIC_ALWAYS_INLINE void codes(const Record& r, int step, int lane, LaneWords* c) {
    const std::uint8_t* p = r.fields() + 2 * step * kVector + lane;
    for (int n = 0; n < 8; ++n) c[n] = load_words(p + n / 4 * kVector) >> (8 * (n % 4)) & 255U;
  }
  static MOESAIC_ALWAYS_INLINE void finish(const Record& r, int step, int lane, V* w) {
    const LaneWords word = load_words(r.fields() + (16 + step) * kVector + lane);
    apply_signs<kOffset>(packed_signs(word), w);
  }
};

/// IQ3_S keeps codes of 8 bits with a ninth bit in a field of its own, and all 8 signs.
struct iq3_s : GridDecoder<iq3_s> {
  static constexpr const auto& kGrid = quant::kGridIq3s;
  static constexpr QuantType kType = QuantType::IQ3_S;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 4;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    for_lanes([&](int row) __attribute__((always_inline)) {
      const LaneWords codes = load_words(r.fields() + 26 * kVector + 4 * row);
      const F d = load_f16(r.last_field(27 * kVector) + 2 * row);
      for (int g = 0; g < 8; ++g) {
        store_f(scale[g] + row, mul(d, to_float(1U + 2U * (codes >> (4 * g) & 15U))));
      }
    });
  }
  static MOESAIC_ALWAYS_INLINE void codes(const Record& r, int step, int lane, LaneWords* c) {
    const std::uint8_t* p = r.fields() + lane;
    const LaneWords ninth = load_words(p + (16 + step / 4) * kVector) >> (8 * (step % 4));
    for (int n = 0; n < 8; ++n) {
      const LaneWords low = load_words(p + (2 * step + n / 4) * kVector) >> (8 * (n % 4)) & 255U;
      c[n] = low | (ninth >> n & 1U) << 8;
    }
  }
  static MOESAIC_ALWAYS_INLINE void finish(const Record& r, int step, int lane, V* w) {
    apply_signs<kOffset>(load_words(r.fields() + (18 + step) * kVector + lane), w);
  }
};

/// Turns the levels -1, 0, 1 of 8 columns into 8 * (level + shift) + 16, which are small unsigned
/// integers. The shift of a row is -1/8 where `down` is 1 and +1/8 where it is 0.
MOESAIC_ALWAYS_INLINE void shift_run(LaneWords down, V* w) {
  const LaneWords shift = 9 * 0x01010101U - down * 0x02020202U;  // bytes of 9 or 7
  for (int i = 0; i < 2; ++i) {
    const LaneWords level = __builtin_bit_cast(LaneWords, w[i]);
    const LaneWords biased = ((level & 0x03030303U) + 0x01010101U) & 0x03030303U;  // 0, 1, 2
    w[i] = to_vector((biased << 3) + shift);
  }
}

/// IQ1_S keeps codes of 8 bits and per 32 columns 16 bits: four times 3 more bits of code, then a
/// 3-bit scale and the sign of the shift.
struct iq1_s : GridDecoder<iq1_s> {
  static constexpr const auto& kGrid = quant::kGridIq1;
  static constexpr QuantType kType = QuantType::IQ1_S;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 4;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    for_lanes([&](int row) __attribute__((always_inline)) {
      const F d = mul(load_f16(r.last_field(12 * kVector) + 2 * row), set_f(0.125F));
      for (int g = 0; g < 8; ++g) {
        const LaneWords high = load_words(r.fields() + (8 + g / 2) * kVector + 4 * row);
        const LaneWords code = high >> (16 * (g % 2) + 12) & 7U;
        store_f(scale[g] + row, mul(d, to_float(2U * code + 1U)));
      }
    });
  }
  static MOESAIC_ALWAYS_INLINE LaneWords high_bits(const Record& r, int step, int lane) {
    const std::uint8_t* p = r.fields() + lane;
    return load_words(p + (8 + step / 2) * kVector) >> (16 * (step % 2));
  }
  static MOESAIC_ALWAYS_INLINE void codes(const Record& r, int step, int lane, LaneWords* c) {
    const LaneWords low = load_words(r.fields() + step * kVector + lane);
    const LaneWords high = high_bits(r, step, lane);
    for (int l = 0; l < 4; ++l) c[l] = (low >> (8 * l) & 255U) | (high >> (3 * l) & 7U) << 8;
  }
  static MOESAIC_ALWAYS_INLINE void finish(const Record& r, int step, int lane, V* w) {
    const LaneWords down = high_bits(r, step, lane) >> 15 & 1U;
    for (int l = 0; l < 4; ++l) shift_run(down, w + 2 * l);
  }
};

/// IQ1_M keeps codes of 8 bits, a nibble per code with 3 more bits and the sign of the shift, and
/// the block's f16 d spread over the upper nibbles of its four 16-bit words of scales.
struct iq1_m : GridDecoder<iq1_m> {
  static constexpr const auto& kGrid = quant::kGridIq1;
  static constexpr QuantType kType = QuantType::IQ1_M;
  static constexpr int kSub = 16;
  static constexpr int kOffset = 4;
  static MOESAIC_ALWAYS_INLINE void scales(const Record& r, Scales scale, Scales) {
    for_lanes([&](int row) __attribute__((always_inline)) {
      const std::uint8_t* p = r.p + 12 * kVector + 4 * row;
      const LaneWords word[2] = {load_words(p), load_words(p + kVector)};
      const LaneWords d_bits = (word[0] >> 12 & 15U) | (word[0] >> 28) << 4 |
                               (word[1] >> 12 & 15U) << 8 | (word[1] >> 28) << 12;
      alignas(64) std::uint16_t d_rows[kLanes];
      for (int i = 0; i < kLanes; ++i) d_rows[i] = static_cast<std::uint16_t>(d_bits[i]);
      const F d = mul(load_f16(reinterpret_cast<const std::uint8_t*>(d_rows)), set_f(0.125F));
      for (int sub = 0; sub < 16; ++sub) {
        const LaneWords code = word[sub / 8] >> (16 * (sub / 4 % 2) + 3 * (sub % 4)) & 7U;
        store_f(scale[sub] + row, mul(d, to_float(2U * code + 1U)));
      }
    });
  }
  static MOESAIC_ALWAYS_INLINE LaneWords nibbles_of(const Record& r, int step, int lane) {
    return load_words(r.p + (8 + step / 2) * kVector + lane) >> (16 * (step % 2));
  }
  static MOESAIC_ALWAYS_INLINE void codes(const Record& r, int step, int lane, LaneWords* c) {
    const LaneWords low = load_words(r.p + step * kVector + lane);
    const LaneWords high = nibbles_of(r, step, lane);
    for (int l = 0; l < 4; ++l) c[l] = (low >> (8 * l) & 255U) | (high >> (4 * l) & 7U) << 8;
  }
  static MOESAIC_ALWAYS_INLINE void finish(const Record& r, int step, int lane, V* w) {
    const LaneWords high = nibbles_of(r, step, lane);
    for (int l = 0; l < 4; ++l) shift_run(high >> (4 * l + 3) & 1U, w + 2 * l);
  }
};

}  // namespace
}  // namespace moesaic::cpu

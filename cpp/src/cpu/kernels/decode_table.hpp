#pragma once

/// Formats decoded row by row into a tile: the grids of IQ1 .. IQ3, ternary and one-bit types,
/// NVFP4. Their records keep the file's blocks: block b of row r at (16 b + r) * block bytes.

#include "core/quant/iq_grids.hpp"
#include "cpu/kernels/decode_block32.hpp"

namespace moesaic::cpu {
namespace {

constexpr std::uint64_t kOnes = 0x0101010101010101ULL;

/// Byte k is 255 where bit k of the index is set.
struct SignMasks {
  std::uint64_t mask[256];
};
constexpr SignMasks make_sign_masks() {
  SignMasks table{};
  for (int s = 0; s < 256; ++s) {
    for (int k = 0; k < 8; ++k) {
      if ((s >> k & 1) != 0) table.mask[s] |= std::uint64_t{255} << (8 * k);
    }
  }
  return table;
}
constexpr SignMasks kSignMasks = make_sign_masks();

/// The eighth sign makes the number of minus signs even.
inline std::uint32_t eight_signs(std::uint32_t seven) {
  std::uint32_t parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return seven | (parity & 1U) << 7;
}

inline std::uint32_t word16(const std::uint8_t* p) {
  return static_cast<std::uint32_t>(p[0] | p[1] << 8);
}
inline std::uint32_t word32(const std::uint8_t* p) {
  std::uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}
inline float half(std::uint32_t h) {
  alignas(64) std::uint8_t lanes[2 * kRows] = {};
  lanes[0] = static_cast<std::uint8_t>(h);
  lanes[1] = static_cast<std::uint8_t>(h >> 8);
  float out[kRows];
  store_f(out, load_f16(lanes));
  return out[0];
}

/// One row of a tile.
struct TileRow {
  Tile& tile;
  int row;
  /// 4 columns from 4 * k4 on.
  void put4(int k4, std::uint32_t four) const {
    std::memcpy(tile.q + k4 * kVector + 4 * row, &four, 4);
  }
  void put8(int run, std::uint64_t eight) const {
    put4(2 * run, static_cast<std::uint32_t>(eight));
    put4(2 * run + 1, static_cast<std::uint32_t>(eight >> 32));
  }
  void put(int column, int value) const {
    tile.q[column / 4 * kVector + 4 * row + column % 4] = static_cast<std::uint8_t>(value);
  }
  void scale(int sub, float value) const { tile.scale[sub][row] = value; }
};

/// offset + point, negated where the bit of `signs` is set; bytes cannot borrow from each other.
template <int kOffset>
inline std::uint64_t signed_point(std::uint64_t point, std::uint32_t signs) {
  constexpr std::uint64_t kBias = kOnes << kOffset;
  const std::uint64_t mask = kSignMasks.mask[signs & 255U];
  return ((kBias + point) & ~mask) | ((kBias - point) & mask);
}

inline std::uint64_t point8(const void* grid, std::uint32_t index) {
  std::uint64_t v;
  std::memcpy(&v, static_cast<const char*>(grid) + 8 * static_cast<std::size_t>(index), 8);
  return v;
}
inline std::uint64_t point4x2(const void* grid, std::uint32_t first, std::uint32_t second) {
  const auto* bytes = static_cast<const std::uint8_t*>(grid);
  return word32(bytes + 4 * static_cast<std::size_t>(first)) |
         static_cast<std::uint64_t>(word32(bytes + 4 * static_cast<std::size_t>(second))) << 32;
}

/// decode_row(block, block index, row of the tile) for each block of each row.
template <class D>
struct RowDecoder {
  static constexpr bool kTable = true;
  static constexpr bool kAdd = false;
  static constexpr bool kWide = false;
  static void decode(const Record& r, Tile& tile) {
    constexpr const PanelFormat& format = *find_panel_format(D::kType);
    const int blocks = r.steps * 32 / format.block_elems;
    for (int b = 0; b < blocks; ++b) {
      for (int row = 0; row < kRows; ++row) {
        D::decode_row(r.p + (16 * b + row) * format.block_bytes, b, TileRow{tile, row});
      }
    }
  }
};

struct iq2_xxs : RowDecoder<iq2_xxs> {
  static constexpr QuantType kType = QuantType::IQ2_XXS;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 6;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b)) * 0.25F;
    for (int g = 0; g < 8; ++g) {
      const std::uint8_t* index = b + 2 + 8 * g;
      const std::uint32_t word = word32(index + 4);
      out.scale(g, d * (0.5F + static_cast<float>(word >> 28)));
      for (int l = 0; l < 4; ++l) {
        out.put8(4 * g + l, signed_point<kOffset>(point8(&quant::kGridIq2xxs, index[l]),
                                                  eight_signs(word >> (7 * l) & 127U)));
      }
    }
  }
};

struct iq2_xs : RowDecoder<iq2_xs> {
  static constexpr QuantType kType = QuantType::IQ2_XS;
  static constexpr int kSub = 16;
  static constexpr int kOffset = 6;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b)) * 0.25F;
    for (int j = 0; j < 16; ++j) {
      out.scale(j, d * (0.5F + static_cast<float>(b[66 + j / 2] >> (4 * (j % 2)) & 15)));
    }
    for (int run = 0; run < 32; ++run) {
      const std::uint32_t code = word16(b + 2 + 2 * run);
      out.put8(run, signed_point<kOffset>(point8(&quant::kGridIq2xs, code & 511U),
                                          eight_signs(code >> 9)));
    }
  }
};

struct iq2_s : RowDecoder<iq2_s> {
  static constexpr QuantType kType = QuantType::IQ2_S;
  static constexpr int kSub = 16;
  static constexpr int kOffset = 6;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b)) * 0.25F;
    for (int j = 0; j < 16; ++j) {
      out.scale(j, d * (0.5F + static_cast<float>(b[74 + j / 2] >> (4 * (j % 2)) & 15)));
    }
    for (int run = 0; run < 32; ++run) {
      const std::uint32_t index = b[2 + run] | (b[66 + run / 4] >> (2 * (run % 4)) & 3U) << 8;
      out.put8(run, signed_point<kOffset>(point8(&quant::kGridIq2s, index), b[34 + run]));
    }
  }
};

struct iq3_xxs : RowDecoder<iq3_xxs> {
  static constexpr QuantType kType = QuantType::IQ3_XXS;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 6;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b)) * 0.5F;
    for (int g = 0; g < 8; ++g) {
      const std::uint32_t word = word32(b + 66 + 4 * g);
      out.scale(g, d * (0.5F + static_cast<float>(word >> 28)));
      for (int l = 0; l < 4; ++l) {
        const std::uint8_t* index = b + 2 + 8 * g + 2 * l;
        out.put8(4 * g + l, signed_point<kOffset>(point4x2(&quant::kGridIq3xxs, index[0], index[1]),
                                                  eight_signs(word >> (7 * l) & 127U)));
      }
    }
  }
};

struct iq3_s : RowDecoder<iq3_s> {
  static constexpr QuantType kType = QuantType::IQ3_S;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 4;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b));
    for (int g = 0; g < 8; ++g) {
      out.scale(g, d * static_cast<float>(1 + 2 * (b[106 + g / 2] >> (4 * (g % 2)) & 15)));
      const std::uint32_t ninth = b[66 + g];
      for (int l = 0; l < 4; ++l) {
        const std::uint8_t* index = b + 2 + 8 * g + 2 * l;
        out.put8(4 * g + l, signed_point<kOffset>(
                                point4x2(&quant::kGridIq3s, index[0] | (ninth >> (2 * l) & 1U) << 8,
                                         index[1] | (ninth >> (2 * l + 1) & 1U) << 8),
                                b[74 + 4 * g + l]));
      }
    }
  }
};

/// 8 * (level + shift) + 16, where a level is -1, 0 or 1 and the shift +- 1/8.
inline std::uint64_t shifted_point(std::uint64_t point, bool down) {
  constexpr std::uint64_t kTwoBits = 3 * kOnes;
  const std::uint64_t biased = ((point & kTwoBits) + kOnes) & kTwoBits;  // levels 0, 1, 2
  return 8 * biased + kOnes * (down ? 7U : 9U);
}

struct iq1_s : RowDecoder<iq1_s> {
  static constexpr QuantType kType = QuantType::IQ1_S;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 4;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b)) * 0.125F;
    for (int g = 0; g < 8; ++g) {
      const std::uint32_t high = word16(b + 34 + 2 * g);
      out.scale(g, d * static_cast<float>(2 * (high >> 12 & 7U) + 1));
      for (int l = 0; l < 4; ++l) {
        const std::uint32_t index = b[2 + 4 * g + l] | (high >> (3 * l) & 7U) << 8;
        out.put8(4 * g + l, shifted_point(point8(&quant::kGridIq1, index), (high & 0x8000U) != 0));
      }
    }
  }
};

struct iq1_m : RowDecoder<iq1_m> {
  static constexpr QuantType kType = QuantType::IQ1_M;
  static constexpr int kSub = 16;
  static constexpr int kOffset = 4;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    std::uint32_t d_bits = 0;
    for (int n = 0; n < 4; ++n) d_bits |= (word16(b + 48 + 2 * n) >> 12U) << (4 * n);
    const float d = half(d_bits) * 0.125F;
    for (int j = 0; j < 16; ++j) {
      const std::uint32_t code = word16(b + 48 + 2 * (j / 4)) >> (3 * (j % 4)) & 7U;
      out.scale(j, d * static_cast<float>(2 * code + 1));
    }
    for (int run = 0; run < 32; ++run) {
      const std::uint32_t nibble = b[32 + run / 2] >> (4 * (run % 2)) & 15U;
      const std::uint32_t index = b[run] | (nibble & 7U) << 8;
      out.put8(run, shifted_point(point8(&quant::kGridIq1, index), (nibble & 8U) != 0));
    }
  }
};

struct tq1_0 : RowDecoder<tq1_0> {
  static constexpr QuantType kType = QuantType::TQ1_0;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 0;
  /// `count` bytes of `digits` ternary digits: digit n of byte i is column first + count * n + i.
  static void digits(const std::uint8_t* packed, int count, int digits, int first,
                     const TileRow& out) {
    int power = 1;
    for (int n = 0; n < digits; ++n, power *= 3) {
      for (int i = 0; i < count; ++i) {
        out.put(first + count * n + i, (packed[i] * power & 255) * 3 >> 8);
      }
    }
  }
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b + 52));
    for (int j = 0; j < 8; ++j) out.scale(j, d);
    digits(b, 32, 5, 0, out);
    digits(b + 32, 16, 5, 160, out);
    digits(b + 48, 4, 4, 240, out);
  }
};

struct tq2_0 : RowDecoder<tq2_0> {
  static constexpr QuantType kType = QuantType::TQ2_0;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 0;
  static void decode_row(const std::uint8_t* b, int, const TileRow& out) {
    const float d = half(word16(b + 64));
    for (int g = 0; g < 8; ++g) {
      out.scale(g, d);
      for (int k4 = 0; k4 < 8; ++k4) {
        out.put4(8 * g + k4, word32(b + 32 * (g / 4) + 4 * k4) >> (2 * (g % 4)) & 0x03030303U);
      }
    }
  }
};

struct q1_0 : RowDecoder<q1_0> {
  static constexpr QuantType kType = QuantType::Q1_0;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 0;
  static void decode_row(const std::uint8_t* b, int block, const TileRow& out) {
    const float d = half(word16(b));
    for (int j = 0; j < 4; ++j) out.scale(4 * block + j, d);
    for (int run = 0; run < 16; ++run) {
      out.put8(16 * block + run, kSignMasks.mask[b[2 + run]] & (kOnes << 1));
    }
  }
};

struct q2_0 : RowDecoder<q2_0> {
  static constexpr QuantType kType = QuantType::Q2_0;
  static constexpr int kSub = 32;
  static constexpr int kOffset = 0;
  static void decode_row(const std::uint8_t* b, int block, const TileRow& out) {
    const float d = half(word16(b));
    out.scale(2 * block, d);
    out.scale(2 * block + 1, d);
    for (int k4 = 0; k4 < 16; ++k4) {
      const std::uint32_t four = b[2 + k4];
      out.put4(16 * block + k4,
               (four & 3U) | (four & 12U) << 6 | (four & 48U) << 12 | (four & 192U) << 18);
    }
  }
};

struct nvfp4 : RowDecoder<nvfp4> {
  static constexpr QuantType kType = QuantType::NVFP4;
  static constexpr int kSub = 16;
  static constexpr int kOffset = kFp4Offset;
  /// Half an unsigned E4M3 scale (bias 7); the NaN code gives 0.
  static float half_scale(std::uint32_t code) {
    if (code == 0x7f) return 0.0F;
    const std::uint32_t exponent = code >> 3 & 15U;
    const std::uint32_t mantissa = code & 7U;
    if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-10F;
    const std::uint32_t word = (exponent + 127U - 8U) << 23 | mantissa << 20;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  static void decode_row(const std::uint8_t* b, int block, const TileRow& out) {
    for (int j = 0; j < 4; ++j) {
      out.scale(4 * block + j, half_scale(b[j]));
      for (int i = 0; i < 8; ++i) {
        const std::uint8_t pair = b[4 + 8 * j + i];
        out.put(64 * block + 16 * j + i, kFp4Table[pair & 15]);
        out.put(64 * block + 16 * j + 8 + i, kFp4Table[pair >> 4]);
      }
    }
  }
};

}  // namespace
}  // namespace moesaic::cpu

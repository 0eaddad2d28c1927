#include <bit>

#include "quant/block.hpp"
#include "quant/decode.hpp"
#include "quant/iq_grids.hpp"

namespace moesaic::quant {
namespace {

// All types hold 256 weights as 8 sub-blocks (`g`) of 32, each 4 runs (`l`) of 8 weights.

/// y[k] = scale * level k of the point, negated where bit k of `signs` is set.
template <std::size_t K>
inline void decode_point(const std::array<std::int8_t, K>& point, float scale, std::uint32_t signs,
                         float* y) {
  for (std::size_t k = 0; k < K; ++k) {
    const auto bits = std::bit_cast<std::uint32_t>(scale * static_cast<float>(point[k]));
    y[k] = std::bit_cast<float>(
        bits ^ (signs >> k & 1u) << 31);  // signs are random, so a branch would be mispredicted
  }
}

/// y[k] = scale * (level k of the point + shift)
inline void decode_shifted(const std::array<std::int8_t, 8>& point, float scale, float shift,
                           float* y) {
  for (std::size_t k = 0; k < 8; ++k) y[k] = scale * (static_cast<float>(point[k]) + shift);
}

inline float iq2_scale(float d, std::uint32_t code) {
  return d * (0.5f + static_cast<float>(code)) * 0.25f;
}

constexpr float kIq1Shift = 0.125f;

}  // namespace

// f16 d@0, per sub-block 8 bytes@2: u8 index[4], u32 with four times 7 signs and a 4-bit scale on
// top
void decode_iq2_xxs(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 66>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int g = 0; g < 8; ++g) {
      const std::uint8_t* index = b + 2 + 8 * g;
      const std::uint32_t word = load_u32(index + 4);
      const float scale = iq2_scale(d, word >> 28);
      for (int l = 0; l < 4; ++l) {
        decode_point(kGridIq2xxs[index[l]], scale, full_signs(word >> (7 * l) & 127u),
                     y + 32 * g + 8 * l);
      }
    }
  });
}

// f16 d@0, u16 codes[32]@2 (9 bits index, 7 signs), u8 scales[8]@66, a nibble for two runs
void decode_iq2_xs(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 74>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int run = 0; run < 32; ++run) {
      const std::uint32_t code = load_u16(b + 2 + 2 * run);
      const float scale = iq2_scale(d, b[66 + run / 4] >> (4 * (run % 4 / 2)) & 15u);
      decode_point(kGridIq2xs[code & 511u], scale, full_signs(code >> 9), y + 8 * run);
    }
  });
}

// f16 d@0, u8 index[32]@2, u8 signs[32]@34, u8 high index pairs[8]@66, u8 scales[8]@74
void decode_iq2_s(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 82>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int run = 0; run < 32; ++run) {
      const int g = run / 4;
      const int l = run % 4;
      const std::uint32_t index = b[2 + run] | (b[66 + g] >> (2 * l) & 3u) << 8;
      const float scale = iq2_scale(d, b[74 + g] >> (4 * (l / 2)) & 15u);
      decode_point(kGridIq2s[index], scale, b[34 + run], y + 8 * run);
    }
  });
}

// f16 d@0, u8 index[64]@2, per sub-block a u32@66 with four times 7 signs and a 4-bit scale on top
void decode_iq3_xxs(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 98>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int g = 0; g < 8; ++g) {
      const std::uint32_t word = load_u32(b + 66 + 4 * g);
      const float scale = d * (0.5f + static_cast<float>(word >> 28)) * 0.5f;
      for (int l = 0; l < 4; ++l) {
        const std::uint8_t* index = b + 2 + 8 * g + 2 * l;
        const std::uint32_t signs = full_signs(word >> (7 * l) & 127u);
        decode_point(kGridIq3xxs[index[0]], scale, signs, y + 32 * g + 8 * l);
        decode_point(kGridIq3xxs[index[1]], scale, signs >> 4, y + 32 * g + 8 * l + 4);
      }
    }
  });
}

// f16 d@0, u8 index[64]@2, u8 ninth index bits[8]@66, u8 signs[32]@74, u8 scales[4]@106
void decode_iq3_s(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 110>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int g = 0; g < 8; ++g) {
      const int code = b[106 + g / 2] >> (4 * (g % 2)) & 15;
      const float scale = d * static_cast<float>(1 + 2 * code);
      for (int n = 0; n < 8; ++n) {  // points of 4
        const std::uint32_t index = b[2 + 8 * g + n] | (b[66 + g] >> n & 1u) << 8;
        const std::uint32_t signs = b[74 + 4 * g + n / 2] >> (4 * (n % 2)) & 15u;
        decode_point(kGridIq3s[index], scale, signs, y + 32 * g + 4 * n);
      }
    }
  });
}

// f16 d@0, u8 index[32]@2, per sub-block a u16@34: four times 3 high index bits, 3 bits scale, 1
// bit sign of the shift
void decode_iq1_s(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 50>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    for (int g = 0; g < 8; ++g) {
      const std::uint32_t high = load_u16(b + 34 + 2 * g);
      const float scale = d * static_cast<float>(2 * (high >> 12 & 7u) + 1);
      const float shift = (high & 0x8000u) != 0 ? -kIq1Shift : kIq1Shift;
      for (int l = 0; l < 4; ++l) {
        const std::uint32_t index = b[2 + 4 * g + l] | (high >> (3 * l) & 7u) << 8;
        decode_shifted(kGridIq1[index], scale, shift, y + 32 * g + 8 * l);
      }
    }
  });
}

// u8 index[32]@0, u8 nibbles[16]@32 (3 high index bits, 1 sign of the shift), u16 scales[4]@48:
// each four times 3 bits, and on top a nibble of the f16 d
void decode_iq1_m(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 56>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    std::uint32_t d_bits = 0;
    for (int n = 0; n < 4; ++n) d_bits |= (load_u16(b + 48 + 2 * n) >> 12u) << (4 * n);
    const float d = f16_to_f32(static_cast<std::uint16_t>(d_bits));
    for (int run = 0; run < 32; ++run) {
      const std::uint32_t nibble = b[32 + run / 2] >> (4 * (run % 2)) & 15u;
      const std::uint32_t index = b[run] | (nibble & 7u) << 8;
      const int code = load_u16(b + 48 + 2 * (run / 8)) >> (3 * (run % 8 / 2)) & 7;
      const float shift = (nibble & 8u) != 0 ? -kIq1Shift : kIq1Shift;
      decode_shifted(kGridIq1[index], d * static_cast<float>(2 * code + 1), shift, y + 8 * run);
    }
  });
}

}  // namespace moesaic::quant

#include "quant/block.hpp"
#include "quant/decode.hpp"
#include "quant/k_scales.hpp"

namespace moesaic::quant {

// u8 scales[16]@0 (low nibble scale, high nibble minimum), u8 codes[64]@16, f16 d@80, f16 dmin@82.
// A run of 32 bytes holds 128 weights: pair g of bits is weights 32g .. 32g+31.
void decode_q2_k(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 84>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b + 80);
    const float dmin = load_f16(b + 82);
    for (int j = 0; j < 16; ++j) {  // sub-blocks of 16
      const float scale = d * static_cast<float>(b[j] & 15);
      const float min = dmin * static_cast<float>(b[j] >> 4);
      const std::uint8_t* codes = b + 16 + 32 * (j / 8) + 16 * (j % 2);
      const int shift = 2 * (j % 8 / 2);
      for (int i = 0; i < 16; ++i) {
        y[16 * j + i] = scale * static_cast<float>(codes[i] >> shift & 3) - min;
      }
    }
  });
}

// u8 high bits[32]@0, u8 codes[64]@32, u8 scales[12]@96, f16 d@108. Low bits lie as in Q2_K; bit
// j/2 of a high byte belongs to sub-block j, and a clear bit means minus 4.
void decode_q3_k(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 110>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b + 108);
    std::int8_t scales[16];
    unpack_scale6(b + 96, scales);
    for (int j = 0; j < 16; ++j) {  // sub-blocks of 16
      const float scale = d * static_cast<float>(scales[j]);
      const std::uint8_t* high = b + 16 * (j % 2);
      const std::uint8_t* codes = b + 32 + 32 * (j / 8) + 16 * (j % 2);
      const int shift = 2 * (j % 8 / 2);
      for (int i = 0; i < 16; ++i) {
        const int q = (codes[i] >> shift & 3) - ((high[i] >> (j / 2) & 1) != 0 ? 0 : 4);
        y[16 * j + i] = scale * static_cast<float>(q);
      }
    }
  });
}

// f16 d@0, f16 dmin@2, u8 scales[12]@4, u8 codes[128]@16. A run of 32 bytes holds 64 weights: the
// low nibbles are the first 32, the high nibbles the last.
void decode_q4_k(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 144>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    const float dmin = load_f16(b + 2);
    const ScaleMin6 s = unpack_scale_min6(b + 4);
    for (int j = 0; j < 8; ++j) {  // sub-blocks of 32
      const float scale = d * static_cast<float>(s.scale[j]);
      const float min = dmin * static_cast<float>(s.min[j]);
      const std::uint8_t* codes = b + 16 + 32 * (j / 2);
      const int shift = 4 * (j % 2);
      for (int i = 0; i < 32; ++i) {
        y[32 * j + i] = scale * static_cast<float>(codes[i] >> shift & 15) - min;
      }
    }
  });
}

// f16 d@0, f16 dmin@2, u8 scales[12]@4, u8 high bits[32]@16, u8 codes[128]@48. As Q4_K; bit j of a
// high byte is the fifth bit in sub-block j.
void decode_q5_k(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 176>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    const float dmin = load_f16(b + 2);
    const ScaleMin6 s = unpack_scale_min6(b + 4);
    const std::uint8_t* high = b + 16;
    for (int j = 0; j < 8; ++j) {  // sub-blocks of 32
      const float scale = d * static_cast<float>(s.scale[j]);
      const float min = dmin * static_cast<float>(s.min[j]);
      const std::uint8_t* codes = b + 48 + 32 * (j / 2);
      const int shift = 4 * (j % 2);
      for (int i = 0; i < 32; ++i) {
        const int q = (codes[i] >> shift & 15) | (high[i] >> j & 1) << 4;
        y[32 * j + i] = scale * static_cast<float>(q) - min;
      }
    }
  });
}

// u8 low nibbles[128]@0, u8 high pairs[64]@128, i8 scales[16]@192, f16 d@208. A half of 128 weights
// takes 64 low bytes (quarters 0 and 1 in the low nibbles, 2 and 3 in the high) and 32 high bytes
// (pair g of bits is quarter g).
void decode_q6_k(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 210>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b + 208);
    for (int j = 0; j < 16; ++j) {  // sub-blocks of 16, two to a quarter
      const float scale = d * static_cast<float>(static_cast<std::int8_t>(b[192 + j]));
      const int half = j / 8;
      const int quarter = j % 8 / 2;
      const std::uint8_t* low = b + 64 * half + 32 * (quarter % 2) + 16 * (j % 2);
      const std::uint8_t* high = b + 128 + 32 * half + 16 * (j % 2);
      for (int i = 0; i < 16; ++i) {
        const int q = (low[i] >> (4 * (quarter / 2)) & 15) | (high[i] >> (2 * quarter) & 3) << 4;
        y[16 * j + i] = scale * static_cast<float>(q - 32);
      }
    }
  });
}

}  // namespace moesaic::quant

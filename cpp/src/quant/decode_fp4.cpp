#include "quant/block.hpp"
#include "quant/codebooks.hpp"
#include "quant/decode.hpp"

namespace moesaic::quant {
namespace {

/// Decodes 2 * kBytes weights: the low nibbles of the bytes are the first half, the high nibbles
/// the second.
template <int kBytes>
inline void decode_codes(const std::array<std::int8_t, 16>& levels, const std::uint8_t* codes,
                         float scale, float* y) {
  for (int i = 0; i < kBytes; ++i) {
    y[i] = scale * static_cast<float>(levels[codes[i] & 15]);
    y[i + kBytes] = scale * static_cast<float>(levels[codes[i] >> 4]);
  }
}

}  // namespace

// f16 d@0, u8 codes[16]@2
void decode_iq4_nl(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<32, 18>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    decode_codes<16>(kIq4Levels, b + 2, load_f16(b), y);
  });
}

// f16 d@0, u16 high scale pairs@2, u8 low scale nibbles[4]@4, u8 codes[128]@8
void decode_iq4_xs(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<256, 136>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    const float d = load_f16(b);
    const int high = load_u16(b + 2);
    for (int j = 0; j < 8; ++j) {  // sub-blocks of 32
      const int scale = (b[4 + j / 2] >> (4 * (j % 2)) & 15) | (high >> (2 * j) & 3) << 4;
      decode_codes<16>(kIq4Levels, b + 8 + 16 * j, d * static_cast<float>(scale - 32), y + 32 * j);
    }
  });
}

// E8M0 scale@0, u8 codes[16]@1
void decode_mxfp4(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<32, 17>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    decode_codes<16>(kE2m1Doubled, b + 1, half_e8m0(b[0]), y);
  });
}

// UE4M3 scales[4]@0, u8 codes[32]@4
void decode_nvfp4(const std::byte* blocks, float* out, std::int64_t elems) {
  for_each_block<64, 36>(blocks, out, elems, [](const std::uint8_t* b, float* y) {
    for (int j = 0; j < 4; ++j) {  // sub-blocks of 16
      decode_codes<8>(kE2m1Doubled, b + 4 + 8 * j, half_ue4m3(b[j]), y + 16 * j);
    }
  });
}

}  // namespace moesaic::quant

#include <algorithm>

#include "quant/block.hpp"
#include "quant/encode.hpp"
#include "quant/fit.hpp"
#include "quant/k_scales.hpp"

// Each sub-block is fitted alone; its scale (and minimum) is rounded to a small integer times the
// block's d (dmin); the codes are then chosen anew for what the decoder will see.

namespace moesaic::quant {
namespace {

constexpr int kBlock = 256;

/// A block of sub-blocks of kSub weights with codes 0..kMaxCode, scales and minima 0..kMaxScale.
template <int kSub, int kMaxCode, int kMaxScale>
struct AffineBlock {
  static constexpr int kSubs = kBlock / kSub;
  std::uint8_t scale[kSubs];
  std::uint8_t min[kSubs];
  std::uint8_t codes[kBlock];

  AffineBlock(const float* x, std::uint8_t* d_field, std::uint8_t* dmin_field) {
    Affine fits[kSubs];
    Affine top{0.0f, 0.0f};
    for (int j = 0; j < kSubs; ++j) {
      fits[j] = fit_affine(x + kSub * j, kSub, kMaxCode);
      top = {std::max(top.scale, fits[j].scale), std::max(top.min, fits[j].min)};
    }
    const float d = store_scale(d_field, top.scale / kMaxScale);
    const float dmin = store_scale(dmin_field, top.min / kMaxScale);
    for (int j = 0; j < kSubs; ++j) {
      scale[j] = static_cast<std::uint8_t>(nearest_int(ratio(fits[j].scale, d), 0, kMaxScale));
      min[j] = static_cast<std::uint8_t>(nearest_int(ratio(fits[j].min, dmin), 0, kMaxScale));
      const float step = d * static_cast<float>(scale[j]);
      const float offset = dmin * static_cast<float>(min[j]);
      for (int i = kSub * j; i < kSub * (j + 1); ++i) {
        codes[i] = static_cast<std::uint8_t>(nearest_int(ratio(x[i] + offset, step), 0, kMaxCode));
      }
    }
  }
};

/// A block of 16 sub-blocks of 16 weights with codes -kHalf..kHalf-1, scales
/// -kHalfScale..kHalfScale-1.
template <int kHalf, int kHalfScale>
struct SymmetricBlock {
  std::int8_t scale[16];
  std::int8_t codes[kBlock];

  SymmetricBlock(const float* x, std::uint8_t* d_field) {
    float fits[16];
    for (int j = 0; j < 16; ++j) {
      fits[j] = fit_scale(x + 16 * j, 16, static_cast<float>(-kHalf), [](float v) {
        return static_cast<float>(nearest_int(v, -kHalf, kHalf - 1));
      });
    }
    const float d = store_scale(d_field, extreme(fits, 16) / static_cast<float>(-kHalfScale));
    for (int j = 0; j < 16; ++j) {
      scale[j] =
          static_cast<std::int8_t>(nearest_int(ratio(fits[j], d), -kHalfScale, kHalfScale - 1));
      const float step = d * static_cast<float>(scale[j]);
      for (int i = 16 * j; i < 16 * (j + 1); ++i) {
        codes[i] = static_cast<std::int8_t>(nearest_int(ratio(x[i], step), -kHalf, kHalf - 1));
      }
    }
  }
};

/// Adds the bits of one weight to a byte that starts at zero.
inline void merge(std::uint8_t& byte, int bits, int shift) {
  byte = static_cast<std::uint8_t>(byte | bits << shift);
}

/// 2-bit codes: a run of 32 bytes holds 128 weights, pair g of bits 32g .. 32g+31.
inline void merge_pairs(std::uint8_t* bytes, int i, int code) {
  merge(bytes[32 * (i / 128) + i % 32], code, 2 * (i % 128 / 32));
}

/// 4-bit codes: a run of 32 bytes holds 64 weights, the first 32 in the low nibbles.
inline void merge_nibbles(std::uint8_t* bytes, int i, int code) {
  merge(bytes[32 * (i / 64) + i % 32], code, 4 * (i % 64 / 32));
}

}  // namespace

void encode_q2_k(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<256, 84>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    std::fill_n(b, 84, std::uint8_t{0});
    const AffineBlock<16, 3, 15> block(x, b + 80, b + 82);
    for (int j = 0; j < 16; ++j) {
      b[j] = static_cast<std::uint8_t>(block.scale[j] | block.min[j] << 4);
    }
    for (int i = 0; i < kBlock; ++i) merge_pairs(b + 16, i, block.codes[i]);
  });
}

void encode_q3_k(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<256, 110>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    std::fill_n(b, 110, std::uint8_t{0});
    const SymmetricBlock<4, 32> block(x, b + 108);
    pack_scale6(block.scale, b + 96);
    for (int i = 0; i < kBlock; ++i) {
      const int code = block.codes[i] + 4;
      merge_pairs(b + 32, i, code & 3);
      merge(b[i % 32], code >> 2, i / 32);
    }
  });
}

void encode_q4_k(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<256, 144>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    std::fill_n(b, 144, std::uint8_t{0});
    const AffineBlock<32, 15, 63> block(x, b, b + 2);
    pack_scale_min6(block.scale, block.min, b + 4);
    for (int i = 0; i < kBlock; ++i) merge_nibbles(b + 16, i, block.codes[i]);
  });
}

void encode_q5_k(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<256, 176>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    std::fill_n(b, 176, std::uint8_t{0});
    const AffineBlock<32, 31, 63> block(x, b, b + 2);
    pack_scale_min6(block.scale, block.min, b + 4);
    for (int i = 0; i < kBlock; ++i) {
      merge_nibbles(b + 48, i, block.codes[i] & 15);
      merge(b[16 + i % 32], block.codes[i] >> 4, i / 32);
    }
  });
}

void encode_q6_k(const float* values, std::byte* blocks, std::int64_t elems) {
  for_each_block<256, 210>(values, blocks, elems, [](const float* x, std::uint8_t* b) {
    std::fill_n(b, 210, std::uint8_t{0});
    const SymmetricBlock<32, 128> block(x, b + 208);
    for (int j = 0; j < 16; ++j) b[192 + j] = static_cast<std::uint8_t>(block.scale[j]);
    for (int i = 0; i < kBlock; ++i) {
      const int code = block.codes[i] + 32;
      const int quarter = i % 128 / 32;
      merge(b[64 * (i / 128) + 32 * (quarter % 2) + i % 32], code & 15, 4 * (quarter / 2));
      merge_pairs(b + 128, i, code >> 4);
    }
  });
}

}  // namespace moesaic::quant

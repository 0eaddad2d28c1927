#include <algorithm>

#include "quant/block.hpp"
#include "quant/encode.hpp"
#include "quant/k_scales.hpp"
#include "quant/scaled_block.hpp"

// The types with a minimum are `AffineBlock`s, the others `ScaledBlock`s; what is left here is
// where the bits go.

namespace moesaic::quant {
namespace {

constexpr Starts kStartsQ2{0.6f, 1.5f, 7};
constexpr Starts kStartsQ3{0.7f, 1.2f, 9};
constexpr Starts kStartsQ4{0.65f, 1.04f, 7};
constexpr Starts kStartsQ5{0.72f, 1.03f, 6};
constexpr Starts kStartsQ6{0.9f, 1.06f, 6};

/// A ScaledBlock of 16 sub-blocks of 16 weights with codes -kHalf .. kHalf - 1, and its codes.
template <int kHalf, int kHalfScale>
struct SymmetricBlock {
  std::int8_t scale[16];
  std::int8_t codes[kBlock];

  SymmetricBlock(const float* x, const float* w, const Starts& starts, std::uint8_t* d_field) {
    const ScaledBlock<IntegerLevels<-kHalf, kHalf - 1>, 16, kHalfScale> block(x, w, starts,
                                                                              d_field);
    for (int j = 0; j < 16; ++j) {
      scale[j] = static_cast<std::int8_t>(block.scale[j]);
      const float inv = inverse(block.d * static_cast<float>(block.scale[j]));
      for (int i = 16 * j; i < 16 * (j + 1); ++i) {
        codes[i] = static_cast<std::int8_t>(nearest_int(x[i] * inv, -kHalf, kHalf - 1));
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

void encode_q2_k(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<256, 84>(values, importance, blocks, elems,
                          [](const float* x, const float* importances, std::uint8_t* b) {
                            const Importance<256> w(importances);
                            std::fill_n(b, 84, std::uint8_t{0});
                            const AffineBlock<16, 3, 15> block(x, w.w, kStartsQ2, b + 80, b + 82);
                            for (int j = 0; j < 16; ++j) {
                              b[j] = static_cast<std::uint8_t>(block.scale[j] | block.min[j] << 4);
                            }
                            for (int i = 0; i < kBlock; ++i) merge_pairs(b + 16, i, block.codes[i]);
                          });
}

void encode_q3_k(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<256, 110>(values, importance, blocks, elems,
                           [](const float* x, const float* importances, std::uint8_t* b) {
                             const Importance<256> w(importances);
                             std::fill_n(b, 110, std::uint8_t{0});
                             const SymmetricBlock<4, 32> block(x, w.w, kStartsQ3, b + 108);
                             pack_scale6(block.scale, b + 96);
                             for (int i = 0; i < kBlock; ++i) {
                               const int code = block.codes[i] + 4;
                               merge_pairs(b + 32, i, code & 3);
                               merge(b[i % 32], code >> 2, i / 32);
                             }
                           });
}

void encode_q4_k(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<256, 144>(values, importance, blocks, elems,
                           [](const float* x, const float* importances, std::uint8_t* b) {
                             const Importance<256> w(importances);
                             std::fill_n(b, 144, std::uint8_t{0});
                             const AffineBlock<32, 15, 63> block(x, w.w, kStartsQ4, b, b + 2);
                             pack_scale_min6(block.scale, block.min, b + 4);
                             for (int i = 0; i < kBlock; ++i)
                               merge_nibbles(b + 16, i, block.codes[i]);
                           });
}

void encode_q5_k(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<256, 176>(values, importance, blocks, elems,
                           [](const float* x, const float* importances, std::uint8_t* b) {
                             const Importance<256> w(importances);
                             std::fill_n(b, 176, std::uint8_t{0});
                             const AffineBlock<32, 31, 63> block(x, w.w, kStartsQ5, b, b + 2);
                             pack_scale_min6(block.scale, block.min, b + 4);
                             for (int i = 0; i < kBlock; ++i) {
                               merge_nibbles(b + 48, i, block.codes[i] & 15);
                               merge(b[16 + i % 32], block.codes[i] >> 4, i / 32);
                             }
                           });
}

void encode_q6_k(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<256, 210>(values, importance, blocks, elems,
                           [](const float* x, const float* importances, std::uint8_t* b) {
                             const Importance<256> w(importances);
                             std::fill_n(b, 210, std::uint8_t{0});
                             const SymmetricBlock<32, 128> block(x, w.w, kStartsQ6, b + 208);
                             for (int j = 0; j < 16; ++j)
                               b[192 + j] = static_cast<std::uint8_t>(block.scale[j]);
                             for (int i = 0; i < kBlock; ++i) {
                               const int code = block.codes[i] + 32;
                               const int quarter = i % 128 / 32;
                               merge(b[64 * (i / 128) + 32 * (quarter % 2) + i % 32], code & 15,
                                     4 * (quarter / 2));
                               merge_pairs(b + 128, i, code >> 4);
                             }
                           });
}

}  // namespace moesaic::quant

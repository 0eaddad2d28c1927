#include <cmath>

#include "quant/block.hpp"
#include "quant/encode.hpp"
#include "quant/search.hpp"

// One scale, perhaps a minimum, per 32 weights. Both are searched, stored as f16, and the codes are
// the nearest ones for what the decoder will see. Q8_0 alone has so many codes that a search finds
// nothing; it writes the bytes that ggml writes.

namespace moesaic::quant {
namespace {

constexpr int kElems = 32;
constexpr Starts kSymmetricStarts{0.8f, 1.15f, 8};
constexpr Starts kAffineStarts{0.6f, 1.04f, 7};

inline void pack4(const unsigned* codes, std::uint8_t* nibbles) {
  for (int i = 0; i < 16; ++i) {
    nibbles[i] = static_cast<std::uint8_t>((codes[i] & 15u) | (codes[i + 16] & 15u) << 4);
  }
}

inline void pack5(const unsigned* codes, std::uint8_t* high_bits, std::uint8_t* nibbles) {
  std::uint32_t high = 0;
  for (int i = 0; i < kElems; ++i) high |= (codes[i] >> 4) << i;
  store_u16(high_bits, static_cast<std::uint16_t>(high));
  store_u16(high_bits + 2, static_cast<std::uint16_t>(high >> 16));
  pack4(codes, nibbles);
}

/// Codes 0 .. 2 * kHalf - 1 mean -kHalf .. kHalf - 1 times the scale.
template <int kHalf>
inline void symmetric_codes(const float* x, const float* importance, std::uint8_t* d,
                            unsigned* codes) {
  const Importance<kElems> w(importance);
  using Levels = IntegerLevels<-kHalf, kHalf - 1>;
  const float inv =
      inverse(store_scale(d, fit_scale<Levels, kElems>(x, w.w, kSymmetricStarts).scale));
  for (int i = 0; i < kElems; ++i) {
    codes[i] = static_cast<unsigned>(nearest_int(x[i] * inv, -kHalf, kHalf - 1) + kHalf);
  }
}

/// Codes 0 .. kMax times the scale above the minimum.
template <int kMax>
inline void affine_codes(const float* x, const float* importance, std::uint8_t* d, std::uint8_t* m,
                         unsigned* codes) {
  const Importance<kElems> w(importance);
  // Sums of squares of values around zero keep their digits where all values are nearly alike.
  const float middle = 0.5f * x[0] + 0.5f * x[kElems - 1];
  float centred[kElems];
  for (int i = 0; i < kElems; ++i) centred[i] = x[i] - middle;
  const AffineFit fit = fit_affine<kMax, kElems>(centred, w.w, false, kAffineStarts);
  const float inv = inverse(store_scale(d, fit.scale));
  const float low = store_scale(m, fit.offset + middle);
  for (int i = 0; i < kElems; ++i) {
    codes[i] = static_cast<unsigned>(nearest_int((x[i] - low) * inv, 0, kMax));
  }
}

}  // namespace

void encode_q4_0(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<32, 18>(values, importance, blocks, elems,
                         [](const float* x, const float* w, std::uint8_t* b) {
                           unsigned codes[kElems];
                           symmetric_codes<8>(x, w, b, codes);
                           pack4(codes, b + 2);
                         });
}

void encode_q4_1(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<32, 20>(values, importance, blocks, elems,
                         [](const float* x, const float* w, std::uint8_t* b) {
                           unsigned codes[kElems];
                           affine_codes<15>(x, w, b, b + 2, codes);
                           pack4(codes, b + 4);
                         });
}

void encode_q5_0(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<32, 22>(values, importance, blocks, elems,
                         [](const float* x, const float* w, std::uint8_t* b) {
                           unsigned codes[kElems];
                           symmetric_codes<16>(x, w, b, codes);
                           pack5(codes, b + 2, b + 6);
                         });
}

void encode_q5_1(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<32, 24>(values, importance, blocks, elems,
                         [](const float* x, const float* w, std::uint8_t* b) {
                           unsigned codes[kElems];
                           affine_codes<31>(x, w, b, b + 2, codes);
                           pack5(codes, b + 4, b + 8);
                         });
}

void encode_q8_0(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<32, 34>(values, importance, blocks, elems,
                         [](const float* x, const float*, std::uint8_t* b) {
                           const float scale = std::fabs(extreme(x, kElems)) / 127.0f;
                           const float inv = inverse(scale);
                           store_scale(b, scale);
                           for (int i = 0; i < kElems; ++i) {
                             const float q = std::round(std::clamp(x[i] * inv, -127.0f, 127.0f));
                             b[2 + i] = static_cast<std::uint8_t>(static_cast<std::int8_t>(q));
                           }
                         });
}

}  // namespace moesaic::quant

#include <algorithm>
#include <cmath>
#include <functional>

#include "quant/block.hpp"
#include "quant/encode.hpp"
#include "quant/search.hpp"

namespace moesaic::quant {
namespace {

/// The scale for levels -1, 0 and 1 with the smallest error. The k values that become 1 or -1 are
/// the k largest, their best scale is their mean, and it takes k times its square from the error.
inline float fit_ternary(const float* x) {
  float sizes[256];
  for (int i = 0; i < 256; ++i) sizes[i] = std::fabs(x[i]);
  std::sort(sizes, sizes + 256, std::greater<>());
  double sum = 0.0, best = 0.0, scale = 0.0;
  for (int k = 1; k <= 256; ++k) {
    sum += sizes[k - 1];
    if (sum * sum / k > best) {
      best = sum * sum / k;
      scale = sum / k;
    }
  }
  return static_cast<float>(scale);
}

/// Codes 0, 1 and 2 for -1, 0 and 1 times the scale, which goes to `d`.
inline void ternary_codes(const float* x, std::uint8_t* d, std::uint8_t* codes) {
  const float inv = inverse(store_scale(d, fit_ternary(x)));
  for (int i = 0; i < 256; ++i) {
    codes[i] = static_cast<std::uint8_t>(nearest_int(x[i] * inv, -1, 1) + 1);
  }
}

/// Digit n of byte i is code bytes * n + i. A byte is the smallest fraction over 256 of which a
/// decoder reads the five digits back; with four the fifth is 0.
inline void encode_digits(const std::uint8_t* codes, int bytes, int digits, std::uint8_t* packed) {
  for (int i = 0; i < bytes; ++i) {
    int number = 0;
    for (int n = 0; n < 5; ++n) number = 3 * number + (n < digits ? codes[bytes * n + i] : 0);
    packed[i] = static_cast<std::uint8_t>((number * 256 + 242) / 243);
  }
}

}  // namespace

void encode_tq1_0(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  for_each_block<256, 54>(values, importance, blocks, elems,
                          [](const float* x, const float*, std::uint8_t* b) {
                            std::uint8_t codes[256];
                            ternary_codes(x, b + 52, codes);
                            encode_digits(codes, 32, 5, b);
                            encode_digits(codes + 160, 16, 5, b + 32);
                            encode_digits(codes + 240, 4, 4, b + 48);
                          });
}

void encode_tq2_0(const float* values, const float* importance, std::byte* blocks,
                  std::int64_t elems) {
  for_each_block<256, 66>(
      values, importance, blocks, elems, [](const float* x, const float*, std::uint8_t* b) {
        std::uint8_t codes[256];
        ternary_codes(x, b + 64, codes);
        for (int i = 0; i < 64; ++i) {
          const std::uint8_t* const c = codes + 128 * (i / 32) + i % 32;
          b[i] = static_cast<std::uint8_t>(c[0] | c[32] << 2 | c[64] << 4 | c[96] << 6);
        }
      });
}

// The mean magnitude is the best scale for signs.
void encode_q1_0(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<128, 18>(
      values, importance, blocks, elems, [](const float* x, const float*, std::uint8_t* b) {
        double sum = 0.0;
        for (int i = 0; i < 128; ++i) sum += std::fabs(x[i]);
        store_scale(b, static_cast<float>(sum / 128.0));
        std::fill_n(b + 2, 16, std::uint8_t{0});
        for (int i = 0; i < 128; ++i) {
          const int bit = x[i] >= 0.0f ? 1 : 0;
          b[2 + i / 8] = static_cast<std::uint8_t>(b[2 + i / 8] | bit << (i % 8));
        }
      });
}

void encode_q2_0(const float* values, const float* importance, std::byte* blocks,
                 std::int64_t elems) {
  for_each_block<64, 18>(
      values, importance, blocks, elems, [](const float* x, const float*, std::uint8_t* b) {
        constexpr Starts kStarts{0.6f, 3.6f, 16};
        const Importance<64> w(nullptr);
        const float inv =
            inverse(store_scale(b, fit_scale<IntegerLevels<-1, 2>, 64>(x, w.w, kStarts).scale));
        for (int i = 0; i < 16; ++i) {
          int byte = 0;
          for (int k = 0; k < 4; ++k) {
            byte |= (nearest_int(x[4 * i + k] * inv, -1, 2) + 1) << (2 * k);
          }
          b[2 + i] = static_cast<std::uint8_t>(byte);
        }
      });
}

}  // namespace moesaic::quant

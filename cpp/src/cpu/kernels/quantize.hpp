#pragma once

/// From rows of x to the bundles that the kernels read (activations.hpp).
///
/// For each step of 32 columns the largest magnitude becomes `limit` (127 with one plane, 32639
/// with two), and values are rounded to the nearest integer, ties to even, in the same way on every
/// instruction set. A step with a NaN or an infinity gets the scale NaN, so that this token, and no
/// other, becomes NaN.

#include "cpu/kernels/activations.hpp"
#include "cpu/kernels/decode.hpp"
#include "cpu/kernels/kernel.hpp"

namespace moesaic::cpu {
namespace {

/// Steps whose largest magnitude is below this count as zero: their inverse scale would overflow.
constexpr float kTiny = 1e-30F;

/// Reads values [first, first + count) of a row as f32; count is at most 32.
inline void read_source(const void* row, Source source, std::int64_t first, int count, float* out) {
  if (source == Source::F32) {
    std::memcpy(out, static_cast<const float*>(row) + first,
                sizeof(float) * static_cast<std::size_t>(count));
    return;
  }
  alignas(64) std::uint8_t bytes[2 * kActBlock] = {};
  std::memcpy(bytes, static_cast<const std::uint8_t*>(row) + 2 * first,
              2 * static_cast<std::size_t>(count));
  float wide[kActBlock];
  for (int i = 0; i < kActBlock; i += kLanes) {
    store_f(wide + i, source == Source::F16 ? load_f16(bytes + 2 * i) : load_bf16(bytes + 2 * i));
  }
  std::memcpy(out, wide, sizeof(float) * static_cast<std::size_t>(count));
}

/// out[i] = row[gather[i]], or 0 where gather[i] is negative.
template <class T>
inline void pick(const void* row, const std::int32_t* gather, int count, T* out) {
  const T* values = static_cast<const T*>(row);
  for (int i = 0; i < count; ++i) out[i] = gather[i] < 0 ? T{} : values[gather[i]];
}
/// Reads values picked one by one as f32; count is at most 32.
inline void read_gathered(const void* row, Source source, const std::int32_t* gather, int count,
                          float* out) {
  if (source == Source::F32) {
    pick(row, gather, count, out);
    return;
  }
  std::uint16_t bits[kActBlock];
  pick(row, gather, count, bits);
  read_source(bits, source, 0, count, out);
}

/// Writes the integers of 32 values, within +- limit, and returns their scale: NaN when a value is
/// not finite.
inline float quantize_block(const float* x, float limit, std::int32_t* q) {
  std::uint32_t word[kActBlock];
  std::memcpy(word, x, sizeof word);
  std::uint32_t largest = 0;
  for (int i = 0; i < kActBlock; ++i) {
    const std::uint32_t magnitude = word[i] & 0x7fffffffU;
    largest = magnitude > largest ? magnitude : largest;
  }
  float amax;
  std::memcpy(&amax, &largest, 4);
  const bool finite = largest < 0x7f800000U;
  if (!finite || amax < kTiny) {
    std::memset(q, 0, sizeof(std::int32_t) * kActBlock);
    if (finite) return 0.0F;
    const std::uint32_t nan = 0x7fc00000U;
    std::memcpy(&amax, &nan, 4);
    return amax;
  }
  const float inverse = limit / amax;
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the sum.
  constexpr float kMagic = 12582912.0F;
  float shifted[kActBlock];
  for (int i = 0; i < kActBlock; ++i) shifted[i] = x[i] * inverse + kMagic;
  std::memcpy(q, shifted, sizeof shifted);
  for (int i = 0; i < kActBlock; ++i) q[i] -= 0x4b400000;
  return amax / limit;
}

/// Where the integers of a bundle lie (activations.hpp).
enum class Order { Broadcast, Tiles };

/// Writes the 32 integers of step `s` for token t, given as planes; `high` counts with two only.
template <Order kOrder>
inline void put_planes(const ActRecord& a, int s, int tokens, int t, int planes,
                       const std::int8_t* high, const std::int8_t* low) {
  auto* words = const_cast<std::int32_t*>(a.q);
  if constexpr (kOrder == Order::Tiles) {
    std::int32_t* row = words + (s * tokens + t) * planes * 8;
    if (planes == 2) {
      std::memcpy(row, high, kActBlock);
      row += 8;
    }
    std::memcpy(row, low, kActBlock);
    return;
  }
  words += (s * 8 * tokens + t) * planes;
  const int stride = tokens * planes;
  for (int k = 0; k < 8; ++k) {
    if (planes == 2) {
      std::memcpy(words + k * stride, high + 4 * k, 4);
      std::memcpy(words + k * stride + 1, low + 4 * k, 4);
    } else {
      std::memcpy(words + k * stride, low + 4 * k, 4);
    }
  }
}

/// Writes step `s` of the `steps` of record `a` for token t: integers cut into planes, scale and
/// sums.
template <Order kOrder>
inline void put_block(const ActRecord& a, int s, int steps, int tokens, int t, int planes,
                      const std::int32_t* q, float scale) {
  std::int8_t high[kActBlock];
  std::int8_t low[kActBlock];
  for (int i = 0; i < kActBlock; ++i) {
    const std::int32_t h = (q[i] + 128) >> 8;
    high[i] = static_cast<std::int8_t>(h);
    low[i] = static_cast<std::int8_t>(planes == 2 ? q[i] - 256 * h : q[i]);
  }
  put_planes<kOrder>(a, s, tokens, t, planes, high, low);
  std::int32_t sum[2] = {};
  for (int i = 0; i < 16; ++i) sum[0] += q[i];
  for (int i = 16; i < 32; ++i) sum[1] += q[i];
  if constexpr (kOrder == Order::Tiles) {
    const int step = t * steps + s;
    const_cast<float*>(a.scale)[step] = scale;
    const_cast<float*>(a.sum)[step] = static_cast<float>(sum[0] + sum[1]);
    for (int part = 0; part < 2; ++part) {
      const_cast<float*>(a.sum16)[2 * step + part] = static_cast<float>(sum[part]);
    }
    return;
  }
  const int at = s * tokens + t;
  const_cast<float*>(a.scale)[at] = scale;
  const_cast<std::int32_t*>(a.negsum)[at] = -(sum[0] + sum[1]);
  const_cast<float*>(a.sum)[at] = static_cast<float>(sum[0] + sum[1]);
  for (int part = 0; part < 2; ++part) {
    const int half_at = (2 * s + part) * tokens + t;
    const_cast<std::int32_t*>(a.negsum16)[half_at] = -sum[part];
    const_cast<float*>(a.sum16)[half_at] = static_cast<float>(sum[part]);
  }
}

/// ProductKernels::quantize.
template <Order kOrder>
inline void quantize(const void* row, Source source, std::int64_t cols, int planes,
                     const std::int32_t* gather, std::uint8_t* bundle, int tokens, int t) {
  const auto read = [&](std::int64_t first, int count, float* values) {
    if (gather != nullptr) {
      read_gathered(row, source, gather + first, count, values);
    } else {
      read_source(row, source, first, count, values);
    }
  };
  float x[kActBlock];
  if (planes == 0) {
    float* out = reinterpret_cast<float*>(bundle) + t;
    for (std::int64_t first = 0; first < cols; first += kActBlock) {
      const int count = static_cast<int>(cols - first < kActBlock ? cols - first : kActBlock);
      read(first, count, x);
      for (int i = 0; i < count; ++i) out[(first + i) * tokens] = x[i];
    }
    return;
  }
  const float limit = planes == 2 ? 32639.0F : 127.0F;  // 32639 = 127 * 256 + 127
  const std::int64_t steps = cols / kActBlock;
  std::int32_t q[kActBlock];
  for (std::int64_t step = 0; step < steps; step += 8) {
    const int count = static_cast<int>(steps - step < 8 ? steps - step : 8);
    const ActRecord a = act_record(bundle, tokens, planes, step / 8, count);
    for (int s = 0; s < count; ++s) {
      read((step + s) * kActBlock, kActBlock, x);
      const float scale = quantize_block(x, limit, q);
      put_block<kOrder>(a, s, count, tokens, t, planes, q, scale);
    }
  }
}

/// to[i * stride] = from[i], in 32-bit words.
inline void spread_words(const void* from, const void* to, int count, int stride) {
  const auto* source = static_cast<const std::uint32_t*>(from);
  auto* target = static_cast<std::uint32_t*>(const_cast<void*>(to));
  for (int i = 0; i < count; ++i) target[i * stride] = source[i];
}

/// (to[i * stride], to[i * stride + 1]) = (from[2 * i], from[2 * i + 1]), in 32-bit words.
inline void spread_pairs(const void* from, const void* to, int count, int stride) {
  const auto* source = static_cast<const std::uint32_t*>(from);
  auto* target = static_cast<std::uint32_t*>(const_cast<void*>(to));
  for (int i = 0; i < count; ++i) {
    target[i * stride] = source[2 * i];
    target[i * stride + 1] = source[2 * i + 1];
  }
}

/// Separates the planes of `steps` steps of a bundle of one token: [8][2][4] becomes [2][32].
inline void part_planes(const std::int32_t* from, int steps, int tokens, std::int32_t* to) {
  for (int s = 0; s < steps; ++s, from += 16, to += 16 * tokens) {
    for (int k = 0; k < 8; ++k) {
      to[k] = from[2 * k];
      to[8 + k] = from[2 * k + 1];
    }
  }
}

/// ProductKernels::copy_token.
template <Order kOrder>
inline void copy_token(const std::uint8_t* row, std::int64_t cols, int planes, std::uint8_t* bundle,
                       int tokens, int t) {
  if (planes == 0) {
    const auto* x = reinterpret_cast<const float*>(row);
    float* out = reinterpret_cast<float*>(bundle) + t;
    for (std::int64_t k = 0; k < cols; ++k) out[k * tokens] = x[k];
    return;
  }
  const std::int64_t steps = cols / kActBlock;
  for (std::int64_t step = 0; step < steps; step += 8) {
    const int count = static_cast<int>(steps - step < 8 ? steps - step : 8);
    const ActRecord from = act_record(row, 1, planes, step / 8, count);
    const ActRecord to = act_record(bundle, tokens, planes, step / 8, count);
    if constexpr (kOrder == Order::Tiles) {
      auto* q = const_cast<std::int32_t*>(to.q) + t * planes * 8;
      if (planes == 2) {
        part_planes(from.q, count, tokens, q);
      } else {
        for (int s = 0; s < count; ++s) {
          std::memcpy(q + s * 8 * tokens, from.q + s * 8, kActBlock);
        }
      }
      const auto bytes = static_cast<std::size_t>(count) * 4;
      std::memcpy(const_cast<float*>(to.scale) + t * count, from.scale, bytes);
      std::memcpy(const_cast<float*>(to.sum) + t * count, from.sum, bytes);
      std::memcpy(const_cast<float*>(to.sum16) + 2 * t * count, from.sum16, 2 * bytes);
      continue;
    } else if (planes == 1) {
      spread_words(from.q, to.q + t, 8 * count, tokens);
    } else {
      spread_pairs(from.q, to.q + 2 * t, 8 * count, 2 * tokens);
    }
    spread_words(from.scale, to.scale + t, count, tokens);
    spread_words(from.negsum, to.negsum + t, count, tokens);
    spread_words(from.sum, to.sum + t, count, tokens);
    spread_words(from.negsum16, to.negsum16 + t, 2 * count, tokens);
    spread_words(from.sum16, to.sum16 + t, 2 * count, tokens);
  }
}

}  // namespace
}  // namespace moesaic::cpu

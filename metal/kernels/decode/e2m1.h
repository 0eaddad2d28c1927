#pragma once

#include "block.h"

/// The values of two e2m1 codes (sign, 2 bits of exponent, 1 bit of fraction), in bits 0 .. 3 and 16 .. 19
/// of `codes`, as f16 numbers of the same bits: 2^-14 of what they stand for. The smallest of them is
/// subnormal, which f16 numbers may be here.
inline half2 scaled_e2m1(uint codes) {
  return as_type<half2>((codes & 0x00070007u) << 9 | (codes & 0x00080008u) << 12);
}
constant constexpr float kE2m1Scale = 16384.0f;  // 2^14

/// 2 n codes in n bytes, n even: the low nibbles of them to `low`, the high ones to `high`.
inline void decode_e2m1(device const uchar* bytes, int count, thread float* low,
                        thread float* high) {
  for (int i = 0; i < count; i += 2) {
    const uint pair = uint(bytes[i]) | uint(bytes[i + 1]) << 16;
    const half2 first = scaled_e2m1(pair), second = scaled_e2m1(pair >> 4);
    low[i] = float(first.x);
    low[i + 1] = float(first.y);
    high[i] = float(second.x);
    high[i + 1] = float(second.y);
  }
}

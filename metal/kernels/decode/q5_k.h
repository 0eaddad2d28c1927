#pragma once

#include "k_scales.h"

/// Q5_K: 256 weights in 176 bytes: f16 d @0, f16 dmin @2, scales @4, 32 bytes of high bits @16,
/// nibbles @48 as in Q4_K. Bit j of high byte i is the fifth bit of weight i of sub-block j.
struct DecodeQ5K {
  enum { kGap = 32, kBlockBytes = 176, kBlockPieces = 8 };

  static int first_column(int piece) { return piece / 2 * 64 + piece % 2 * 16; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece / kBlockPieces) * kBlockBytes;
    const int in_block = piece % kBlockPieces;
    const float d = load_half(block);
    const float dmin = load_half(block + 2);
    const int sub = in_block / 2 * 2;
    const ScaleMin low = scale_min(block + 4, sub);
    const ScaleMin high = scale_min(block + 4, sub + 1);
    const float low_scale = d * low.scale, low_min = dmin * low.min;
    const float high_scale = d * high.scale, high_min = dmin * high.min;
    device const uchar* bits = block + 16 + in_block % 2 * 16;
    device const uchar* codes = block + 48 + 16 * in_block;
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(codes + i);
      const uint fifth = load_pair(bits + i) >> sub;  // bits 0, 8: this sub-block; 1, 9: the next
      weights[i] = low_scale * float((pair & 15) | (fifth & 1) << 4) - low_min;
      weights[i + 1] = low_scale * float((pair >> 8 & 15) | (fifth >> 8 & 1) << 4) - low_min;
      weights[kRunCols + i] =
          high_scale * float((pair >> 4 & 15) | (fifth >> 1 & 1) << 4) - high_min;
      weights[kRunCols + i + 1] = high_scale * float(pair >> 12 | (fifth >> 9 & 1) << 4) - high_min;
    }
  }
};

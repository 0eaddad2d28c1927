#pragma once

#include "block.h"

/// Q4_1: 32 weights in 20 bytes: f16 d @0, f16 m @2, 16 bytes of nibbles @4, the low ones first; code
/// 0 is m.
struct DecodeQ41 {
  enum { kGap = 16, kBlockBytes = 20 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece) * kBlockBytes;
    const float d = load_half(block);
    const float m = load_half(block + 2);
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(block + 4 + i);
      weights[i] = d * float(pair & 15) + m;
      weights[i + 1] = d * float(pair >> 8 & 15) + m;
      weights[kRunCols + i] = d * float(pair >> 4 & 15) + m;
      weights[kRunCols + i + 1] = d * float(pair >> 12) + m;
    }
  }
};

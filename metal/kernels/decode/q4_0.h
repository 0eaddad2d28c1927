#pragma once

#include "block.h"

/// Q4_0: 32 weights in 18 bytes: f16 d @0, 16 bytes of nibbles @2, the low ones first; code 8 is 0.
struct DecodeQ40 {
  enum { kGap = 16, kBlockBytes = 18 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece) * kBlockBytes;
    const float d = load_half(block);
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(block + 2 + i);
      weights[i] = d * float(int(pair & 15) - 8);
      weights[i + 1] = d * float(int(pair >> 8 & 15) - 8);
      weights[kRunCols + i] = d * float(int(pair >> 4 & 15) - 8);
      weights[kRunCols + i + 1] = d * float(int(pair >> 12) - 8);
    }
  }
};

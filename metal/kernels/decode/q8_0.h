#pragma once

#include "block.h"

/// Q8_0: 32 weights in 34 bytes: f16 d @0, signed codes @2.
struct DecodeQ80 {
  enum { kGap = 16, kBlockBytes = 34 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece) * kBlockBytes;
    const float d = load_half(block);
    for (int i = 0; i < kPieceCols; i += 2) {
      const uint pair = load_pair(block + 2 + i);
      weights[i] = d * float(int8_t(pair & 255));
      weights[i + 1] = d * float(int8_t(pair >> 8));
    }
  }
};

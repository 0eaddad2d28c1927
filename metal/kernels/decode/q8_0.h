#pragma once

#include "block.h"

/// Q8_0: 32 weights in 34 bytes: f16 d @0, signed codes @2.
struct DecodeQ80 : StoredRows {
  enum { kGap = 16, kBlockBytes = 34 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece) * kBlockBytes;
    for (int i = 0; i < kPieceCols; i += 2) {
      const uint pair = load_pair(block + 2 + i);
      codes[i] = float(int8_t(pair & 255));
      codes[i + 1] = float(int8_t(pair >> 8));
    }
    return same_scale(load_half(block));
  }
};

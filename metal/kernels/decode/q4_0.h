#pragma once

#include "block.h"

/// Q4_0: 32 weights in 18 bytes: f16 d @0, 16 bytes of nibbles @2, the low ones first; code 8 is 0.
struct DecodeQ40 : StoredRows {
  enum { kGap = 16, kBlockBytes = 18 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece) * kBlockBytes;
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(block + 2 + i);
      codes[i] = float(int(pair & 15) - 8);
      codes[i + 1] = float(int(pair >> 8 & 15) - 8);
      codes[kRunCols + i] = float(int(pair >> 4 & 15) - 8);
      codes[kRunCols + i + 1] = float(int(pair >> 12) - 8);
    }
    return same_scale(load_half(block));
  }
};

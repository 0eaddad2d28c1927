#pragma once

#include "block.h"

/// Q4_1: 32 weights in 20 bytes: f16 d @0, f16 m @2, 16 bytes of nibbles @4, the low ones first; code
/// 0 is m.
struct DecodeQ41 : StoredRows {
  enum { kGap = 16, kBlockBytes = 20, kHasMin = 1 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece) * kBlockBytes;
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(block + 4 + i);
      codes[i] = float(pair & 15);
      codes[i + 1] = float(pair >> 8 & 15);
      codes[kRunCols + i] = float(pair >> 4 & 15);
      codes[kRunCols + i + 1] = float(pair >> 12);
    }
    return with_min(load_half(block), -load_half(block + 2));
  }
};

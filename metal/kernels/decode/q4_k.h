#pragma once

#include "k_scales.h"

/// Q4_K: 256 weights in 144 bytes: f16 d @0, f16 dmin @2, scales @4, 128 bytes of nibbles @16. A
/// run of 32 bytes holds 64 weights: the low nibbles are the first 32, the high ones the last.
struct DecodeQ4K : StoredRows {
  enum { kGap = 32, kBlockBytes = 144, kBlockPieces = 8, kHasMin = 1 };

  static int first_column(int piece) { return piece / 2 * 64 + piece % 2 * 16; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int in_block = piece % kBlockPieces;
    const float d = load_half(block);
    const float dmin = load_half(block + 2);
    const int sub = in_block / 2 * 2;  // sub-blocks of 32 weights: this one and the next
    const ScaleMin low = scale_min(block + 4, sub);
    const ScaleMin high = scale_min(block + 4, sub + 1);
    const Scales s = {{d * low.scale, d * high.scale}, {dmin * low.min, dmin * high.min}};
    device const uchar* nibbles = block + 16 + 16 * in_block;
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(nibbles + i);
      codes[i] = float(pair & 15);
      codes[i + 1] = float(pair >> 8 & 15);
      codes[kRunCols + i] = float(pair >> 4 & 15);
      codes[kRunCols + i + 1] = float(pair >> 12);
    }
    return s;
  }
};

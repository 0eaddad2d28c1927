#pragma once

#include "k_scales.h"

/// Q5_K: 256 weights in 176 bytes: f16 d @0, f16 dmin @2, scales @4, 32 bytes of high bits @16,
/// nibbles @48 as in Q4_K. Bit j of high byte i is the fifth bit of weight i of sub-block j.
struct DecodeQ5K : StoredRows {
  enum { kGap = 32, kBlockBytes = 176, kBlockPieces = 8, kHasMin = 1 };

  static int first_column(int piece) { return piece / 2 * 64 + piece % 2 * 16; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int in_block = piece % kBlockPieces;
    const float d = load_half(block);
    const float dmin = load_half(block + 2);
    const int sub = in_block / 2 * 2;
    const ScaleMin low = scale_min(block + 4, sub);
    const ScaleMin high = scale_min(block + 4, sub + 1);
    const Scales s = {{d * low.scale, d * high.scale}, {dmin * low.min, dmin * high.min}};
    device const uchar* bits = block + 16 + in_block % 2 * 16;
    device const uchar* nibbles = block + 48 + 16 * in_block;
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(nibbles + i);
      const uint fifth = load_pair(bits + i) >> sub;  // bits 0, 8: this sub-block; 1, 9: the next
      codes[i] = float((pair & 15) | (fifth & 1) << 4);
      codes[i + 1] = float((pair >> 8 & 15) | (fifth >> 8 & 1) << 4);
      codes[kRunCols + i] = float((pair >> 4 & 15) | (fifth >> 1 & 1) << 4);
      codes[kRunCols + i + 1] = float(pair >> 12 | (fifth >> 9 & 1) << 4);
    }
    return s;
  }
};

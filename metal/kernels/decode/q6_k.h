#pragma once

#include "block.h"

/// Q6_K: 256 weights in 210 bytes: low nibbles @0, high pairs of bits @128, 16 signed scales @192,
/// f16 d @208. A half of 128 weights, in 4 quarters of 32, takes 64 low bytes (quarters 0 and 1 in
/// the low nibbles, 2 and 3 in the high) and 32 high bytes (pair g of bits is quarter g).
struct DecodeQ6K : StoredRows {
  enum { kGap = 64, kBlockBytes = 210, kBlockPieces = 8 };

  static int first_column(int piece) { return piece / 4 * 128 + piece % 4 * 16; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int in_block = piece % kBlockPieces;
    const int part = in_block / 4;         // which half of the block
    const int quarter = in_block % 4 / 2;  // of its quarters: this one, and the one 2 on
    const int sub = 8 * part + 2 * quarter + in_block % 2;  // sub-blocks of 16 weights
    const float d = load_half(block + 208);
    device const int8_t* scales = (device const int8_t*)(block + 192);
    device const uchar* lows = block + 16 * in_block;
    device const uchar* bits = block + 128 + 32 * part + 16 * (in_block % 2);
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(lows + i);
      const uint top =
          load_pair(bits + i) >> (2 * quarter);  // bits 0, 8: this quarter; 4, 12: the other
      codes[i] = float(int((pair & 15) | (top & 3) << 4) - 32);
      codes[i + 1] = float(int((pair >> 8 & 15) | (top >> 8 & 3) << 4) - 32);
      codes[kRunCols + i] = float(int((pair >> 4 & 15) | (top >> 4 & 3) << 4) - 32);
      codes[kRunCols + i + 1] = float(int(pair >> 12 | (top >> 12 & 3) << 4) - 32);
    }
    return two_scales(d * float(scales[sub]), d * float(scales[sub + 4]));
  }
};

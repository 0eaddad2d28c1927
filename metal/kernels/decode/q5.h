#pragma once

#include "block.h"

/// Q5_0 and Q5_1: 32 weights: f16 d @0, in Q5_1 f16 m, then 32 bits of which bit i is the fifth bit of
/// weight i, then 16 bytes of nibbles, the low ones first. Code 16 of Q5_0 is 0, code 0 of Q5_1 is m.
inline void decode_fives(device const uchar* bits, int zero, thread float* codes) {
  const uint fifth = load_word(bits);
  device const uchar* nibbles = bits + 4;
  for (int i = 0; i < kRunCols; i += 2) {
    const uint pair = load_pair(nibbles + i);
    const uint low = fifth >> i, high = fifth >> (kRunCols + i);
    codes[i] = float(int((pair & 15) | (low & 1) << 4) - zero);
    codes[i + 1] = float(int((pair >> 8 & 15) | (low >> 1 & 1) << 4) - zero);
    codes[kRunCols + i] = float(int((pair >> 4 & 15) | (high & 1) << 4) - zero);
    codes[kRunCols + i + 1] = float(int(pair >> 12 | (high >> 1 & 1) << 4) - zero);
  }
}

struct DecodeQ50 : StoredRows {
  enum { kGap = 16, kBlockBytes = 22 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece) * kBlockBytes;
    decode_fives(block + 2, 16, codes);
    return same_scale(load_half(block));
  }
};

struct DecodeQ51 : StoredRows {
  enum { kGap = 16, kBlockBytes = 24, kHasMin = 1 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece) * kBlockBytes;
    decode_fives(block + 4, 0, codes);
    return with_min(load_half(block), -load_half(block + 2));
  }
};

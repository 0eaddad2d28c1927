#pragma once

#include "block.h"

/// Q5_0 and Q5_1: 32 weights: f16 d @0, in Q5_1 f16 m, then 32 bits of which bit i is the fifth bit of
/// weight i, then 16 bytes of nibbles, the low ones first. Code 16 of Q5_0 is 0, code 0 of Q5_1 is m.
inline void decode_fives(device const uchar* bits, float d, float m, thread float* weights) {
  const uint fifth = load_pair(bits) | load_pair(bits + 2) << 16;
  device const uchar* codes = bits + 4;
  for (int i = 0; i < kRunCols; i += 2) {
    const uint pair = load_pair(codes + i);
    const uint low = fifth >> i, high = fifth >> (kRunCols + i);
    weights[i] = d * float((pair & 15) | (low & 1) << 4) + m;
    weights[i + 1] = d * float((pair >> 8 & 15) | (low >> 1 & 1) << 4) + m;
    weights[kRunCols + i] = d * float((pair >> 4 & 15) | (high & 1) << 4) + m;
    weights[kRunCols + i + 1] = d * float(pair >> 12 | (high >> 1 & 1) << 4) + m;
  }
}

struct DecodeQ50 {
  enum { kGap = 16, kBlockBytes = 22 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece) * kBlockBytes;
    const float d = load_half(block);
    decode_fives(block + 2, d, -16.0f * d, weights);
  }
};

struct DecodeQ51 {
  enum { kGap = 16, kBlockBytes = 24 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece) * kBlockBytes;
    decode_fives(block + 4, load_half(block), load_half(block + 2), weights);
  }
};

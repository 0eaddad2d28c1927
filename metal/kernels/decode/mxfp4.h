#pragma once

#include "e2m1.h"

/// MXFP4 (OCP Microscaling formats 1.0): 32 weights in 17 bytes: exponent @0, 16 bytes of e2m1
/// nibbles @1, the low ones first. Blocks have no alignment.
struct DecodeMxfp4 {
  enum { kGap = 16, kBlockBytes = 17 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece) * kBlockBytes;
    const float scale = half_power(block[0]);
    for (int i = 0; i < kRunCols; i++) {
      weights[i] = scale * doubled_e2m1(block[1 + i] & 15);
      weights[kRunCols + i] = scale * doubled_e2m1(block[1 + i] >> 4);
    }
  }

  /// 2^(e - 128), half of what the exponent byte stands for. 0 and 1 give subnormal numbers, which
  /// the GPU flushes: blocks whose largest weights are 6 * 2^-127 and 6 * 2^-126 decode to zeros.
  static float half_power(uint e) {
    return as_type<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  }
};

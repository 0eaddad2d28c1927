#pragma once

#include "e2m1.h"

/// NVFP4: 64 weights in 36 bytes: 4 scales @0, unsigned e4m3, then 8 bytes of e2m1 nibbles for each 16
/// weights, the low ones first.
struct DecodeNvfp4 {
  enum { kGap = 16, kBlockBytes = 36, kBlockPieces = 2 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece / kBlockPieces) * kBlockBytes;
    for (int run = 0; run < 2; run++) {
      const int sub = piece % kBlockPieces * 2 + run;
      const float scale = half_ue4m3(block[sub]);
      device const uchar* codes = block + 4 + 8 * sub;
      for (int i = 0; i < 8; i++) {
        weights[kRunCols * run + i] = scale * doubled_e2m1(codes[i] & 15);
        weights[kRunCols * run + 8 + i] = scale * doubled_e2m1(codes[i] >> 4);
      }
    }
  }

  /// Half of what the scale stands for: bias 7, the top bit ignored; the NaN code 0x7f gives 0.
  static float half_ue4m3(uint code) {
    const uint exponent = code >> 3 & 15, mantissa = code & 7;
    if (code == 0x7f) return 0.0f;
    if (exponent == 0) return float(mantissa) * 0.0009765625f;
    return as_type<float>((exponent + 119) << 23 | mantissa << 20);
  }
};

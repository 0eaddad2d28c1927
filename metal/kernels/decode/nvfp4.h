#pragma once

#include "e2m1.h"

/// NVFP4: 64 weights in 36 bytes: 4 scales @0, unsigned e4m3, then 8 bytes of e2m1 nibbles for each 16
/// weights, the low ones first.
struct DecodeNvfp4 : StoredRows {
  enum { kGap = 16, kBlockBytes = 36, kBlockPieces = 2 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    device const uchar* scales = block + piece % kBlockPieces * 2;
    device const uchar* nibbles = block + 4 + piece % kBlockPieces * 16;
    decode_e2m1(nibbles, 8, codes, codes + 8);
    decode_e2m1(nibbles + 8, 8, codes + kRunCols, codes + kRunCols + 8);
    return two_scales(ue4m3(scales[0]) * kE2m1Scale, ue4m3(scales[1]) * kE2m1Scale);
  }

  /// Bias 7, the top bit ignored; the NaN code 0x7f gives 0.
  static float ue4m3(uint code) {
    const uint exponent = code >> 3 & 15, mantissa = code & 7;
    if (code == 0x7f) return 0.0f;
    if (exponent == 0) return float(mantissa) * 0.001953125f;
    return as_type<float>((exponent + 120) << 23 | mantissa << 20);
  }
};

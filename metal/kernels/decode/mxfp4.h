#pragma once

#include "e2m1.h"

/// MXFP4 (OCP Microscaling formats 1.0): 32 weights in 17 bytes: exponent @0, 16 bytes of e2m1
/// nibbles @1, the low ones first. Blocks have no alignment. A scale, 2^(e - 127) over kE2m1Scale, is normal
/// for every e; from 241 on it is infinite.
struct DecodeMxfp4 : StoredRows {
  enum { kGap = 16, kBlockBytes = 17 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece) * kBlockBytes;
    decode_e2m1(block + 1, kRunCols, codes, codes + kRunCols);
    return same_scale(as_type<float>(min(uint(block[0]) + 14, 255u) << 23));
  }
};

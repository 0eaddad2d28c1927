#pragma once

#include "k_twos.h"

/// Q2_K: 256 weights in 84 bytes: 16 scales @0 (low nibbles; the high ones are minima), codes @16, f16
/// d @80, f16 dmin @82.
struct DecodeQ2K : StoredRows {
  enum { kGap = 32, kBlockBytes = 84, kBlockPieces = 8, kHasMin = 1 };

  static int first_column(int piece) { return KTwos::first_column(piece); }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const KTwos at = KTwos::of(piece % kBlockPieces);
    const float d = load_half(block + 80);
    const float dmin = load_half(block + 82);
    const uint low = block[at.sub], high = block[at.sub + 2];
    const Scales s = {{d * float(low & 15), d * float(high & 15)},
                      {dmin * float(low >> 4), dmin * float(high >> 4)}};
    device const uchar* twos = block + 16 + at.byte;
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(twos + i) >> at.shift;
      codes[i] = float(pair & 3);
      codes[i + 1] = float(pair >> 8 & 3);
      codes[kRunCols + i] = float(pair >> 2 & 3);
      codes[kRunCols + i + 1] = float(pair >> 10 & 3);
    }
    return s;
  }
};

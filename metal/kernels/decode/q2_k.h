#pragma once

#include "k_twos.h"

/// Q2_K: 256 weights in 84 bytes: 16 scales @0 (low nibbles; the high ones are minima), codes @16, f16
/// d @80, f16 dmin @82.
struct DecodeQ2K {
  enum { kGap = 32, kBlockBytes = 84, kBlockPieces = 8 };

  static int first_column(int piece) { return KTwos::first_column(piece); }

  static void decode(device const uchar* row, int piece, int, thread float* weights) {
    device const uchar* block = row + long(piece / kBlockPieces) * kBlockBytes;
    const KTwos at = KTwos::of(piece % kBlockPieces);
    const float d = load_half(block + 80);
    const float dmin = load_half(block + 82);
    const uint low = block[at.sub], high = block[at.sub + 2];
    const float low_scale = d * float(low & 15), low_min = dmin * float(low >> 4);
    const float high_scale = d * float(high & 15), high_min = dmin * float(high >> 4);
    device const uchar* codes = block + 16 + at.byte;
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(codes + i) >> at.shift;
      weights[i] = low_scale * float(pair & 3) - low_min;
      weights[i + 1] = low_scale * float(pair >> 8 & 3) - low_min;
      weights[kRunCols + i] = high_scale * float(pair >> 2 & 3) - high_min;
      weights[kRunCols + i + 1] = high_scale * float(pair >> 10 & 3) - high_min;
    }
  }
};

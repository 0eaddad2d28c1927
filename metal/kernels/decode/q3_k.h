#pragma once

#include "k_twos.h"

/// Q3_K: 256 weights in 110 bytes: 32 bytes of high bits @0, codes @32, 12 bytes of scales @96, f16 d
/// @108. Bit j / 2 of high byte i is the third bit of weight i of sub-blocks j (an even one for the
/// first 16 bytes); code 4 is 0.
struct DecodeQ3K : StoredRows {
  enum { kGap = 32, kBlockBytes = 110, kBlockPieces = 8 };

  static int first_column(int piece) { return KTwos::first_column(piece); }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const KTwos at = KTwos::of(piece % kBlockPieces);
    const float d = load_half(block + 108);
    device const uchar* bits = block + at.sub % 2 * 16;
    device const uchar* lows = block + 32 + at.byte;
    const int bit = at.sub / 2;  // that of sub-block j; j + 2 has the next one
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(lows + i) >> at.shift;
      const uint third = load_pair(bits + i) >> bit;
      codes[i] = float(int((pair & 3) | (third & 1) << 2) - 4);
      codes[i + 1] = float(int((pair >> 8 & 3) | (third >> 8 & 1) << 2) - 4);
      codes[kRunCols + i] = float(int((pair >> 2 & 3) | (third >> 1 & 1) << 2) - 4);
      codes[kRunCols + i + 1] = float(int((pair >> 10 & 3) | (third >> 9 & 1) << 2) - 4);
    }
    return two_scales(d * scale_of(block + 96, at.sub), d * scale_of(block + 96, at.sub + 2));
  }

  /// The 6-bit scale of sub-block j, -32 .. 31: its low 4 bits are nibble j / 8 of byte j % 8, the
  /// high 2 pair j / 4 of byte 8 + j % 4.
  static float scale_of(device const uchar* scales, int j) {
    const uint low = uint(scales[j % 8]) >> (4 * (j / 8)) & 15;
    const uint high = uint(scales[8 + j % 4]) >> (2 * (j / 4)) & 3;
    return float(int(low | high << 4) - 32);
  }
};

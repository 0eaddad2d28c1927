#pragma once

#include "block.h"

/// IQ4_NL and IQ4_XS: 16 bytes of nibbles, the low ones first, each the number of a level.
constant int kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                               1,    13,   25,  38,  53,  69,  89,  113};

inline void decode_levels(device const uchar* nibbles, thread float* codes) {
  for (int i = 0; i < kRunCols; i += 2) {
    const uint pair = load_pair(nibbles + i);
    codes[i] = float(kIq4Levels[pair & 15]);
    codes[i + 1] = float(kIq4Levels[pair >> 8 & 15]);
    codes[kRunCols + i] = float(kIq4Levels[pair >> 4 & 15]);
    codes[kRunCols + i + 1] = float(kIq4Levels[pair >> 12]);
  }
}

/// 32 weights in 18 bytes: f16 d @0, nibbles @2.
struct DecodeIQ4NL : StoredRows {
  enum { kGap = 16, kBlockBytes = 18 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece) * kBlockBytes;
    decode_levels(block + 2, codes);
    return same_scale(load_half(block));
  }
};

/// 256 weights in 136 bytes: f16 d @0, high pairs of the scales' bits @2, their low nibbles @4, then 8
/// sub-blocks of 32 weights @8. Scales are -32 .. 31.
struct DecodeIQ4XS : StoredRows {
  enum { kGap = 16, kBlockBytes = 136, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int j = piece % kBlockPieces;
    const uint low = uint(block[4 + j / 2]) >> (4 * (j % 2)) & 15;
    const uint high = load_pair(block + 2) >> (2 * j) & 3;
    decode_levels(block + 8 + 16 * j, codes);
    return same_scale(load_half(block) * float(int(low | high << 4) - 32));
  }
};

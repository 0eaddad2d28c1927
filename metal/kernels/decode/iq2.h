#pragma once

#include "iq_grids.h"

/// IQ2_XXS, IQ2_XS and IQ2_S: 256 weights as 8 sub-blocks of 32, each 4 runs of 8: a point of a grid and
/// 8 signs; half a sub-block has a 4-bit scale.
///
/// IQ2_XXS, 66 bytes: f16 d @0, per sub-block 8 bytes @2: 4 numbers of points, then a word with four
/// times 7 signs and the scale of all 32 on top.
struct DecodeIQ2XXS : StoredRows {
  enum { kGap = 16, kBlockBytes = 66, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    device const uchar* sub = block + 2 + 8 * (piece % kBlockPieces);
    const uint word = load_word(sub + 4);
    for (int run = 0; run < 4; run++) {
      decode_eight(kPointsIq2xxs[sub[run]], signs_of_run(word, run), codes + 8 * run);
    }
    return same_scale(iq2_scale(load_half(block), word >> 28));
  }
};

/// IQ2_XS, 74 bytes: f16 d @0, 32 pairs of bytes @2 (9 bits number of a point, 7 signs), 8 bytes of
/// scales @66.
struct DecodeIQ2XS : StoredRows {
  enum { kGap = 16, kBlockBytes = 74, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int sub = piece % kBlockPieces;
    const float d = load_half(block);
    const uint scales = block[66 + sub];
    for (int run = 0; run < 4; run++) {
      const uint code = load_pair(block + 2 + 8 * sub + 2 * run);
      decode_eight(kPointsIq2xs[code & 511], full_signs(code >> 9), codes + 8 * run);
    }
    return two_scales(iq2_scale(d, scales & 15), iq2_scale(d, scales >> 4));
  }
};

/// IQ2_S, 82 bytes: f16 d @0, 32 numbers of points @2, 32 bytes of signs @34, 8 bytes @66 with four
/// times 2 high bits of the numbers, 8 bytes of scales @74.
struct DecodeIQ2S : StoredRows {
  enum { kGap = 16, kBlockBytes = 82, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int sub = piece % kBlockPieces;
    const float d = load_half(block);
    const uint high = block[66 + sub], scales = block[74 + sub];
    for (int run = 0; run < 4; run++) {
      const uint number = block[2 + 4 * sub + run] | (high >> (2 * run) & 3) << 8;
      decode_eight(kPointsIq2s[number], block[34 + 4 * sub + run], codes + 8 * run);
    }
    return two_scales(iq2_scale(d, scales & 15), iq2_scale(d, scales >> 4));
  }
};

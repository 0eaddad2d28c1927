#pragma once

#include "iq_grids.h"

/// IQ3_XXS and IQ3_S: 256 weights as 8 sub-blocks of 32, each 8 points of 4 weights, with signs and a
/// 4-bit scale.
///
/// IQ3_XXS, 98 bytes: f16 d @0, 64 numbers of points @2, per sub-block a word @66 with four times 7
/// signs and the scale on top. Levels are 4, 12, .. 52, and 62.
struct DecodeIQ3XXS : StoredRows {
  enum { kGap = 16, kBlockBytes = 98, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int sub = piece % kBlockPieces;
    const uint word = load_word(block + 66 + 4 * sub);
    for (int four = 0; four < 8; four++) {
      const uint point = kPointsIq3xxs[block[2 + 8 * sub + four]];
      const uint signs = signs_of_run(word, four / 2) >> (four % 2 * 4);
      for (int k = 0; k < 4; k++) {
        const uint i = point >> (4 * k) & 7;
        codes[4 * four + k] = with_sign(float(4 + 8 * i + (i + 1) / 8 * 2), signs >> k);
      }
    }
    return same_scale(load_half(block) * (0.5f + float(word >> 28)) * 0.5f);
  }
};

/// IQ3_S, 110 bytes: f16 d @0, 64 numbers of points @2, 8 bytes @66 with their ninth bits, 32 bytes of
/// signs @74, 4 bytes of scales @106. Levels are 1, 3, .. 15.
struct DecodeIQ3S : StoredRows {
  enum { kGap = 16, kBlockBytes = 110, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int sub = piece % kBlockPieces;
    const uint code = uint(block[106 + sub / 2]) >> (sub % 2 * 4) & 15;
    const uint ninth = block[66 + sub];
    for (int four = 0; four < 8; four++) {
      const uint point = kPointsIq3s[block[2 + 8 * sub + four] | (ninth >> four & 1) << 8];
      const uint signs = uint(block[74 + 4 * sub + four / 2]) >> (four % 2 * 4);
      for (int k = 0; k < 4; k++) {
        const uint i = point >> (4 * k) & 7;
        codes[4 * four + k] = with_sign(float(1 + 2 * i), signs >> k);
      }
    }
    return same_scale(load_half(block) * float(1 + 2 * code));
  }
};

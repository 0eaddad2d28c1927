#pragma once

#include "block.h"

/// What Q2_K and Q3_K share: the low 2 bits of 256 weights in 64 bytes. A run of 32 bytes holds a
/// half of 128 weights: pair g of bits is weights 32 g .. 32 g + 31 of it. Sub-blocks are 16 weights.
///
/// Piece p of a block is sub-blocks j and j + 2, neighbouring pairs of bits in the same 16 bytes.
struct KTwos {
  int sub;    // j
  int byte;   // of the 64, where the codes begin
  int shift;  // of the codes of sub-block j; those of j + 2 are 2 bits above

  static KTwos of(int piece) {
    const int half_block = piece / 4, quarter = piece % 4;
    return {8 * half_block + quarter / 2 * 4 + quarter % 2, 32 * half_block + quarter % 2 * 16,
            quarter / 2 * 4};
  }
  static int first_column(int piece) { return piece / 8 * 256 + 16 * of(piece % 8).sub; }
};

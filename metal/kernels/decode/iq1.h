#pragma once

#include "iq_grids.h"

/// IQ1_S and IQ1_M: 256 weights as 32 runs of 8: a point of a grid of 2048, shifted by an eighth up or
/// down, and a 3-bit scale.
constant constexpr float kIq1Shift = 0.125f;

/// IQ1_S, 50 bytes: f16 d @0, 32 numbers of points @2, per sub-block of 32 weights a pair of bytes @34:
/// four times 3 high bits of the numbers, 3 bits scale, 1 bit sign of the shift.
struct DecodeIQ1S : StoredRows {
  enum { kGap = 16, kBlockBytes = 50, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int sub = piece % kBlockPieces;
    const uint high = load_pair(block + 34 + 2 * sub);
    const float scale = load_half(block) * float(2 * (high >> 12 & 7) + 1);
    const float shift = with_sign(kIq1Shift, high >> 15);
    for (int run = 0; run < 4; run++) {
      const uint number = block[2 + 4 * sub + run] | (high >> (3 * run) & 7) << 8;
      decode_shifted(kPointsIq1[number], shift, codes + 8 * run);
    }
    return same_scale(scale);
  }
};

/// IQ1_M, 56 bytes: 32 numbers of points @0, 16 bytes of nibbles @32 (3 high bits of a number, 1 bit
/// sign of the shift), 4 pairs of bytes @48: each four times a 3-bit scale of two runs, and on top a
/// nibble of the f16 d.
struct DecodeIQ1M : StoredRows {
  enum { kGap = 16, kBlockBytes = 56, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const int sub = piece % kBlockPieces;
    uint d_bits = 0;
    for (int n = 0; n < 4; n++) d_bits |= (load_pair(block + 48 + 2 * n) >> 12) << (4 * n);
    const float d = float(as_type<half>(ushort(d_bits)));
    const uint scales = load_pair(block + 48 + sub / 2 * 2) >> (sub % 2 * 6);
    const uint nibbles = load_pair(block + 32 + 2 * sub);
    for (int run = 0; run < 4; run++) {
      const uint nibble = nibbles >> (4 * run) & 15;
      const uint number = block[4 * sub + run] | (nibble & 7) << 8;
      decode_shifted(kPointsIq1[number], with_sign(kIq1Shift, nibble >> 3), codes + 8 * run);
    }
    return two_scales(d * float(2 * (scales & 7) + 1), d * float(2 * (scales >> 3 & 7) + 1));
  }
};

#pragma once

#include "k_twos.h"

/// TQ1_0: 256 weights -1, 0 and 1 times f16 d @52. A byte is a fraction over 256 written in base 3,
/// whose digit n comes to the front when it is multiplied by 3^n. 32 bytes @0 and 16 bytes @32 of 5
/// digits, then 4 bytes @48 of 4 digits: digit n of byte i of n_i bytes is weight n_i n + i.
struct DecodeTQ10 : StoredRows {
  enum { kGap = 16, kBlockBytes = 54, kBlockPieces = 8 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    for (int half_piece = 0; half_piece < 2; half_piece++) {
      const int run = piece % kBlockPieces * 2 + half_piece;  // of 16 weights
      thread float* to = codes + kRunCols * half_piece;
      if (run < 15) {
        device const uchar* bytes = block + (run < 10 ? run % 2 * 16 : 32);
        const uint power = power_of_3(run < 10 ? run / 2 : run - 10);
        for (int i = 0; i < kRunCols; i++) to[i] = digit(bytes[i], power);
      } else {
        for (int i = 0; i < kRunCols; i++) to[i] = digit(block[48 + i % 4], power_of_3(i / 4));
      }
    }
    return same_scale(load_half(block + 52));
  }

  static uint power_of_3(int n) { return n == 0 ? 1 : n == 1 ? 3 : n == 2 ? 9 : n == 3 ? 27 : 81; }
  static float digit(uint byte, uint power) {
    return float(int((byte * power & 255) * 3 >> 8) - 1);
  }
};

/// TQ2_0: 256 weights -1, 0 and 1 in 66 bytes: codes @0 as in Q2_K, f16 d @64.
struct DecodeTQ20 : StoredRows {
  enum { kGap = 32, kBlockBytes = 66, kBlockPieces = 8 };

  static int first_column(int piece) { return KTwos::first_column(piece); }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const KTwos at = KTwos::of(piece % kBlockPieces);
    for (int i = 0; i < kRunCols; i += 2) {
      const uint pair = load_pair(block + at.byte + i) >> at.shift;
      codes[i] = float(int(pair & 3) - 1);
      codes[i + 1] = float(int(pair >> 8 & 3) - 1);
      codes[kRunCols + i] = float(int(pair >> 2 & 3) - 1);
      codes[kRunCols + i + 1] = float(int(pair >> 10 & 3) - 1);
    }
    return same_scale(load_half(block + 64));
  }
};

/// Q1_0: 128 weights in 18 bytes: f16 d @0, signs @2, where a set bit is d and a clear one -d.
struct DecodeQ10 : StoredRows {
  enum { kGap = 16, kBlockBytes = 18, kBlockPieces = 4 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    const uint signs = load_word(block + 2 + 4 * (piece % kBlockPieces));
    for (int i = 0; i < kPieceCols; i++) codes[i] = (signs >> i & 1) != 0 ? 1.0f : -1.0f;
    return same_scale(load_half(block));
  }
};

/// Q2_0: 64 weights -1 .. 2 in 18 bytes: f16 d @0, codes @2, four neighbours to a byte; code 1 is 0.
struct DecodeQ20 : StoredRows {
  enum { kGap = 16, kBlockBytes = 18, kBlockPieces = 2 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const uchar* block = row + uint(piece / kBlockPieces) * kBlockBytes;
    device const uchar* twos = block + 2 + 8 * (piece % kBlockPieces);
    for (int i = 0; i < kPieceCols; i += 8) {
      const uint eight = load_pair(twos + i / 4);
      for (int k = 0; k < 8; k++) codes[i + k] = float(int(eight >> (2 * k) & 3) - 1);
    }
    return same_scale(load_half(block));
  }
};

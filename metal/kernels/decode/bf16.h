#pragma once

#include "block.h"

/// BF16, the upper halves of f32 numbers, takes any number of columns as F16 does.
struct DecodeBF16 {
  enum { kGap = 16 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int cols, thread float* weights) {
    const int first = piece * kPieceCols;
    device const ushort* from = (device const ushort*)row + first;
    for (int i = 0; i < kPieceCols; i++) {
      weights[i] = first + i < cols ? as_type<float>(uint(from[i]) << 16) : 0.0f;
    }
  }
};

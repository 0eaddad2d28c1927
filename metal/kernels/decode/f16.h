#pragma once

#include "block.h"

/// F16 takes any number of columns, so the last piece of a row may be short; zeros fill it up.
struct DecodeF16 {
  enum { kGap = 16 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int cols, thread float* weights) {
    const int first = piece * kPieceCols;
    device const half* from = (device const half*)row + first;
    for (int i = 0; i < kPieceCols; i++) weights[i] = first + i < cols ? float(from[i]) : 0.0f;
  }
};

#pragma once

#include "block.h"

/// F32 takes any number of columns as F16 does.
struct DecodeF32 {
  enum { kGap = 16 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static void decode(device const uchar* row, int piece, int cols, thread float* weights) {
    const int first = piece * kPieceCols;
    device const float* from = (device const float*)row + first;
    for (int i = 0; i < kPieceCols; i++) weights[i] = first + i < cols ? from[i] : 0.0f;
  }
};

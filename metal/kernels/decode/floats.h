#pragma once

#include "../rows.h"
#include "block.h"

inline float float_of(half value) { return float(value); }
inline float float_of(float value) { return value; }
inline float float_of(ushort value) { return bf16_to_float(value); }

/// F16, BF16 (a T of ushort) and F32 take any number of columns, so the last piece of a row may be
/// short; zeros fill it up.
template <class T>
struct DecodeFloats : StoredRows {
  enum { kGap = 16, kWholePieces = 0, kPlainColumns = 0 };

  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs&, thread float* codes) {
    device const T* from = (device const T*)row + uint(piece) * kPieceCols;
    for (int i = 0; i < kPieceCols; i++) codes[i] = float_of(from[i]);
    return same_scale(1.0f);
  }
  static Scales decode_last(Row row, int piece, thread const WeightArgs& args,
                            thread float* codes) {
    device const T* from = (device const T*)row;
    for (int i = 0; i < kPieceCols; i++) {
      const int column = piece * kPieceCols + i;
      const float weight = float_of(from[min(column, args.cols - 1)]);
      codes[i] = column < args.cols ? weight : 0.0f;
    }
    return same_scale(1.0f);
  }
};

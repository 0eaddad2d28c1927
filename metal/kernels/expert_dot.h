#pragma once

/// A few output features times a few entries, for one simdgroup: the loop of the GEMV kernels.
///
///            cols, in pieces of 32, lane l takes pieces l, l + 32, ...
///   row r    [0][1][2] ... [31][0][1] ...    x  entry e   ->  sum[r][e], in every lane
///
/// A piece is decoded once and multiplied with all entries at hand. The order of a sum depends on
/// the row and the number of columns only: an entry gives the same bits alone and in a batch.

#include "decode/formats.h"
#include "rows.h"

constant constexpr int kDotRows = kGemvRows / (kGemvThreads / kSimdWidth);
constant constexpr int kDotEntries = 4;

/// Entries of one segment that are computed together, so that weights are decoded once for them.
struct DotEntries {
  long x_row[kDotEntries];       // element of x at which the input row begins
  int destination[kDotEntries];  // -1: padding, neither read nor written
};

inline DotEntries dot_entries(thread const RowMap& map, thread const InputArgs& in, int first,
                              int end) {
  DotEntries entries;
  for (int e = 0; e < kDotEntries; e++) {
    entries.destination[e] = first + e < end ? entry_destination(map, first + e) : -1;
    entries.x_row[e] =
        entries.destination[e] < 0 ? 0 : row_offset(in, entry_source(map, first + e));
  }
  return entries;
}

/// sums[r][e] = row first_row + r of the expert at `weights` times entry e. Rows behind the last
/// one repeat it; their sums are not stored.
template <class Decoder>
inline void dot_rows(thread const WeightArgs& args, device const uchar* weights, int first_row,
                     device const uchar* x, thread const DotEntries& entries, uint lane,
                     thread float (&sums)[kDotRows][kDotEntries]) {
  for (int r = 0; r < kDotRows; r++) {
    for (int e = 0; e < kDotEntries; e++) sums[r][e] = 0.0f;
  }
  const int pieces = pieces_in(args.cols);
  for (int piece = int(lane); piece < pieces; piece += kSimdWidth) {
    const int column = Decoder::first_column(piece);
    for (int r = 0; r < kDotRows; r++) {
      const int row = min(first_row + r, args.rows - 1);
      float decoded[kPieceCols];
      Decoder::decode(weights + ulong(row) * ulong(args.row_stride), piece, args.cols, decoded);
      for (int e = 0; e < kDotEntries; e++) {
        if (entries.destination[e] < 0) continue;
        float sum = sums[r][e];
        for (int i = 0; i < kPieceCols; i++) {
          const int at = column + i + (i < kRunCols ? 0 : Decoder::kGap - kRunCols);
          if (at < args.cols) sum = fma(decoded[i], load_input(x, entries.x_row[e] + at), sum);
        }
        sums[r][e] = sum;
      }
    }
  }
  for (int r = 0; r < kDotRows; r++) {
    for (int e = 0; e < kDotEntries; e++) sums[r][e] = simd_sum(sums[r][e]);
  }
}

/// A sum with what follows the product: scale and bias of the expert, where there are any.
inline float finished(thread const WeightArgs& args, device const float* scale,
                      device const float* bias, int expert, int row, float sum) {
  if ((args.flags & kHasScale) != 0) sum *= scale[expert];
  if ((args.flags & kHasBias) != 0) sum += bias[long(expert) * args.rows + row];
  return sum;
}

#pragma once

/// A few weight rows times a few entries, for one simdgroup: the loop of the GEMV kernels.
///
///            cols, in pieces of 32, lane l takes pieces l, l + 32, ...
///   row r    [0][1][2] ... [31][0][1] ...    x  entry e   ->  sum[r][e], in every lane
///
/// A chunk is 32 pieces, one for each lane. Its part of x comes to threadgroup memory once, for all
/// rows of the four simdgroups, in the order in which weights are decoded: what x's type is, where it
/// ends and which columns it lacks is settled there. A piece is decoded once and multiplied with all
/// entries at hand. The order of a sum depends on the row and the number of columns only: an entry
/// gives the same bits alone and in a batch.

#include "decode/formats.h"
#include "rows.h"

/// Rows that a simdgroup has: 4 of a product, or 2 of gate and 2 of up.
constant constexpr int kDotRows = kGemvRows / (kGemvThreads / kSimdWidth);
constant constexpr int kDotEntries = 2;
constant constexpr int kPieceQuads = kPieceCols / 4;
/// Quads from piece to piece in threadgroup memory: odd, so that lanes read different banks.
constant constexpr int kPieceStride = kPieceQuads + 1;
constant constexpr int kChunkQuads = kSimdWidth * kPieceStride;

/// Entries of one segment that are computed together, so that weights are decoded once for them.
struct DotEntries {
  int count;  // those that are not padding; the others repeat entry 0
  device const uchar* x_row[kDotEntries];
  int destination[kDotEntries];
};

inline DotEntries dot_entries(thread const RowMap& map, thread const InputArgs& in,
                              device const uchar* x, int first, int end) {
  DotEntries entries;
  entries.count = 0;
  for (int e = 0; e < kDotEntries; e++) {
    entries.destination[e] = first + e < end ? entry_destination(map, first + e) : -1;
    const bool real = entries.destination[e] >= 0;
    if (real) entries.count = e + 1;
    entries.x_row[e] = real     ? input_row(x, in, entry_source(map, first + e))
                       : e == 0 ? x
                                : entries.x_row[0];
  }
  return entries;
}

/// Weight i of piece number `piece` meets this column in memory.
template <class Decoder>
inline int column_of(int piece, int i) {
  return Decoder::first_column(piece) + i + (i < kRunCols ? 0 : Decoder::kGap - kRunCols);
}

/// What x has for a column in memory; 0 behind its end and for padding.
template <class Decoder>
inline float input_at(thread const WeightArgs& args, device const int* gather,
                      device const uchar* x_row, int column) {
  if (Decoder::kPlainColumns != 0) return load_input(x_row, column);
  int from = column;
  if ((args.flags & kHasGather) != 0) from = gather[column];
  return from >= 0 && from < args.cols ? load_input(x_row, from) : 0.0f;
}

/// Four neighbouring columns.
template <class Decoder>
inline float4 input_quad(thread const WeightArgs& args, device const int* gather,
                         device const uchar* x_row, int column) {
  float4 quad;
  for (int k = 0; k < 4; k++) quad[k] = input_at<Decoder>(args, gather, x_row, column + k);
  return quad;
}

/// The columns of `gather` that are an expert's.
inline device const int* gather_of(thread const WeightArgs& args, device const int* gather,
                                   int expert) {
  return (args.flags & kHasGather) != 0 ? gather + long(expert) * args.gather_stride : gather;
}

/// A run of codes times the columns of x that they meet, which lie in the same order.
inline float run_dot(thread const float* codes, threadgroup const float4* x, int run) {
  float dot = 0.0f;
  for (int quad = 4 * run; quad < 4 * run + 4; quad++) {
    for (int k = 0; k < 4; k++) dot = fma(codes[4 * quad + k], x[quad][k], dot);
  }
  return dot;
}
inline float run_sum(threadgroup const float4* x, int run) {
  float sum = 0.0f;
  for (int quad = 4 * run; quad < 4 * run + 4; quad++) {
    for (int k = 0; k < 4; k++) sum += x[quad][k];
  }
  return sum;
}

/// A piece of a row, which may be the last.
template <class Decoder, class Row>
inline Scales decode_piece(thread const WeightArgs& args, Row row, int piece, thread float* codes) {
  if (Decoder::kWholePieces != 0 || (piece + 1) * kPieceCols <= args.cols) {
    return Decoder::decode(row, piece, args, codes);
  }
  return Decoder::decode_last(row, piece, args, codes);
}

/// sums[r][e] = rows.row[r] times entry e, for the first kEntries. Every simdgroup of the threadgroup
/// comes here.
template <class Decoder, int kEntries, class Rows>
inline void dot_rows(thread const WeightArgs& args, thread const Rows& rows,
                     device const int* gather, thread const DotEntries& entries, uint simdgroup,
                     uint lane, threadgroup float4* staged,
                     thread float (&sums)[kDotRows][kDotEntries]) {
  for (int r = 0; r < kDotRows; r++) {
    for (int e = 0; e < kEntries; e++) sums[r][e] = 0.0f;
  }
  const int thread_index = int(simdgroup) * kSimdWidth + int(lane);
  const int pieces = pieces_in(args.stored_cols);
  for (int first = 0; first < pieces; first += kSimdWidth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // what was staged before has been read
    const int quads = min(pieces - first, int(kSimdWidth)) * kPieceQuads;
    for (int quad = thread_index; quad < quads; quad += kGemvThreads) {
      const int own = quad / kPieceQuads, in_piece = quad % kPieceQuads;
      const int column = column_of<Decoder>(first + own, 4 * in_piece);
      for (int e = 0; e < kEntries; e++) {
        staged[e * kChunkQuads + own * kPieceStride + in_piece] =
            input_quad<Decoder>(args, gather, entries.x_row[e], column);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int piece = first + int(lane);
    if (piece >= pieces) continue;
    threadgroup const float4* in = staged + int(lane) * kPieceStride;
    float x_sums[kEntries][2];
    for (int e = 0; Decoder::kHasMin != 0 && e < kEntries; e++) {
      for (int run = 0; run < 2; run++) x_sums[e][run] = run_sum(in + e * kChunkQuads, run);
    }
    for (int r = 0; r < kDotRows; r++) {
      float codes[kPieceCols];
      const Scales scales = decode_piece<Decoder>(args, rows.row[r], piece, codes);
      for (int e = 0; e < kEntries; e++) {
        for (int run = 0; run < 2; run++) {
          const float dot = run_dot(codes, in + e * kChunkQuads, run);
          sums[r][e] = fma(scales.scale[run], dot, sums[r][e]);
          if (Decoder::kHasMin != 0) {
            sums[r][e] = fma(-scales.min[run], x_sums[e][run], sums[r][e]);
          }
        }
      }
    }
  }
  for (int r = 0; r < kDotRows; r++) {
    for (int e = 0; e < kEntries; e++) sums[r][e] = simd_sum(sums[r][e]);
  }
}

/// dot_rows() for the number of entries that `entries` has.
template <class Decoder, class Rows>
inline void dot_entries_with(thread const WeightArgs& args, thread const Rows& rows,
                             device const int* gather, thread const DotEntries& entries,
                             uint simdgroup, uint lane, threadgroup float4* staged,
                             thread float (&sums)[kDotRows][kDotEntries]) {
  if (entries.count == 1) {
    dot_rows<Decoder, 1>(args, rows, gather, entries, simdgroup, lane, staged, sums);
  } else {
    dot_rows<Decoder, kDotEntries>(args, rows, gather, entries, simdgroup, lane, staged, sums);
  }
}

/// Rows of one role, or of gate and up, in a form that the loop takes.
template <class Decoder>
struct DotRows {
  typename Decoder::Row row[kDotRows];
};

/// A sum with what follows the product: scale and bias of the expert, where there are any.
inline float finished(thread const WeightArgs& args, device const float* scale,
                      device const float* bias, int expert, int row, float sum) {
  if ((args.flags & kHasScale) != 0) sum *= scale[expert];
  if ((args.flags & kHasBias) != 0) sum += bias[long(expert) * args.rows + row];
  return sum;
}

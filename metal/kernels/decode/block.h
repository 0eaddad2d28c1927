#pragma once

/// What the decoders share. A decoder D of a format is a struct with
///
///   D::kGap      a piece is two runs of 16 columns, kGap apart, that lie in the same bytes
///   D::Row                                what finds the bytes of one row
///   D::row_at(args, expert, row)          of row `row` of the expert at `expert`
///   D::first_column(piece)                column where piece number `piece` of a row begins
///   D::decode(row, piece, args, codes)    its 32 codes in f32: run 0, then run 1; returns their scales
///
/// so that loops ask for 32 weights at a time, every byte is read once, and a sum is scaled once for 16
/// weights. A weight is scale * code - min of its run; min is 0 where kHasMin is. A row has (stored_cols + 31)
/// / 32 pieces. Where kWholePieces is 0 the last one may be short: decode_last fills it up with zeros.
/// Where kPlainColumns is 0 not every column in memory is one of x. Weights are as aligned as their
/// quant block: to 2 bytes (F32, INT4: 4), or to 1 for MXFP4. Layouts are those of GGUF (ggml's block
/// structs), INT4 apart. Within a row offsets have 32 bits.

#include "../device.h"

constant constexpr int kPieceCols = 32;
constant constexpr int kRunCols = 16;

inline int pieces_in(int cols) { return (cols + kPieceCols - 1) / kPieceCols; }

/// Scales and minima of a piece, one of each for either of its two runs.
struct Scales {
  float scale[2];
  float min[2];
};
inline Scales two_scales(float first, float second) {
  const Scales s = {{first, second}, {0.0f, 0.0f}};
  return s;
}
inline Scales same_scale(float scale) { return two_scales(scale, scale); }
inline Scales with_min(float scale, float min) {
  const Scales s = {{scale, scale}, {min, min}};
  return s;
}

/// Rows as they lie in a file.
struct StoredRows {
  enum { kWholePieces = 1, kPlainColumns = 1, kHasMin = 0 };
  typedef device const uchar* Row;

  static Row row_at(thread const WeightArgs& args, device const uchar* expert, int row) {
    return expert + ulong(row) * ulong(args.row_stride);
  }
  static Scales decode_last(Row, int, thread const WeightArgs&, thread float*) {
    return same_scale(0.0f);
  }
};

/// Loads two bytes from an even address.
inline uint load_pair(device const uchar* p) { return *(device const ushort*)p; }
/// Loads four of them.
inline uint load_word(device const uchar* p) { return load_pair(p) | load_pair(p + 2) << 16; }
inline float load_half(device const uchar* p) { return float(*(device const half*)p); }

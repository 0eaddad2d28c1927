#pragma once

#include "block.h"

/// INT4: groups of GPTQ and AWQ in the panels of 16 rows that the host makes (cpp/src/int4/README.md),
/// weight = (code - zero) * scale. A panel is records of 256 columns, the last one maybe of fewer pieces:
/// 256 bytes of nibbles per piece, then the scales (f16 or f32) and zero points (u8, or all 8) of each
/// scale group of scale_cols columns, 16 rows side by side, then padding to a multiple of 64 bytes.
/// Bytes 64 v .. of a piece have columns 4 v .. of its rows, 4 bytes each: columns of run 0 in the low
/// nibbles, of run 1 in the high ones.
struct DecodeInt4 {
  enum { kGap = 16, kWholePieces = 1, kPlainColumns = 0, kHasMin = 0 };
  enum { kPanelRows = 16, kRecordPieces = 8, kPieceBytes = 256 };
  struct Row {
    device const uchar* panel;
    uint lane;  // of the rows of the panel
  };

  static Row row_at(thread const WeightArgs& args, device const uchar* expert, int row) {
    const Row at = {expert + ulong(row / kPanelRows) * ulong(args.row_stride),
                    uint(row % kPanelRows)};
    return at;
  }
  static int first_column(int piece) { return piece * kPieceCols; }

  static Scales decode(Row row, int piece, thread const WeightArgs& args, thread float* codes) {
    const uint scale_pieces = uint(args.scale_cols) / kPieceCols;
    const uint scale_bytes = (args.flags & kInt4ScaleF32) != 0 ? 4 : 2;
    const uint row_bytes = scale_bytes + ((args.flags & kInt4HasZeros) != 0 ? 1 : 0);
    // Every record before this one is a whole one, of this size.
    const uint groups = kRecordPieces / scale_pieces;
    const uint record_bytes =
        (kRecordPieces * kPieceBytes + groups * kPanelRows * row_bytes + 63) / 64 * 64;
    const uint number = uint(piece) / kRecordPieces, in_record = uint(piece) % kRecordPieces;
    device const uchar* record = row.panel + number * record_bytes;
    const uint left = uint(args.stored_cols) / kPieceCols - number * kRecordPieces;
    const uint pieces = left < kRecordPieces ? left : uint(kRecordPieces);
    device const uchar* scales = record + pieces * kPieceBytes;
    const uint at = in_record / scale_pieces * kPanelRows + row.lane;
    const float scale = (args.flags & kInt4ScaleF32) != 0 ? ((device const float*)scales)[at]
                                                          : float(((device const half*)scales)[at]);
    const uint own_groups = (pieces + scale_pieces - 1) / scale_pieces;
    const int zero = (args.flags & kInt4HasZeros) != 0
                         ? int(scales[own_groups * kPanelRows * scale_bytes + at])
                         : 8;
    device const uchar* nibbles = record + in_record * kPieceBytes + 4 * row.lane;
    for (int v = 0; v < 4; v++) {
      const uint four = *(device const uint*)(nibbles + 64 * v);
      for (int k = 0; k < 4; k++) {
        codes[4 * v + k] = float(int(four >> (8 * k) & 15) - zero);
        codes[kRunCols + 4 * v + k] = float(int(four >> (8 * k + 4) & 15) - zero);
      }
    }
    return same_scale(scale);
  }
  static Scales decode_last(Row, int, thread const WeightArgs&, thread float*) {
    return same_scale(0.0f);
  }
};

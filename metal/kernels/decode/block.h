#pragma once

/// What the decoders share. A decoder D of a format is a struct with
///
///   D::kGap      a piece is two runs of 16 columns, kGap apart, that lie in the same bytes
///   D::first_column(piece)                column where piece number `piece` of a row begins
///   D::decode(row, piece, cols, weights)  its 32 weights in f32: run 0, then run 1
///
/// so that loops ask for 32 weights at a time and every byte is read once. Rows have `cols`
/// columns, in (cols + 31) / 32 pieces; only F16, BF16 and F32 may end inside a piece. Weights are as
/// aligned as their quant block: to 2 bytes (F32: 4), or to 1 for MXFP4. Layouts are those of GGUF
/// (ggml's block structs).

#include "../device.h"

constant constexpr int kPieceCols = 32;
constant constexpr int kRunCols = 16;

inline int pieces_in(int cols) { return (cols + kPieceCols - 1) / kPieceCols; }

/// Loads two bytes from an even address.
inline uint load_pair(device const uchar* p) { return *(device const ushort*)p; }
inline float load_half(device const uchar* p) { return float(*(device const half*)p); }

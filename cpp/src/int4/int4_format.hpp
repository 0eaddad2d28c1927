#pragma once

/// How INT4 group weights lie in a panel of 16 rows.
///
/// A panel is a sequence of records of 256 packed columns; the last one may have fewer steps of 32
/// columns. A record of n steps holds, one behind the other and rounded up to whole cache lines,
///
///   nibbles  [n][4][16 rows][4 bytes]      vector v of a step: columns 4v .. 4v + 3 in the low
///                                          nibbles, 16 + 4v .. 16 + 4v + 3 in the high ones
///   scales   [scale groups][16 rows]       f16 or f32
///   zeros    [scale groups][16 rows]       u8; left out when every zero point is 8
///
/// A scale group is scale_cols columns (32, 64, 128 or 256) of one group of the checkpoint.
///
/// Everything here has internal linkage: each instruction set compiles its own copy.

#include <cstdint>

namespace moesaic::int4 {
namespace {

/// What the bytes of a record depend on besides its number of steps; as in Int4Format.
struct Int4Layout {
  int scale_cols = 32;
  bool scale_f32 = false;
  bool zeros = false;
};

constexpr int kInt4Rows = 16;
constexpr int kInt4RecordCols = 256;
constexpr int kInt4StepCols = 32;
constexpr int kInt4StepBytes = kInt4Rows * kInt4StepCols / 2;

/// Scale groups of a record of `steps` steps; the last one may be cut short.
[[maybe_unused]] constexpr int int4_scale_groups(const Int4Layout& layout, int steps) {
  return (steps * kInt4StepCols + layout.scale_cols - 1) / layout.scale_cols;
}

/// Where the scales start in a record, in bytes.
[[maybe_unused]] constexpr int int4_scales_at(int steps) { return steps * kInt4StepBytes; }

/// Where the zero points start in a record, in bytes.
[[maybe_unused]] constexpr int int4_zeros_at(const Int4Layout& layout, int steps) {
  return int4_scales_at(steps) +
         int4_scale_groups(layout, steps) * kInt4Rows * (layout.scale_f32 ? 4 : 2);
}

/// Bytes of a record of `steps` steps.
[[maybe_unused]] constexpr int int4_record_bytes(const Int4Layout& layout, int steps) {
  const int end = int4_zeros_at(layout, steps) +
                  (layout.zeros ? int4_scale_groups(layout, steps) * kInt4Rows : 0);
  return (end + 63) / 64 * 64;
}

/// Steps of record `record` of a row of `cols` packed columns.
[[maybe_unused]] constexpr int int4_steps(std::int64_t cols, std::int64_t record) {
  const std::int64_t left = (cols - record * kInt4RecordCols) / kInt4StepCols;
  return static_cast<int>(left < 8 ? left : 8);
}

/// Bytes from one panel to the next; `cols` is a multiple of 32.
[[maybe_unused]] constexpr std::int64_t int4_panel_bytes(const Int4Layout& layout,
                                                         std::int64_t cols) {
  const int rest = static_cast<int>(cols % kInt4RecordCols) / kInt4StepCols;
  return cols / kInt4RecordCols * int4_record_bytes(layout, 8) +
         (rest > 0 ? int4_record_bytes(layout, rest) : 0);
}

/// The byte of a record that holds column `col` of row `row`; columns 16 .. 31 of a step are in its
/// high nibble (int4_shift).
[[maybe_unused]] constexpr int int4_byte(int col, int row) {
  return col / kInt4StepCols * kInt4StepBytes + col % 16 / 4 * 64 + row * 4 + col % 4;
}
[[maybe_unused]] constexpr int int4_shift(int col) { return col % kInt4StepCols >= 16 ? 4 : 0; }

}  // namespace
}  // namespace moesaic::int4

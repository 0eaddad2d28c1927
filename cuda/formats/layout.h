#pragma once

/// Where the bytes of a packed expert lie: plain arithmetic, one for the packer, the launchers and
/// the kernels.
///
/// One expert is one run of bytes:
///
///   codes   [row block][unit][unit_bytes]
///   scales  [row block][span][span_bytes]
///
/// A row block is 16 packed rows, a unit 64 columns of them, a span the units that share a scale
/// record (a block of 256 columns of the K types, a scale group of INT4). Rows are padded to whole
/// row blocks and columns to whole units, with zero bytes. Within a scale record the values of rows
/// g and g + 8 lie side by side, in the order of g, so that the lanes 4g .. 4g + 3 of a warp read
/// theirs as one word.

#include "moesaic/operands.hpp"

namespace moesaic::cuda {

inline constexpr int kUnitRows = 16;
inline constexpr int kUnitCols = 64;
inline constexpr int32_t kInt4Type = 240;  ///< value of moesaic::QuantType::INT4
inline constexpr int kInt4UnitBytes = kUnitRows * kUnitCols / 2;

/// A scale record has, for each row, `span_halves` f16 values for the whole span, then for each
/// unit `unit_values` values of `value_bytes`.
struct ScaleLayout {
  int span_units;
  int span_halves;
  int unit_values;
  int value_bytes;

  constexpr int unit_at(int unit) const {
    return 2 * kUnitRows * span_halves + unit * kUnitRows * unit_values * value_bytes;
  }
  constexpr int span_bytes() const { return unit_at(span_units); }
};

inline constexpr ScaleLayout kNoScale{1, 0, 0, 0};
inline constexpr ScaleLayout kScale32{1, 0, 2, 2};     ///< f16 d per 32 columns
inline constexpr ScaleLayout kScaleMin32{1, 0, 4, 2};  ///< f16 d, f16 m per 32
inline constexpr ScaleLayout kByte32{1, 0, 2, 1};      ///< a byte per 32
inline constexpr ScaleLayout kByte16{1, 0, 4, 1};      ///< a byte per 16
/// f16 d and dmin per span; a byte of scale per 32 columns, then one of minimum.
inline constexpr ScaleLayout kSuperScaleMin32{4, 2, 4, 1};
/// f16 d and dmin per span, a byte with scale and minimum per 16 columns.
inline constexpr ScaleLayout kSuperScaleMin16{4, 2, 4, 1};
inline constexpr ScaleLayout kSuperScale32{4, 1, 2, 1};  ///< f16 d; a byte per 32
inline constexpr ScaleLayout kSuperScale16{4, 1, 4, 1};  ///< f16 d; a byte per 16

/// Columns side by side of which a lane multiplies codes by x: as many as 16 bytes of bf16 hold, or
/// half of that where a scale group has 16 columns, which the four lanes of a row then share.
constexpr int lane_cols(int32_t type) {
  constexpr int32_t kQ2K = 10, kQ3K = 11, kQ6K = 14, kNvfp4 = 40;
  return type == kQ2K || type == kQ3K || type == kQ6K || type == kNvfp4 ? 4 : 8;
}

struct FormatRow {
  int32_t type;      ///< value of moesaic::QuantType
  const char* name;  ///< lower case
  int unit_bytes;
  ScaleLayout scale;
};

inline constexpr FormatRow kFormats[] = {
#define MOESAIC_FORMAT(TYPE, value, name, unit_bytes, scale) {value, #name, unit_bytes, scale},
#include "formats.inc"
#undef MOESAIC_FORMAT
};

/// Null for types without a decoder, and for INT4, whose scales are no constants.
constexpr const FormatRow* find_format(int32_t type) {
  for (const FormatRow& row : kFormats) {
    if (row.type == type) return &row;
  }
  return nullptr;
}

/// What the bytes of an expert depend on.
struct PackedFacts {
  int32_t type;
  UnitHalf half;
  int64_t rows;    ///< rows of one role
  int64_t cols;    ///< INT4: packed_cols
  int scale_cols;  ///< this and the next two for INT4 only: 32, 64, 128 or 256
  bool scale_f32;
  bool zeros;
};

struct PackedLayout {
  int unit_bytes;
  int span_units;  ///< a power of two
  int span_bytes;
  int64_t row_blocks;
  int64_t units;              ///< units of a row block
  int64_t code_block_bytes;   ///< codes of a row block
  int64_t scale_block_bytes;  ///< scales of a row block
  int64_t scales_at;          ///< from the start of the expert
  int64_t expert_bytes;       ///< a multiple of 128
};

constexpr int64_t blocks_of(int64_t value, int64_t size) { return (value + size - 1) / size; }

/// An INT4 scale record: scales [scale groups][16 rows] in f16 or f32, then zero points [scale
/// groups][16 rows] in u8. A unit has two scale groups when they are 32 columns wide, else a span
/// has one.
constexpr int int4_scale_groups(int scale_cols) { return scale_cols < kUnitCols ? 2 : 1; }
constexpr int int4_zeros_at(int scale_groups, bool scale_f32) {
  return scale_groups * kUnitRows * (scale_f32 ? 4 : 2);
}

constexpr PackedLayout packed_layout(const PackedFacts& facts) {
  PackedLayout layout{};
  if (facts.type == kInt4Type) {
    const int scale_groups = int4_scale_groups(facts.scale_cols);
    layout.unit_bytes = kInt4UnitBytes;
    layout.span_units = facts.scale_cols < kUnitCols ? 1 : facts.scale_cols / kUnitCols;
    layout.span_bytes =
        int4_zeros_at(scale_groups, facts.scale_f32) + (facts.zeros ? scale_groups * kUnitRows : 0);
  } else {
    const FormatRow& row = *find_format(facts.type);
    layout.unit_bytes = row.unit_bytes;
    layout.span_units = row.scale.span_units;
    layout.span_bytes = row.scale.span_bytes();
  }
  const int rows_per_block = facts.half == UnitHalf::Alone ? kUnitRows : kUnitRows / 2;
  layout.row_blocks = blocks_of(facts.rows, rows_per_block);
  layout.units = blocks_of(facts.cols, kUnitCols);
  layout.code_block_bytes = layout.units * layout.unit_bytes;
  layout.scale_block_bytes = blocks_of(layout.units, layout.span_units) * layout.span_bytes;
  layout.scales_at = layout.row_blocks * layout.code_block_bytes;
  layout.expert_bytes =
      blocks_of(layout.scales_at + layout.row_blocks * layout.scale_block_bytes, 128) * 128;
  return layout;
}

}  // namespace moesaic::cuda

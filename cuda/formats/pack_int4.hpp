#pragma once

/// Reads the INT4 panels of a Marlin stack as codes and scales of units.

#include <cstdint>

#include "layout.h"
#include "moesaic/expert_stack.hpp"

namespace moesaic::cuda {

/// Codes and scales of rows in INT4 panels: one of the two sources that pack_rows takes.
class Int4Rows {
 public:
  explicit Int4Rows(const WeightRef& panels)
      : layout_(packed_layout({.type = kInt4Type,
                               .half = UnitHalf::Alone,
                               .rows = panels.rows,
                               .cols = panels.int4.packed_cols,
                               .scale_cols = panels.int4.scale_cols,
                               .scale_f32 = panels.int4.scale_f32,
                               .zeros = panels.int4.zeros})) {}

  /// Writes the 64 codes of one row in unit `unit`; those behind the last column are left alone.
  void codes(const WeightRef& panels, std::int32_t expert, std::int64_t row, std::int64_t unit,
             std::uint32_t* to) const;
  /// Writes scales and zero points of one row, which is row `unit_row` of its units.
  void scales(const WeightRef& panels, std::int32_t expert, std::int64_t row, int unit_row,
              std::uint8_t* block) const;

 private:
  PackedLayout layout_;
};

/// The weight that has this code in packed column `col`; `scales` are those of the row block.
float read_int4_value(const Int4Format& format, const PackedLayout& layout,
                      const std::uint8_t* scales, int unit_row, std::int64_t col,
                      std::uint32_t code);

}  // namespace moesaic::cuda

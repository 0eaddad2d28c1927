#pragma once

/// INT4 panels of a Marlin stack as codes and scales of units.

#include <cstdint>

#include "layout.h"
#include "moesaic/expert_stack.hpp"

namespace moesaic::cuda {

class Int4Rows {
 public:
  explicit Int4Rows(const WeightRef& panels)
      : layout_(packed_layout({.type = kInt4Type,
                               .half = kAlone,
                               .rows = panels.rows,
                               .cols = panels.int4.packed_cols,
                               .scale_cols = panels.int4.scale_cols,
                               .scale_f32 = panels.int4.scale_f32,
                               .zeros = panels.int4.zeros})) {}

  /// Codes of one row in unit `unit`; [64], those behind the last column are left alone.
  void codes(const WeightRef& panels, std::int32_t expert, std::int64_t row, std::int64_t unit,
             std::uint32_t* to) const;
  /// Scales and zero points of one row, which is row `unit_row` of its units.
  void scales(const WeightRef& panels, std::int32_t expert, std::int64_t row, int unit_row,
              std::uint8_t* block) const;

 private:
  PackedLayout layout_;
};

/// The weight with this code in packed column `col`, by the row block's scales.
float read_int4_value(const Int4Format& format, const PackedLayout& layout,
                      const std::uint8_t* scales, int unit_row, std::int64_t col,
                      std::uint32_t code);

}  // namespace moesaic::cuda

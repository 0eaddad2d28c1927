#pragma once

/// INT4 panels of the CPU kernels (int4/int4_format.hpp): filled from a checkpoint, and read back.

#include <cstdint>

#include "int4/checkpoint.hpp"
#include "int4/columns.hpp"

namespace moesaic::int4 {

/// Bytes from one panel to the next.
std::int64_t panel_bytes(const Int4Format& format);

/// Says of `ref`, which has rows and columns, how its panels lie; all but their memory and `gather`.
void describe_panels(WeightRef& ref, const ColumnOrder& order, std::int64_t group_size,
                     std::int64_t groups, bool scale_f32, bool zeros);

/// The columns of `reader` are rows [first_row, first_row + reader.n()) of an expert, whose panels
/// start at `expert`; writes those of them that lie in panel number `panel`. `column` and `group`
/// are the expert's part of a ColumnOrder.
void write_panel(const LinearReader& reader, const Int4Format& format, const std::int32_t* column,
                 const std::int32_t* group, std::int64_t first_row, std::int64_t panel,
                 std::byte* expert);

/// Copies row `from_row` of an expert at `from` to row `to_row` of one at `to`, bit for bit.
void copy_row(const Int4Format& format, const std::byte* from, std::int64_t from_row, std::byte* to,
              std::int64_t to_row);

/// What a panel holds of one weight.
struct Int4Value {
  int code;
  int zero;
  float scale;
  float value() const { return static_cast<float>(code - zero) * scale; }
};
Int4Value read_panel(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                     std::int64_t packed_col);

/// dequantize_expert_row (expert_stack.hpp) for an INT4 role.
void dequantize_int4_row(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                         float* out);

}  // namespace moesaic::int4

#include "cuda/formats/pack_int4.hpp"

#include <cstring>

#include "int4/int4_format.hpp"
#include "int4/panels.hpp"

namespace moesaic::cuda {
namespace {

/// Where the scale and the zero point of a column lie, in bytes from the start of a row block's
/// scales.
struct ScalePosition {
  std::int64_t scale, zero;
};
ScalePosition scale_position(const Int4Format& format, const PackedLayout& layout, int unit_row,
                             std::int64_t col) {
  const int scale_groups = int4_scale_groups(format.scale_cols);
  const std::int64_t record = col / (kUnitCols * layout.span_units) * layout.span_bytes;
  const std::int64_t scale_group = scale_groups == 2 ? col % kUnitCols / 32 : 0;
  const std::int64_t value = scale_group * kUnitRows + unit_row % 8 * 2 + unit_row / 8;
  return {record + value * (format.scale_f32 ? 4 : 2),
          record + int4_zeros_at(scale_groups, format.scale_f32) + value};
}

}  // namespace

void Int4Rows::codes(const WeightRef& panels, std::int32_t expert, std::int64_t row,
                     std::int64_t unit, std::uint32_t* to) const {
  const int4::Int4Layout format{panels.int4.scale_cols, panels.int4.scale_f32, panels.int4.zeros};
  const std::int64_t first = unit * kUnitCols;  // units never straddle records
  const std::byte* record = panels.expert(expert) + row / int4::kInt4Rows * panels.row_stride +
                            first / int4::kInt4RecordCols * int4::int4_record_bytes(format, 8);
  for (std::int64_t col = first; col < first + kUnitCols && col < panels.int4.packed_cols;
       col += int4::kInt4StepCols, to += int4::kInt4StepCols) {
    for (int i = 0; i < int4::kInt4StepCols / 2; ++i) {
      const int at = int4::int4_byte(static_cast<int>(col % int4::kInt4RecordCols) + i,
                                     static_cast<int>(row % int4::kInt4Rows));
      const auto pair = static_cast<std::uint32_t>(record[at]);
      to[i] = pair & 15U;
      to[int4::kInt4StepCols / 2 + i] = pair >> 4;
    }
  }
}

void Int4Rows::scales(const WeightRef& panels, std::int32_t expert, std::int64_t row, int unit_row,
                      std::uint8_t* block) const {
  const Int4Format& format = panels.int4;
  for (std::int64_t col = 0; col < format.packed_cols; col += int4::kInt4StepCols) {
    const int4::Int4Value value = int4::read_panel(panels, expert, row, col);
    const ScalePosition at = scale_position(format, layout_, unit_row, col);
    if (format.scale_f32) {
      std::memcpy(block + at.scale, &value.scale, 4);
    } else {
      const std::uint16_t bits = f32_to_f16(value.scale);
      std::memcpy(block + at.scale, &bits, 2);
    }
    if (format.zeros) block[at.zero] = static_cast<std::uint8_t>(value.zero);
  }
}

float read_int4_value(const Int4Format& format, const PackedLayout& layout,
                      const std::uint8_t* scales, int unit_row, std::int64_t col,
                      std::uint32_t code) {
  const ScalePosition at = scale_position(format, layout, unit_row, col);
  int4::Int4Value value{};
  value.code = static_cast<int>(code);
  value.zero = format.zeros ? scales[at.zero] : 8;
  if (format.scale_f32) {
    std::memcpy(&value.scale, scales + at.scale, 4);
  } else {
    std::uint16_t bits;
    std::memcpy(&bits, scales + at.scale, 2);
    value.scale = f16_to_f32(bits);
  }
  return value.value();
}

}  // namespace moesaic::cuda

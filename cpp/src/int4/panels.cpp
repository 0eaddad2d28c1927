#include "int4/panels.hpp"

#include <algorithm>
#include <cstring>

#include "int4/int4_format.hpp"

namespace moesaic::int4 {
namespace {

Int4Layout layout_of(const Int4Format& format) {
  return {format.scale_cols, format.scale_f32, format.zeros};
}

/// The columns of a reader that lie in one panel: [first, first + count), in lanes (rows of the
/// panel) [lane, lane + count).
struct Lanes {
  int lane, count;
  std::int64_t first;
};

void write_codes(const LinearReader& reader, const std::int32_t* column, int steps, const Lanes& at,
                 std::byte* record) {
  for (int vector = 0; vector < steps * 4; ++vector) {
    // Word r holds four columns of row r in the low nibbles of its bytes and four in the high ones.
    std::uint32_t words[kInt4Rows] = {};
    for (int i = 0; i < 8; ++i) {
      const std::int32_t k = column[vector / 4 * 32 + vector % 4 * 4 + i / 4 * 16 + i % 4];
      if (k < 0) continue;
      std::uint32_t codes[kInt4Rows];
      reader.codes(k, at.first, at.count, codes);
      const int shift = i % 4 * 8 + i / 4 * 4;
      for (int r = 0; r < at.count; ++r) words[r] |= codes[r] << shift;
    }
    std::memcpy(record + vector * 64 + at.lane * 4, words, static_cast<std::size_t>(at.count) * 4);
  }
}

void write_scales(const LinearReader& reader, const Int4Layout& layout, const std::int32_t* group,
                  int steps, const Lanes& at, std::byte* record) {
  for (int scale_group = 0; scale_group < int4_scale_groups(layout, steps); ++scale_group) {
    if (group[scale_group] < 0) continue;
    for (int r = 0; r < at.count; ++r) {
      const int index = scale_group * kInt4Rows + at.lane + r;
      const float scale = reader.scale(group[scale_group], at.first + r);
      if (layout.scale_f32) {
        std::memcpy(record + int4_scales_at(steps) + index * 4, &scale, 4);
      } else {
        const std::uint16_t half = f32_to_f16(scale);
        std::memcpy(record + int4_scales_at(steps) + index * 2, &half, 2);
      }
      if (layout.zeros) {
        record[int4_zeros_at(layout, steps) + index] =
            static_cast<std::byte>(reader.zero(group[scale_group], at.first + r));
      }
    }
  }
}

}  // namespace

std::int64_t panel_bytes(const Int4Format& format) {
  return int4_panel_bytes(layout_of(format), format.packed_cols);
}

void describe_panels(WeightRef& ref, const ColumnOrder& order, std::int64_t group_size,
                     std::int64_t groups, bool scale_f32, bool zeros) {
  ref.type = QuantType::INT4;
  ref.layout = WeightLayout::Panels;
  ref.int4.group_size = group_size;
  ref.int4.groups = groups;
  ref.int4.packed_cols = order.packed_cols;
  ref.int4.scale_cols = order.scale_cols;
  ref.int4.scale_f32 = scale_f32;
  ref.int4.zeros = zeros;
  ref.row_stride = panel_bytes(ref.int4);
  ref.expert_stride = (ref.rows + kInt4Rows - 1) / kInt4Rows * ref.row_stride;
}

void write_panel(const LinearReader& reader, const Int4Format& format, const std::int32_t* column,
                 const std::int32_t* group, std::int64_t first_row, std::int64_t panel,
                 std::byte* expert) {
  const std::int64_t begin = std::max(first_row, panel * kInt4Rows);
  const std::int64_t end = std::min(first_row + reader.n(), (panel + 1) * kInt4Rows);
  const Lanes at{static_cast<int>(begin % kInt4Rows), static_cast<int>(end - begin),
                 begin - first_row};
  const Int4Layout layout = layout_of(format);
  std::byte* record = expert + panel * panel_bytes(format);
  for (std::int64_t r = 0; r * kInt4RecordCols < format.packed_cols; ++r) {
    const int steps = int4_steps(format.packed_cols, r);
    write_codes(reader, column + r * kInt4RecordCols, steps, at, record);
    write_scales(reader, layout, group + r * (kInt4RecordCols / layout.scale_cols), steps, at,
                 record);
    record += int4_record_bytes(layout, steps);
  }
}

void copy_row(const Int4Format& format, const std::byte* from, std::int64_t from_row, std::byte* to,
              std::int64_t to_row) {
  const Int4Layout layout = layout_of(format);
  const std::int64_t from_lane = from_row % kInt4Rows, to_lane = to_row % kInt4Rows;
  from += from_row / kInt4Rows * panel_bytes(format);
  to += to_row / kInt4Rows * panel_bytes(format);
  // Copies this row's piece of `count` runs from byte `at` on; a run has one piece for each of 16
  // rows.
  const auto copy = [&](std::int64_t at, int count, std::int64_t bytes) {
    for (int i = 0; i < count; ++i, at += kInt4Rows * bytes) {
      std::memcpy(to + at + to_lane * bytes, from + at + from_lane * bytes,
                  static_cast<std::size_t>(bytes));
    }
  };
  for (std::int64_t r = 0; r * kInt4RecordCols < format.packed_cols; ++r) {
    const int steps = int4_steps(format.packed_cols, r);
    const int scale_groups = int4_scale_groups(layout, steps);
    copy(0, steps * 4, 4);
    copy(int4_scales_at(steps), scale_groups, layout.scale_f32 ? 4 : 2);
    if (layout.zeros) copy(int4_zeros_at(layout, steps), scale_groups, 1);
    from += int4_record_bytes(layout, steps);
    to += int4_record_bytes(layout, steps);
  }
}

Int4Value read_panel(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                     std::int64_t packed_col) {
  const Int4Layout layout = layout_of(weight.int4);
  const std::int64_t r = packed_col / kInt4RecordCols;
  const int col = static_cast<int>(packed_col % kInt4RecordCols);
  const int lane = static_cast<int>(row % kInt4Rows);
  const int steps = int4_steps(weight.int4.packed_cols, r);
  const std::byte* record = weight.expert(expert) + row / kInt4Rows * weight.row_stride +
                            r * int4_record_bytes(layout, 8);
  const int index = col / layout.scale_cols * kInt4Rows + lane;
  Int4Value v{};
  v.code = static_cast<int>(record[int4_byte(col, lane)]) >> int4_shift(col) & 15;
  v.zero = layout.zeros ? static_cast<int>(record[int4_zeros_at(layout, steps) + index])
                        : LinearReader::kSymmetricZero;
  const std::byte* scale = record + int4_scales_at(steps);
  if (layout.scale_f32) {
    std::memcpy(&v.scale, scale + index * 4, 4);
  } else {
    std::uint16_t half;
    std::memcpy(&half, scale + index * 2, 2);
    v.scale = f16_to_f32(half);
  }
  return v;
}

void dequantize_int4_row(const WeightRef& weight, std::int32_t expert, std::int64_t row,
                         float* out) {
  const std::int32_t* gather = weight.int4.gather_of(expert);
  for (std::int64_t j = 0; j < weight.int4.packed_cols; ++j) {
    const std::int64_t col = gather != nullptr ? gather[j] : j;
    if (col >= 0) out[col] = read_panel(weight, expert, row, j).value();
  }
}

}  // namespace moesaic::int4

#pragma once

/// Rows between f32, f16 and bf16; bit for bit as f16_to_f32 and its siblings in types.hpp.

#include <cstdint>

#include "moesaic/operands.hpp"

namespace moesaic::cpu {

/// `count` elements of `dtype` (f32, f16 or bf16) from element `offset` of `data`.
void to_f32(const void* data, DType dtype, std::int64_t offset, std::int64_t count, float* out);
void from_f32(const float* values, std::int64_t count, DType dtype, void* data,
              std::int64_t offset);

/// Columns [first, first + count) of a row.
inline void row_to_f32(const InputRows& rows, std::int64_t row, std::int64_t first,
                       std::int64_t count, float* out) {
  to_f32(rows.data, rows.dtype, rows.element_offset(row) + first, count, out);
}

}  // namespace moesaic::cpu

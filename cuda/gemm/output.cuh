// What becomes of a finished product: row factor, expert scale and bias, activation, store.
#pragma once

#include "device.cuh"
#include "formats/layout.h"
#include "ops/activation.cuh"
#include "ops/rows.cuh"
#include "plugin.h"

namespace moesaic::cuda {

// Rows of a unit that leave the kernel.
inline constexpr int32_t kAllRows = 0;     // 16 rows of one role
inline constexpr int32_t kFirstRows = 1;   // the first half of a shared unit
inline constexpr int32_t kSecondRows = 2;  // the second half
inline constexpr int32_t kPairs = 3;       // both halves, as gate and up of an activation

MOESAIC_DEV float load_as(int32_t dtype, const void* data, int64_t at) {
  return dtype == kF32   ? load_element<kF32>(data, at)
         : dtype == kF16 ? load_element<kF16>(data, at)
                         : load_element<kBF16>(data, at);
}
MOESAIC_DEV void store_as(int32_t dtype, void* data, int64_t at, float value) {
  if (dtype == kF32) {
    store_element<kF32>(data, at, value);
  } else if (dtype == kF16) {
    store_element<kF16>(data, at, value);
  } else {
    store_element<kBF16>(data, at, value);
  }
}
// The value as it would be after a store and a load.
MOESAIC_DEV float rounded_to(int32_t dtype, float value) {
  return dtype == kF32   ? value
         : dtype == kF16 ? dev::f16_to_f32(dev::f32_to_f16(value))
                         : dev::bf16_to_f32(dev::f32_to_bf16(value));
}

// y = value * scale[e] + bias[e, row]
struct RoleOutput {
  const float* scale;
  const float* bias;

  MOESAIC_DEV float finish(float value, int expert, int64_t rows, int64_t row) const {
    if (scale != nullptr) value *= scale[expert];
    if (bias != nullptr) value += bias[expert * rows + row];
    return value;
  }
};

struct OutputArgs {
  void* data;    // [limit, rows], dense
  int64_t rows;  // of a role
  int32_t dtype;
  int32_t select;     // kAllRows ..
  int32_t activated;  // not 0: `activation` is applied
  ActivationArgs activation;
  const float* row_weight;  // [limit] factors of the products by destination, or null
  const float* gate_rows;   // [limit, rows]: gate of an earlier pass, or null
  RoleOutput first;         // of the only role, or of the gate of pairs
  RoleOutput second;        // of the up of pairs

  // Output rows of a row block.
  MOESAIC_DEV int block_rows() const { return select == kAllRows ? kUnitRows : kUnitRows / 2; }

  // Stores output row `r` of row block `row_block`, given value(unit row).
  template <class Value>
  MOESAIC_DEV void store(int expert, int row_block, int r, int64_t destination,
                         const Value& value) const {
    const int64_t row = static_cast<int64_t>(row_block) * block_rows() + r;
    if (row >= rows) return;
    const int64_t at = destination * rows + row;
    const float factor = row_weight != nullptr ? row_weight[destination] : 1.0F;
    float y = first.finish(factor * value(select == kSecondRows ? r + kUnitRows / 2 : r), expert,
                           rows, row);
    if (select == kPairs) {
      y = activate(activation, y,
                   second.finish(factor * value(r + kUnitRows / 2), expert, rows, row));
    } else if (activated != 0) {
      y = activate(activation, gate_rows != nullptr ? gate_rows[at] : 0.0F, y);
    }
    store_as(dtype, data, at, y);
  }
};

}  // namespace moesaic::cuda

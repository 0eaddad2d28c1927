// What becomes of a finished product: row factor, expert scale and bias, activation, store.
#pragma once

#include "device.cuh"
#include "formats/layout.h"
#include "ops/activation.cuh"
#include "ops/rows.cuh"
#include "plugin.h"

namespace moesaic::cuda {

// Which rows of a unit the kernel stores.
enum class Select : uint8_t {
  All,     // 16 rows of one role
  First,   // the first half of a shared unit
  Second,  // the second half
  Pairs,   // both halves, as gate and up of an activation
};

MOESAIC_DEV float load_as(DType dtype, const void* data, int64_t at) {
  return dtype == DType::F32   ? load_element<DType::F32>(data, at)
         : dtype == DType::F16 ? load_element<DType::F16>(data, at)
                               : load_element<DType::BF16>(data, at);
}
MOESAIC_DEV void store_as(DType dtype, void* data, int64_t at, float value) {
  if (dtype == DType::F32) {
    store_element<DType::F32>(data, at, value);
  } else if (dtype == DType::F16) {
    store_element<DType::F16>(data, at, value);
  } else {
    store_element<DType::BF16>(data, at, value);
  }
}
// The value as it would be after a store and a load.
MOESAIC_DEV float rounded_to(DType dtype, float value) {
  return dtype == DType::F32   ? value
         : dtype == DType::F16 ? dev::f16_to_f32(dev::f32_to_f16(value))
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
  DType dtype;
  Select select;
  bool activated;  // `activation` is applied
  Activation activation;
  const float* row_weight;  // [limit] factors of the products by destination, or null
  const float* gate_rows;   // [limit, rows]: gate of an earlier pass, or null
  RoleOutput first;         // of the only role, or of the gate of pairs
  RoleOutput second;        // of the up of pairs

  // Output rows of a row block.
  MOESAIC_DEV int block_rows() const { return select == Select::All ? kUnitRows : kUnitRows / 2; }

  // Stores output row `r` of row block `row_block`, given value(unit row).
  template <class Value>
  MOESAIC_DEV void store(int expert, int row_block, int r, int64_t destination,
                         const Value& value) const {
    const int64_t row = static_cast<int64_t>(row_block) * block_rows() + r;
    if (row >= rows) return;
    const int64_t at = destination * rows + row;
    const float factor = row_weight != nullptr ? row_weight[destination] : 1.0F;
    float y = first.finish(factor * value(select == Select::Second ? r + kUnitRows / 2 : r), expert,
                           rows, row);
    if (select == Select::Pairs) {
      y = cuda::activate(activation, y,
                         second.finish(factor * value(r + kUnitRows / 2), expert, rows, row));
    } else if (activated) {
      y = cuda::activate(activation, gate_rows != nullptr ? gate_rows[at] : 0.0F, y);
    }
    store_as(dtype, data, at, y);
  }
};

}  // namespace moesaic::cuda

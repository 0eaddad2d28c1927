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

// Rows of a token that are stored at once, in 16 or 32 bytes.
inline constexpr int kRun = kUnitRows / 2;

MOESAIC_DEV void load_run(const float* products, float (&run)[kRun]) {
  MOESAIC_UNROLL
  for (int i = 0; i < kRun; i += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(products + i);
    run[i] = quad.x;
    run[i + 1] = quad.y;
    run[i + 2] = quad.z;
    run[i + 3] = quad.w;
  }
}
MOESAIC_DEV void store_run_as(DType dtype, void* data, int64_t at, const float (&y)[kRun]) {
  if (dtype == DType::F32) {
    auto* const to = reinterpret_cast<float4*>(static_cast<float*>(data) + at);
    to[0] = make_float4(y[0], y[1], y[2], y[3]);
    to[1] = make_float4(y[4], y[5], y[6], y[7]);
  } else {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + at) =
        dtype == DType::F16 ? make_uint4(dev::pack_f16(y[0], y[1]), dev::pack_f16(y[2], y[3]),
                                         dev::pack_f16(y[4], y[5]), dev::pack_f16(y[6], y[7]))
                            : make_uint4(dev::pack_bf16(y[0], y[1]), dev::pack_bf16(y[2], y[3]),
                                         dev::pack_bf16(y[4], y[5]), dev::pack_bf16(y[6], y[7]));
  }
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
  // finish() of kRun values, the first of them in `row`.
  MOESAIC_DEV void finish(float (&run)[kRun], int expert, int64_t rows, int64_t row) const {
    if (scale != nullptr) {
      const float factor = scale[expert];
      MOESAIC_UNROLL
      for (float& value : run) value *= factor;
    }
    if (bias != nullptr) {
      const float* const from = bias + expert * rows + row;
      MOESAIC_UNROLL
      for (int i = 0; i < kRun; ++i) run[i] += from[i];
    }
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

  // Whether store_run() can be called: rows are whole runs that lie at multiples of 16 bytes, and the
  // activation is the one that most models have.
  MOESAIC_DEV bool in_runs() const {
    return rows % kRun == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
           (!activated || (select == Select::Pairs && activation.kind == ActivationKind::SwiGlu));
  }
  // Stores output rows kRun * run .. of row block `row_block`, of a token whose 16 products are given,
  // as store() does, bit for bit.
  MOESAIC_DEV void store_run(int expert, int row_block, int run, int64_t destination,
                             const float* products) const {
    const int64_t row = static_cast<int64_t>(row_block) * block_rows() + kRun * run;
    if (row >= rows) return;
    const float factor = row_weight != nullptr ? row_weight[destination] : 1.0F;
    float y[kRun];
    load_run(products + (select == Select::Second ? kRun : kRun * run), y);
    MOESAIC_UNROLL
    for (float& value : y) value *= factor;
    first.finish(y, expert, rows, row);
    if (select == Select::Pairs) {
      float up[kRun];
      load_run(products + kRun, up);
      MOESAIC_UNROLL
      for (float& value : up) value *= factor;
      second.finish(up, expert, rows, row);
      MOESAIC_UNROLL
      for (int i = 0; i < kRun; ++i) y[i] = silu(y[i]) * up[i];
    }
    store_run_as(dtype, data, destination * rows + row, y);
  }
};

}  // namespace moesaic::cuda

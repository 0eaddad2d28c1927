// One packed role as a kernel parameter, and what a decoder makes of its scales.
#pragma once

#include "device.cuh"
#include "formats/layout.h"

namespace moesaic::cuda {

// For a scale group of columns and rows g and g + 8: the sum of weights times x is
//   scale * (sum of what fragments hold times x + excess) + offset * excess
// where `excess` is -kShift times the sum of x, the same for all rows; less the minima, if any.
struct Promotion {
  float scale[2];
  float offset[2];
};

// How far a place in a row block goes with each step: to the unit that many behind (narrow.cuh). A
// multiple of every span, so that the step is the same number of bytes everywhere.
inline constexpr int kWalkUnits = 8;

// One packed role as a kernel reads it; fields are named as in WeightRef and PackedLayout.
struct PackedWeight {
  const uint8_t* base;
  const std::byte* const* table;
  const int32_t* slot_map;
  int64_t expert_stride;
  int64_t code_block_bytes;
  int64_t scale_block_bytes;
  int64_t scales_at;
  int32_t num_experts;
  int32_t row_blocks;
  int32_t units;
  // The scale records of INT4: units per record as a power of two, and its bytes.
  int32_t span_shift;
  int32_t span_bytes;

  // Where an expert lies. Null when there is none with this number, or it is not resident; its
  // segments are skipped.
  MOESAIC_DEV const uint8_t* expert(int e) const {
    if (e < 0 || e >= num_experts) return nullptr;
    const int64_t slot = slot_map != nullptr ? slot_map[e] : e;
    if (slot < 0) return nullptr;
    return table != nullptr ? reinterpret_cast<const uint8_t*>(table[slot])
                            : base + slot * expert_stride;
  }
  MOESAIC_DEV const uint8_t* codes(const uint8_t* expert_base, int row_block) const {
    return expert_base + row_block * code_block_bytes;
  }
  MOESAIC_DEV const uint8_t* scales(const uint8_t* expert_base, int row_block) const {
    return expert_base + scales_at + row_block * scale_block_bytes;
  }
};

inline PackedFacts packed_facts(const WeightRef& weight) {
  const bool int4 = weight.type == QuantType::INT4;
  return {.type = static_cast<int32_t>(weight.type),
          .half = weight.half,
          .rows = weight.rows,
          .cols = int4 ? weight.int4.packed_cols : weight.cols,
          .scale_cols = weight.int4.scale_cols,
          .scale_f32 = weight.int4.scale_f32,
          .zeros = weight.int4.zeros};
}

inline PackedWeight packed_weight(const WeightRef& weight) {
  const PackedLayout layout = packed_layout(packed_facts(weight));
  int span_shift = 0;
  while ((1 << span_shift) < layout.span_units) ++span_shift;
  return {.base = reinterpret_cast<const uint8_t*>(weight.base),
          .table = weight.table,
          .slot_map = weight.slot_map,
          .expert_stride = weight.expert_stride,
          .code_block_bytes = layout.code_block_bytes,
          .scale_block_bytes = layout.scale_block_bytes,
          .scales_at = layout.scales_at,
          .num_experts = weight.num_experts,
          .row_blocks = static_cast<int32_t>(layout.row_blocks),
          .units = static_cast<int32_t>(layout.units),
          .span_shift = span_shift,
          .span_bytes = layout.span_bytes};
}

}  // namespace moesaic::cuda

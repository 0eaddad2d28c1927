#pragma once

/// Reading a row map, input rows and the memory of experts.

#include "device.h"

/// A row map: RowMapArgs together with its arrays.
struct RowMap {
  RowMapArgs args;
  device const int* expert;
  device const int* offsets;
  device const int* source;
  device const int* destination;
};

inline int segment_begin(thread const RowMap& map, int s) {
  return (map.args.flags & kHasOffsets) != 0 ? map.offsets[s] : s * map.args.width;
}
inline int segment_end(thread const RowMap& map, int s) { return segment_begin(map, s + 1); }
inline int segment_expert(thread const RowMap& map, int s) {
  return (map.args.flags & kHasExpert) != 0 ? map.expert[s] : s;
}
inline int entry_source(thread const RowMap& map, int i) {
  return ((map.args.flags & kHasSource) != 0 ? map.source[i] : i) / map.args.source_divisor;
}
/// The row of `out` that entry i writes, -1 for padding (always trailing in its segment).
inline int entry_destination(thread const RowMap& map, int i) {
  const int row = (map.args.flags & kHasDestination) != 0 ? map.destination[i] : i;
  return row >= 0 && row < map.args.limit ? row : -1;
}

/// The slot that holds an expert; -1 when there is none (no such expert, or it is not resident),
/// and then its segment is skipped.
inline int expert_slot(thread const WeightArgs& weight, device const int* slot_map, int expert) {
  if (expert < 0 || expert >= weight.num_experts) return -1;
  return (weight.flags & kHasSlotMap) != 0 ? slot_map[expert] : expert;
}

/// The first byte of a slot in the weight buffer.
inline ulong expert_offset(thread const WeightArgs& weight, int slot) {
  return weight.base + ulong(slot) * ulong(weight.expert_stride);
}

/// The element of x at which input row `row` begins.
inline long row_offset(thread const InputArgs& in, int row) {
  const int inner = int(in.inner_count);
  return long(row / inner) * in.outer_stride + long(row % inner) * in.inner_stride;
}
/// Where that row begins.
inline device const uchar* input_row(device const uchar* x, thread const InputArgs& in, int row) {
  return x + row_offset(in, row) * (input_type == kTypeF32 ? 4 : 2);
}

inline float bf16_to_float(ushort bits) { return as_type<float>(uint(bits) << 16); }

/// Column c of a row of x, whose type is the function constant `input_type`.
inline float load_input(device const uchar* row, int c) {
  if (input_type == kTypeF16) return float(((device const half*)row)[c]);
  if (input_type == kTypeBF16) return bf16_to_float(((device const ushort*)row)[c]);
  return ((device const float*)row)[c];
}

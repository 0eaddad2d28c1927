// Input rows as B fragments of mma.m16n8k16, for every product of this folder.
//
// A unit is 64 columns. Of row r, unit u and t = 0 .. 3 each bf16 plane holds 8 words:
//   planes[r][u][t][plane][2 s + b]   columns 16 s + 8 b + 2 t, + 1 of the unit
// so lane 4 g + t of a warp reads its fragments of token g as 16-byte pieces. Plane 0 is x rounded
// to bf16, plane 1 what that left: f32 in 16 bits, f16 and bf16 exactly. sums[r][u][s] is the f32
// sum of the staged values of the scale group, of the weight that will be read, that step s lies in.
// Columns are gathered where the weight has an order of its
// own; behind the last one there are zeros.
//
// A warp stages a unit of a row, a lane two columns. Not measured on hardware.
#pragma once

#include "device.cuh"
#include "formats/layout.h"
#include "gemm/tile.cuh"
#include "ops/rows.cuh"
#include "plugin.h"

namespace moesaic::cuda {

inline constexpr int kStageWarps = 8;
inline constexpr int kPlaneWords = kUnitCols / 2;  // of a row and unit
inline constexpr int kUnitSums = 4;

struct StagedRows {
  uint32_t* planes;
  float* sums;
  int32_t units;
  int32_t num_planes;
  // Not 0 when each expert has its own column order: x is then staged once for each map entry, so
  // rows count destinations.
  int32_t by_destination;

  MOESAIC_DEV uint32_t* unit_planes(int64_t row, int unit) const {
    return planes + (row * units + unit) * (num_planes * kPlaneWords);
  }
  MOESAIC_DEV float* unit_sums(int64_t row, int unit) const {
    return sums + (row * units + unit) * kUnitSums;
  }
};

struct StageArgs {
  InputRows in;
  StagedRows out;
  int64_t cols;           // columns of the packed weight when `gather` is set, else of `in`
  const int32_t* gather;  // [cols] or null
  int64_t gather_stride;
  int32_t scale_groups;  // of a unit: 4, 2, 1
  TileSource tiles;      // which entries to stage, when rows are destinations
};

template <DType kType>
MOESAIC_DEV float staged_element(const StageArgs& args, const int32_t* gather, int64_t offset,
                                 int64_t col) {
  if (col >= args.cols) return 0.0F;
  const int64_t from = gather != nullptr ? gather[col] : col;
  return from < 0 || from >= args.in.cols ? 0.0F : load_element<kType>(args.in.data, offset + from);
}

template <DType kType>
MOESAIC_DEV void stage_unit(const StageArgs& args, const int32_t* gather, int64_t from_row,
                            int64_t to_row, int unit, int lane) {
  const int64_t offset = args.in.element_offset(from_row);
  const int64_t col = int64_t{unit} * kUnitCols + 2 * lane;
  float low = staged_element<kType>(args, gather, offset, col);
  float high = staged_element<kType>(args, gather, offset, col + 1);

  const int s = lane / 8, b = lane / 4 % 2, t = lane % 4;
  const int num_planes = args.out.num_planes;
  uint32_t* const word = args.out.unit_planes(to_row, unit) + t * num_planes * 8 + 2 * s + b;
  float sum = 0.0F;
  for (int plane = 0; plane < num_planes; ++plane) {
    const uint32_t pair = dev::pack_bf16(low, high);
    word[plane * 8] = pair;
    const float2 rounded = dev::unpack_bf16(pair);
    sum += rounded.x + rounded.y;
    low -= rounded.x;
    high -= rounded.y;
  }
  for (int step = 1; step < 32 / args.scale_groups; step *= 2)
    sum += __shfl_xor_sync(~0U, sum, step);
  if (lane % 8 == 0) args.out.unit_sums(to_row, unit)[s] = sum;
}

template <DType kType>
MOESAIC_KERNEL void __launch_bounds__(32 * kStageWarps) stage_kernel(StageArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kStageWarps + threadIdx.x / 32;
  const int64_t row = index / args.out.units;
  if (row >= args.in.num_rows) return;
  stage_unit<kType>(args, args.gather, row, row, static_cast<int>(index % args.out.units),
                    static_cast<int>(threadIdx.x % 32));
}

// Stages each entry of the map by the column order of its expert.
template <DType kType>
MOESAIC_KERNEL void __launch_bounds__(32 * kStageWarps) stage_entries_kernel(StageArgs args) {
  Tile tile;
  if (!args.tiles.find(static_cast<int32_t>(blockIdx.x), tile)) return;
  const int32_t* const gather = args.gather + tile.expert * args.gather_stride;
  const int work = tile.count * args.out.units;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < work; i += kStageWarps) {
    const int32_t entry = tile.first + i / args.out.units;
    stage_unit<kType>(args, gather, args.tiles.map.source_of(entry),
                      args.tiles.map.destination_of(entry), i % args.out.units,
                      static_cast<int>(threadIdx.x % 32));
  }
}

}  // namespace moesaic::cuda

// Input rows as bf16, for every product of this folder.
//
// A unit is 64 columns; of a row it has 128 bytes for each plane. Plane 0 is x rounded to bf16, plane
// 1 what that left: f32 in 16 bits, f16 and bf16 exactly. Columns are gathered where the weight has an
// order of its own; behind the last one there are zeros. So rows of bf16 that are whole units at
// multiples of 16 bytes are read as they come, and nothing is staged. Codes lie so that lanes find the
// B fragments of their columns side by side (formats/codes.cuh).
//
// sums[r][u] has four words of the sums over the scale groups of the weight that will be read, as
// its decoder wants them (SumsOfX):
//   excess   word s: f32, -kShift times the sum over the scale group that step s lies in
//   minima   word p < 3: what planes before p left of the sums over both scale groups, as two bf16,
//            so that three hold all of an f32; word 3: zero. Word t is the B fragment of lane
//            4 g + t for mma.m16n8k8
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
inline constexpr int kPlaneBytes = 2 * kUnitCols;  // of a row and unit
inline constexpr int kUnitSums = 4;

enum class SumsOfX : uint8_t { None, Excess, Minima };

struct StagedRows {
  const uint8_t* rows;  // [row][unit][plane][64] bf16
  int64_t row_bytes;
  uint32_t* sums;  // [row][unit][kUnitSums], or null
  int32_t units;
  int32_t num_planes;
  // Not 0 when each expert has its own column order: x is then staged once for each map entry, so
  // rows count destinations.
  int32_t by_destination;

  MOESAIC_DEV const uint8_t* unit_planes(int64_t row, int unit) const {
    return rows + row * row_bytes + unit * (num_planes * kPlaneBytes);
  }
  MOESAIC_DEV uint32_t* unit_sums(int64_t row, int unit) const {
    return sums + (row * units + unit) * kUnitSums;
  }
};

// The B words of a lane for kSteps steps: its runs of kLaneCols columns, of which place(at) says where
// that of byte `at` of the unit's lane 0 lies.
template <int kLaneCols, int kSteps = 4, class Place>
MOESAIC_DEV void load_lane_cols(const Place& place, uint32_t (&b)[2 * kSteps]) {
  MOESAIC_UNROLL
  for (int i = 0; i < 4 * kSteps / kLaneCols; ++i) {
    const uint8_t* const from = place(8 * kLaneCols * i);
    uint32_t* const to = b + kLaneCols / 2 * i;
    if constexpr (kLaneCols == 8) {
      const uint4 run = *reinterpret_cast<const uint4*>(from);
      to[0] = run.x;
      to[1] = run.y;
      to[2] = run.z;
      to[3] = run.w;
    } else {
      const uint2 run = *reinterpret_cast<const uint2*>(from);
      to[0] = run.x;
      to[1] = run.y;
    }
  }
}

struct StageArgs {
  InputRows in;
  StagedRows out;
  uint32_t* planes;       // out.rows, or null where they need no staging but their sums
  int64_t cols;           // columns of the packed weight when `gather` is set, else of `in`
  const int32_t* gather;  // [cols] or null
  int64_t gather_stride;
  SumsOfX sums;
  int32_t scale_groups;  // of a unit: 4, 2, 1; two for minima
  int32_t shift;         // kShift of the decoder
  TileSource tiles;      // which entries to stage, when rows are destinations
};

// `sum`: of a lane's two columns.
MOESAIC_DEV void stage_sums(const StageArgs& args, float sum, uint32_t* to, int lane) {
  for (int step = 1; step < 32 / args.scale_groups; step *= 2)
    sum += __shfl_xor_sync(~0U, sum, step);
  if (args.sums == SumsOfX::Excess) {
    if (lane % 8 == 0) to[lane / 8] = __float_as_uint(static_cast<float>(-args.shift) * sum);
    return;
  }
  float low = sum, high = __shfl_xor_sync(~0U, sum, 16);  // of lanes 0 .. 15
  MOESAIC_UNROLL
  for (int plane = 0; plane < 3; ++plane) {
    const uint32_t pair = dev::pack_bf16(low, high);
    if (lane == plane) to[plane] = pair;
    const float2 rounded = dev::unpack_bf16(pair);
    low -= rounded.x;
    high -= rounded.y;
  }
  if (lane == 3) to[3] = 0;
}

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

  const int num_planes = args.out.num_planes;
  const int64_t first = (to_row * args.out.units + unit) * num_planes * (kUnitCols / 2);
  float sum = 0.0F;
  for (int plane = 0; plane < num_planes; ++plane) {
    const uint32_t pair = dev::pack_bf16(low, high);
    if (args.planes != nullptr) args.planes[first + plane * (kUnitCols / 2) + lane] = pair;
    const float2 rounded = dev::unpack_bf16(pair);
    sum += rounded.x + rounded.y;
    low -= rounded.x;
    high -= rounded.y;
  }
  if (args.sums != SumsOfX::None) stage_sums(args, sum, args.out.unit_sums(to_row, unit), lane);
}

template <DType kType>
MOESAIC_KERNEL void __launch_bounds__(32 * kStageWarps) stage_kernel(StageArgs args) {
  dev::begin_grid();
  const int64_t index = int64_t{blockIdx.x} * kStageWarps + threadIdx.x / 32;
  const int64_t row = index / args.out.units;
  if (row >= args.in.num_rows) return;
  stage_unit<kType>(args, args.gather, row, row, static_cast<int>(index % args.out.units),
                    static_cast<int>(threadIdx.x % 32));
}

// Stages each entry of the map by the column order of its expert.
template <DType kType>
MOESAIC_KERNEL void __launch_bounds__(32 * kStageWarps) stage_entries_kernel(StageArgs args) {
  dev::begin_grid();
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

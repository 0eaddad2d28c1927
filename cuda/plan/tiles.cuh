// The tile list of a grouped product: every segment with work, cut into runs of up to `width`
// entries, in the order of the segments. One block: segments 1024 at a time, first their number of
// tiles (a scan), then the tiles, one per thread whatever segment they come from. So the list takes
// the same time when one expert has all tokens. Not measured on hardware.
#pragma once

#include "plan/align.cuh"
#include "plan/block_scan.cuh"
#include "plan/map.cuh"
#include "plan/tile.h"

namespace moesaic::cuda {

inline constexpr int kTilesThreads = 1024;

MOESAIC_KERNEL void __launch_bounds__(kTilesThreads) tiles_kernel(TilesArgs args) {
  dev::begin_grid();
  MOESAIC_SHARED(int32_t, first_tile, [kTilesThreads]);
  MOESAIC_SHARED(int32_t, entries, [kTilesThreads]);
  MOESAIC_SHARED(ScanShared<kTilesThreads>, scan);
  const RowMap& map = args.map;
  const auto thread = static_cast<int32_t>(threadIdx.x);

  int32_t done = 0;
  for (int32_t first = 0; first < map.num_segments; first += kTilesThreads) {
    const int32_t left = map.num_segments - first;
    const int32_t segments = left < kTilesThreads ? left : kTilesThreads;
    int32_t mine = 0;
    if (thread < segments) mine = real_entries(map, first + thread, args.num_experts);
    const Scan tiles = block_scan((mine + args.width - 1) / args.width, scan);
    first_tile[thread] = tiles.before;
    entries[thread] = mine;
    __syncthreads();
    for (int32_t i = thread; i < tiles.total && done + i < args.max_tiles; i += kTilesThreads) {
      const int32_t s = last_not_above(first_tile, segments, i);
      const int32_t skip = (i - first_tile[s]) * args.width;
      const int32_t count = entries[s] - skip;
      args.tiles[done + i] = {map.expert_of(first + s), map.begin(first + s) + skip,
                              count < args.width ? count : args.width, first + s};
    }
    done += tiles.total;
  }
  if (thread == 0) *args.num_tiles = done < args.max_tiles ? done : args.max_tiles;
}

}  // namespace moesaic::cuda

#pragma once

/// Tiles: runs of entries of one expert, each the work of a block of threads.

#include "plugin.h"

namespace moesaic::cuda {

struct Tile {
  int32_t expert;
  int32_t first;  ///< entry
  int32_t count;  ///< 1 .. tile width
  int32_t segment;
};

/// Cuts every segment with work into tiles of up to `width` entries, in the order of the segments.
struct TilesArgs {
  RowMap map;
  Tile* tiles;         ///< [max_tiles]
  int32_t* num_tiles;  ///< [1]
  int32_t max_tiles;   ///< tiles_bound(map, width): a bound from the sizes alone
  int32_t width;
  int32_t num_experts;
};
int32_t launch_tiles(const TilesArgs& args, Stream stream);

/// Tiles that a map can have at most: a segment wastes at most one.
inline constexpr int64_t tiles_bound(const RowMap& map, int64_t width) {
  const int64_t entries = map.limit;
  const int64_t segments = map.num_segments < entries ? map.num_segments : entries;
  if (map.offsets != nullptr) return segments + entries / width;
  // Fixed widths: the padding may leave work in every segment.
  return int64_t{map.num_segments} * ((map.width + width - 1) / width);
}

}  // namespace moesaic::cuda

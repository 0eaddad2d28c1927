// Which entries of a map a block works on.
#pragma once

#include "device.cuh"
#include "plan/map.cuh"
#include "plan/tile.h"

namespace moesaic::cuda {

// Tiles by index, from a list where segments have offsets, else by arithmetic: a segment of fixed
// width is cut into pieces, of which those behind its last real entry are empty.
struct TileSource {
  RowMap map;
  const Tile* list;
  const int32_t* num_tiles;
  int32_t width;
  int32_t num_experts;

  // False: nothing to do.
  MOESAIC_DEV bool find(int32_t index, Tile& tile) const {
    if (list != nullptr) {
      if (index >= *num_tiles) return false;
      tile = list[index];
      return true;
    }
    const int32_t pieces = (map.width + width - 1) / width;
    const int32_t segment = index / pieces;
    const int32_t skip = index % pieces * width;
    const int32_t left = real_entries(map, segment, num_experts) - skip;
    tile = {map.expert_of(segment), map.begin(segment) + skip, left < width ? left : width,
            segment};
    return left > 0;
  }
};

}  // namespace moesaic::cuda

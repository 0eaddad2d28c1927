// Reading a MapArgs: the segments of a grouped product and their entries.
#pragma once

#include "device.cuh"
#include "plugin.h"

namespace moesaic::cuda {

MOESAIC_DEV bool is_padding(const MapArgs& map, int32_t entry) {
  const int32_t to = map.destination != nullptr ? map.destination[entry] : entry;
  return to < 0 || to >= map.limit;
}

MOESAIC_DEV int32_t first_entry(const MapArgs& map, int32_t segment) {
  return map.offsets != nullptr ? map.offsets[segment] : segment * map.width;
}

MOESAIC_DEV int32_t expert_of(const MapArgs& map, int32_t segment) {
  return map.expert != nullptr ? map.expert[segment] : segment;
}

// Entries of a segment without the trailing padding; 0 for an expert outside [0, num_experts).
MOESAIC_DEV int32_t real_entries(const MapArgs& map, int32_t segment, int32_t num_experts) {
  const int32_t expert = expert_of(map, segment);
  if (expert < 0 || expert >= num_experts) return 0;
  const int32_t first = first_entry(map, segment);
  const int32_t count = first_entry(map, segment + 1) - first;
  if (count == 0 || !is_padding(map, first + count - 1)) return count;
  int32_t real = 0;
  int32_t padded = count - 1;  // entries from here on are padding
  while (real < padded) {
    const int32_t middle = real + (padded - real) / 2;
    if (is_padding(map, first + middle)) {
      padded = middle;
    } else {
      real = middle + 1;
    }
  }
  return real;
}

}  // namespace moesaic::cuda

// How much of a segment of a RowMap is work.
#pragma once

#include "device.cuh"
#include "plugin.h"

namespace moesaic::cuda {

// Entries of a segment without the trailing padding; 0 for an expert outside [0, num_experts).
MOESAIC_DEV int32_t real_entries(const RowMap& map, int32_t segment, int32_t num_experts) {
  const int32_t expert = map.expert_of(segment);
  if (expert < 0 || expert >= num_experts) return 0;
  const int32_t first = map.begin(segment);
  const int32_t count = map.begin(segment + 1) - first;
  if (count == 0 || !map.is_padding(first + count - 1)) return count;
  int32_t real = 0;
  int32_t padded = count - 1;  // entries from here on are padding
  while (real < padded) {
    const int32_t middle = real + (padded - real) / 2;
    if (map.is_padding(first + middle)) {
      padded = middle;
    } else {
      real = middle + 1;
    }
  }
  return real;
}

}  // namespace moesaic::cuda

// What a pair adds to the sum of its token: its row, and its weight.
#pragma once

#include "device.cuh"
#include "plugin.h"

namespace moesaic::cuda {

// Row of a pair, or -1 when the pair is skipped.
MOESAIC_DEV int64_t combined_row(const op::Combine& args, int64_t pair) {
  const int32_t id = args.routing.topk_ids[pair];
  if (id < 0 || id >= args.num_experts) return -1;
  const int64_t row = args.pair_row != nullptr ? args.pair_row[pair] : pair;
  return row < args.routing.num_pairs() ? row : -1;
}

MOESAIC_DEV float combined_weight(const op::Combine& args, int64_t pair) {
  return args.routing.topk_weights != nullptr ? args.routing.topk_weights[pair] : 1.0F;
}

}  // namespace moesaic::cuda

#pragma once

/// The three ways in which pairs reach the expert products, as row maps.

#include <cstdint>

#include "moesaic/backend.hpp"

namespace moesaic::forward {

/// Row maps of both phases, and where combine finds a pair's row.
struct PhaseMaps {
  RowMap gate_up;
  RowMap down;
  const std::int32_t* pair_row = nullptr;  ///< null: row = pair
};

/// One segment per pair, straight from the ids.
PhaseMaps pair_maps(const RoutingView& routing);
/// One segment per expert.
PhaseMaps bucket_maps(const BucketPlanView& plan, std::int64_t num_pairs, std::int32_t num_experts,
                      RowSpace row_space);
/// One segment per block; padding ids are num_pairs.
PhaseMaps aligned_maps(const AlignedRoutingView& aligned, const BucketPlanView& plan,
                       const RoutingView& routing, std::int64_t num_blocks, std::int32_t block_size,
                       RowSpace row_space);
/// Every token through expert 0.
PhaseMaps single_expert_maps(std::int64_t num_tokens);

}  // namespace moesaic::forward

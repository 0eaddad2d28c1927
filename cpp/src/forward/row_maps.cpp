#include "forward/row_maps.hpp"

namespace moesaic::forward {

PhaseMaps pair_maps(const RoutingView& routing) {
  const auto pairs = static_cast<std::int32_t>(routing.num_pairs());
  RowMap map{.num_segments = pairs, .expert = routing.topk_ids, .limit = pairs};
  PhaseMaps maps{.gate_up = map, .down = map};
  maps.gate_up.source_divisor = routing.top_k;
  return maps;
}

PhaseMaps bucket_maps(const BucketPlanView& plan, std::int64_t num_pairs, std::int32_t num_experts,
                      RowSpace row_space) {
  const RowMap map{.num_segments = num_experts,
                   .offsets = plan.expert_offsets,
                   .limit = static_cast<std::int32_t>(num_pairs)};
  PhaseMaps maps{.gate_up = map, .down = map};
  if (row_space == RowSpace::PackedRows) {
    maps.pair_row = plan.pair_row;
    return maps;
  }
  maps.gate_up.source = plan.row_token;
  maps.gate_up.destination = plan.row_pair;
  maps.down.source = plan.row_pair;
  maps.down.destination = plan.row_pair;
  return maps;
}

PhaseMaps aligned_maps(const AlignedRoutingView& aligned, const BucketPlanView& plan,
                       const RoutingView& routing, std::int64_t num_blocks, std::int32_t block_size,
                       RowSpace row_space) {
  const RowMap map{.num_segments = static_cast<std::int32_t>(num_blocks),
                   .expert = aligned.block_experts,
                   .width = block_size,
                   .source = aligned.sorted_ids,
                   .destination = aligned.sorted_ids,
                   .limit = static_cast<std::int32_t>(routing.num_pairs())};
  PhaseMaps maps{.gate_up = map, .down = map};
  if (row_space == RowSpace::PackedRows) {
    maps.pair_row = plan.pair_row;
  } else {
    maps.gate_up.source_divisor = routing.top_k;
  }
  return maps;
}

PhaseMaps single_expert_maps(std::int64_t num_tokens) {
  const auto rows = static_cast<std::int32_t>(num_tokens);
  const RowMap map{.num_segments = 1, .width = rows, .limit = rows};
  return {.gate_up = map, .down = map};
}

}  // namespace moesaic::forward

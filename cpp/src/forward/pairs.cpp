/// From a routing to what the expert products and the sum see of it.

#include <algorithm>

#include "forward/parts.hpp"
#include "forward/steps.hpp"

namespace moesaic::forward {

RoutingView expert_pairs(const Call& call, const RoutingView& routing) {
  RoutingView pairs = routing;
  // The operations of a device take ids outside the experts as -1 themselves.
  if (call.scratch.pair_ids != nullptr) {
    pairs.topk_ids = call.scratch.pair_ids;
    const std::int32_t experts = call.stack().num_experts();
    std::transform(routing.topk_ids, routing.topk_ids + routing.num_pairs(), pairs.topk_ids,
                   [experts](std::int32_t id) { return id < experts ? id : -1; });
  }
  if (has_part(call.layer, LayerPart::InputWeights)) pairs.topk_weights = nullptr;
  return pairs;
}

const float* row_weights(const Call& call, const RoutingView& routing, RowSpace row_space) {
  if (!has_part(call.layer, LayerPart::InputWeights)) return nullptr;
  if (row_space == RowSpace::TokenPairs) return routing.topk_weights;
  const std::int64_t pairs = routing.num_pairs();
  call.backend().gather(call.context, {.x = dense_rows(routing.topk_weights, DType::F32, pairs, 1),
                                       .index = call.scratch.plan.row_pair,
                                       .rows = pairs,
                                       .out = call.scratch.row_weights});
  return call.scratch.row_weights;
}

RoutingView every_token_once(const Call& call) {
  const RoutingView routing = call.scratch.token_routing;
  call.backend().shared_routing(call.context, {.out = routing});
  return routing;
}

void add_identity(const Call& call, const RoutingView& routing, const TensorView& sum) {
  if (!has_part(call.layer, LayerPart::IdentityExperts)) return;
  const ScopedZone zone(call.context, Zone::Combine);
  call.backend().add_identity(call.context, {.x = call.x,
                                             .routing = routing,
                                             .first = call.stack().num_experts(),
                                             .count = call.layer.router->identity_experts,
                                             .out = output_rows(sum)});
}

}  // namespace moesaic::forward

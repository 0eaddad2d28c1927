/// From a routing to what the expert products and the sum see of it.

#include <algorithm>

#include "forward/parts.hpp"
#include "forward/steps.hpp"

namespace moesaic::forward {

RoutingView expert_pairs(const Call& call, const RoutingView& routing) {
  RoutingView pairs = routing;
  const std::int64_t count = routing.num_pairs();
  if (has_part(call.layer, LayerPart::IdentityExperts)) {
    const std::int32_t experts = call.stack().num_experts();
    pairs.topk_ids = call.scratch.pair_ids;
    std::transform(routing.topk_ids, routing.topk_ids + count, pairs.topk_ids,
                   [experts](std::int32_t id) { return id < experts ? id : -1; });
  }
  if (has_part(call.layer, LayerPart::InputWeights)) {
    pairs.topk_weights = call.scratch.pair_weights;
    std::fill_n(pairs.topk_weights, count, 1.0F);
  }
  return pairs;
}

const float* row_weights(const Call& call, const RoutingView& routing, RowSpace row_space) {
  if (!has_part(call.layer, LayerPart::InputWeights)) return nullptr;
  if (row_space == RowSpace::TokenPairs) return routing.topk_weights;
  const Scratch& s = call.scratch;
  const std::int32_t rows = s.plan.expert_offsets[call.stack().num_experts()];
  std::transform(s.plan.row_pair, s.plan.row_pair + rows, s.row_weights,
                 [&](std::int32_t pair) { return routing.topk_weights[pair]; });
  return s.row_weights;
}

RoutingView every_token_once(const Call& call) {
  const RoutingView routing = call.scratch.token_routing;
  call.backend().shared_routing(call.context, nullptr, routing);
  return routing;
}

void add_identity(const Call& call, const RoutingView& routing, const TensorView& sum) {
  if (!has_part(call.layer, LayerPart::IdentityExperts)) return;
  const Scratch& s = call.scratch;
  const std::int32_t experts = call.stack().num_experts();
  const RoutingView tokens = s.token_routing;
  for (std::int64_t t = 0; t < tokens.num_tokens; ++t) {
    float weight = 0.0F;
    for (std::int64_t pair = t * routing.top_k; pair < (t + 1) * routing.top_k; ++pair) {
      if (routing.topk_ids[pair] >= experts) weight += routing.topk_weights[pair];
    }
    tokens.topk_ids[t] = static_cast<std::int32_t>(t);
    tokens.topk_weights[t] = weight;
  }
  call.backend().gather(call.context, call.x, tokens.topk_ids, tokens.num_tokens, s.rows);
  for (std::int64_t t = 0; t < tokens.num_tokens; ++t) {
    tokens.topk_ids[t] = tokens.topk_weights[t] != 0.0F ? 0 : -1;
  }
  call.backend().combine(
      call.context,
      {.rows = s.rows, .pair_row = nullptr, .routing = tokens, .out = sum, .accumulate = true});
}

}  // namespace moesaic::forward

#include "forward/scratch.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "forward/parts.hpp"
#include "ops/check_workspace.hpp"

namespace moesaic {
namespace forward {

Scratch carve(const Context& context, const LayerRef& layer, std::int32_t top_k,
              std::int64_t num_tokens, Carver& carver) {
  const Backend& backend = context.backend();
  const StackShape& shape = layer.stack->shape();
  const std::int64_t pairs = num_tokens * top_k;
  const std::int64_t hidden = layer.hidden_size();
  const std::int32_t experts = shape.num_experts;
  const std::int32_t logits = layer.router_experts();
  const bool latent = has_part(layer, LayerPart::LatentExperts);
  const bool identity = has_part(layer, LayerPart::IdentityExperts);
  const bool input_weights = has_part(layer, LayerPart::InputWeights);

  // Shared experts and projections run before or after the routed ones and use the same buffers.
  ScratchQuery query{shape,
                     num_tokens,
                     top_k,
                     pairs,
                     layer.stack->packed_cols(),
                     layer.stack->shares_units(),
                     layer.stack->low_rank()};
  std::size_t backend_bytes = backend.scratch_bytes(query);
  std::int64_t row_elems = std::max(pairs * shape.hidden_size, num_tokens * hidden);
  std::int64_t hidden_elems = pairs * shape.intermediate_size;
  for (const ExpertStack* one : {layer.shared != nullptr ? &layer.shared->stack : nullptr,
                                 latent ? &layer.latent->projections : nullptr}) {
    if (one == nullptr) continue;
    query = {one->shape(),        num_tokens,     1, num_tokens, one->packed_cols(),
             one->shares_units(), one->low_rank()};
    backend_bytes = std::max(backend_bytes, backend.scratch_bytes(query));
    hidden_elems = std::max(hidden_elems, num_tokens * one->shape().intermediate_size);
  }
  std::int64_t aligned_ids = 0, aligned_blocks = 0;
  for (const std::int32_t block : kBlockSizes) {
    aligned_ids = std::max(aligned_ids, aligned_capacity(pairs, experts, block));
    aligned_blocks = std::max(aligned_blocks, aligned_block_capacity(pairs, experts, block));
  }

  Scratch s;
  s.logits = carver.take<float>(num_tokens * logits, "logits");
  const std::int64_t route_elems =
      layer.router != nullptr
          ? backend.route_scratch(*layer.router, num_tokens, context.pool().threads())
          : 0;
  s.route = carver.take<float>(route_elems, "route");
  s.routing = {carver.take<std::int32_t>(pairs, "topk_ids"),
               carver.take<float>(pairs, "topk_weights"), num_tokens, top_k};
  s.plan.expert_offsets = carver.take<std::int32_t>(experts + 1, "expert_offsets");
  s.plan.row_token = carver.take<std::int32_t>(pairs, "row_token");
  s.plan.row_pair = carver.take<std::int32_t>(pairs, "row_pair");
  s.plan.pair_row = carver.take<std::int32_t>(pairs, "pair_row");
  s.aligned.sorted_ids = carver.take<std::int32_t>(aligned_ids, "sorted_ids");
  s.aligned.block_experts = carver.take<std::int32_t>(aligned_blocks, "block_experts");
  s.aligned.num_post_pad = carver.take<std::int32_t>(1, "num_post_pad");
  if (identity && backend.device_type() == DeviceType::Cpu) {
    s.pair_ids = carver.take<std::int32_t>(pairs, "pair_ids");
  }
  s.row_pairs = carver.take<std::int32_t>(pairs, "row_pairs");
  if (input_weights) s.row_weights = carver.take<float>(pairs, "row_weights");
  if (has_norm(layer.input_norm)) s.normed = carver.take<float>(num_tokens * hidden, "normed");
  if (latent) {
    s.latent = carver.take<float>(num_tokens * shape.hidden_size, "latent");
    s.latent_sum = carver.take<float>(num_tokens * shape.hidden_size, "latent_sum");
  }
  s.rows = carver.take<float>(row_elems, "rows");
  if (!backend.fuses_activation()) s.gate_up = carver.take<float>(2 * hidden_elems, "gate_up");
  s.hidden = carver.take<float>(hidden_elems, "hidden");
  if (layer.shared != nullptr || identity) {
    s.sum = carver.take<float>(num_tokens * hidden, "sum");
  }
  if (layer.shared != nullptr || identity || latent) {
    s.token_routing = {carver.take<std::int32_t>(num_tokens, "token_ids"),
                       carver.take<float>(num_tokens, "token_weights"), num_tokens, 1};
  }
  s.backend = carver.take<std::byte>(static_cast<std::int64_t>(backend_bytes), "backend");
  s.plan.scratch = s.backend;
  return s;
}

Scratch carve_workspace(const char* operation, Context& context, const LayerRef& layer,
                        std::int32_t top_k, std::int64_t num_tokens, Workspace& workspace) {
  Carver counter = Carver::counting();
  carve(context, layer, top_k, num_tokens, counter);
  ops::check_workspace(operation, context, workspace, counter.used(), num_tokens, "tokens");
  Carver carver(workspace.data(), workspace.size());
  return carve(context, layer, top_k, num_tokens, carver);
}

}  // namespace forward

std::size_t workspace_bytes(const Context& context, const LayerRef& layer, std::int32_t top_k,
                            std::int64_t max_tokens) {
  require<ShapeError>(layer.stack != nullptr && top_k >= 1 && max_tokens >= 0, [&] {
    return Problem{.operation = "workspace_bytes",
                   .what = "layer, top_k, max_tokens",
                   .expected = "a stack, top_k >= 1 and max_tokens >= 0",
                   .got = std::string(layer.stack != nullptr ? "a stack" : "no stack") +
                          ", top_k " + std::to_string(top_k) + ", max_tokens " +
                          std::to_string(max_tokens),
                   .hint = {}};
  });
  // The limit of every routing; beyond it the sizes themselves would overflow.
  require<ShapeError>(max_tokens <= std::numeric_limits<std::int32_t>::max() / top_k, [&] {
    return Problem{.operation = "workspace_bytes",
                   .what = "max_tokens * top_k",
                   .expected = "fewer than 2^31 pairs",
                   .got = std::to_string(max_tokens) + " * " + std::to_string(top_k),
                   .hint = {}};
  });
  Carver counter = Carver::counting();
  forward::carve(context, layer, top_k, max_tokens, counter);
  return counter.used();
}

}  // namespace moesaic

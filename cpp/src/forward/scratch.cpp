#include "forward/scratch.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

namespace moesaic {
namespace forward {

Scratch carve(const Context& context, const LayerRef& layer, std::int32_t top_k,
              std::int64_t num_tokens, Carver& carver) {
  const Backend& backend = context.backend();
  const StackShape& shape = layer.stack->shape();
  const std::int64_t pairs = num_tokens * top_k;
  const std::int32_t experts = shape.num_experts;

  // Shared experts run after the routed ones and use the same row buffers.
  ScratchQuery query{shape, num_tokens, top_k, pairs, layer.stack->packed_cols()};
  std::size_t backend_bytes = backend.scratch_bytes(query);
  std::int64_t row_elems = pairs * shape.hidden_size;
  std::int64_t hidden_elems = pairs * shape.intermediate_size;
  if (layer.shared != nullptr) {
    const StackShape& one = layer.shared->stack.shape();
    query = {one, num_tokens, 1, num_tokens, layer.shared->stack.packed_cols()};
    backend_bytes = std::max(backend_bytes, backend.scratch_bytes(query));
    row_elems = std::max(row_elems, num_tokens * one.hidden_size);
    hidden_elems = std::max(hidden_elems, num_tokens * one.intermediate_size);
  }
  std::int64_t aligned_ids = 0, aligned_blocks = 0;
  for (const std::int32_t block : kBlockSizes) {
    aligned_ids = std::max(aligned_ids, aligned_capacity(pairs, experts, block));
    aligned_blocks = std::max(aligned_blocks, aligned_block_capacity(pairs, experts, block));
  }

  Scratch s;
  s.logits = carver.take<float>(num_tokens * experts, "logits");
  const std::int64_t route_elems =
      layer.router != nullptr ? route_scratch_elems(*layer.router) * context.pool().threads() : 0;
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
  s.rows = carver.take<float>(row_elems, "rows");
  if (!backend.fuses_activation()) s.gate_up = carver.take<float>(2 * hidden_elems, "gate_up");
  s.hidden = carver.take<float>(hidden_elems, "hidden");
  if (layer.shared != nullptr) {
    s.sum = carver.take<float>(num_tokens * shape.hidden_size, "sum");
    s.shared_routing = {carver.take<std::int32_t>(num_tokens, "shared_ids"),
                        carver.take<float>(num_tokens, "shared_weights"), num_tokens, 1};
  }
  s.backend = carver.take<std::byte>(static_cast<std::int64_t>(backend_bytes), "backend");
  return s;
}

Scratch carve_workspace(const char* operation, const Context& context, const LayerRef& layer,
                        std::int32_t top_k, std::int64_t num_tokens, Workspace& workspace) {
  Carver counter = Carver::counting();
  carve(context, layer, top_k, num_tokens, counter);
  require<WorkspaceError>(workspace.size() >= counter.used(), [&] {
    return Problem{.operation = operation,
                   .what = "workspace",
                   .expected = "at least " + std::to_string(counter.used()) + " bytes for " +
                               std::to_string(num_tokens) + " tokens",
                   .got = std::to_string(workspace.size()),
                   .hint = "workspace_bytes gives the size"};
  });
  // 0xFF in every byte is NaN in f32 and -1 in int32.
  if (context.tuning().poison && context.backend().device_type() == DeviceType::Cpu) {
    std::memset(workspace.data(), 0xFF, counter.used());
  }
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

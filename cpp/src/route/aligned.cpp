#include <algorithm>
#include <limits>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/interrupt.hpp"
#include "moesaic/plan.hpp"

namespace moesaic {

std::int64_t aligned_capacity(std::int64_t num_pairs, std::int32_t num_experts,
                              std::int32_t block_size) {
  return aligned_block_capacity(num_pairs, num_experts, block_size) * block_size;
}

std::int64_t aligned_block_capacity(std::int64_t num_pairs, std::int32_t num_experts,
                                    std::int32_t block_size) {
  // At most min(E, P) experts have rows, and each of them wastes at most block_size - 1.
  const std::int64_t rows =
      num_pairs + std::min<std::int64_t>(num_experts, num_pairs) * (block_size - 1);
  return (rows + block_size - 1) / block_size;
}

void align_block_size(const op::Align& call) {
  const auto& [plan, num_pairs, num_experts, block_size, block_capacity, row_space, out] = call;
  const auto padding = static_cast<std::int32_t>(num_pairs);
  std::int32_t* id = out.sorted_ids;
  std::int32_t* block = out.block_experts;
  for (std::int32_t e = 0; e < num_experts; ++e) {
    const std::int32_t begin = plan.expert_offsets[e];
    const std::int32_t end = plan.expert_offsets[e + 1];
    Interrupt::check();
    for (std::int32_t row = begin; row < end; ++row) {
      *id++ = row_space == RowSpace::TokenPairs ? plan.row_pair[row] : row;
    }
    const std::int32_t blocks = (end - begin + block_size - 1) / block_size;
    id = std::fill_n(id, blocks * block_size - (end - begin), padding);
    block = std::fill_n(block, blocks, e);
  }
  *out.num_post_pad = static_cast<std::int32_t>(id - out.sorted_ids);
  std::fill(id, out.sorted_ids + block_capacity * block_size, padding);
  std::fill(block, out.block_experts + block_capacity, -1);
}

AlignedRouting AlignedRouting::build(const Routing& routing, std::int32_t num_experts,
                                     std::int32_t block_size, RowSpace row_space) {
  require<ConfigError>(block_size >= 1, [&] {
    return Problem{"AlignedRouting", "block_size", "at least 1", std::to_string(block_size), ""};
  });
  const BucketPlan plan = BucketPlan::build(routing, num_experts);
  const std::int64_t capacity = aligned_capacity(plan.num_pairs(), num_experts, block_size);
  require<ShapeError>(capacity <= std::numeric_limits<std::int32_t>::max(), [&] {
    return Problem{"AlignedRouting", "padded rows", "fewer than 2^31", std::to_string(capacity),
                   "split the batch"};
  });
  AlignedRouting aligned;
  aligned.block_size_ = block_size;
  aligned.num_experts_ = num_experts;
  aligned.num_pairs_ = plan.num_pairs();
  aligned.row_space_ = row_space;
  aligned.sorted_ids_.resize(static_cast<std::size_t>(capacity));
  aligned.block_experts_.resize(static_cast<std::size_t>(capacity / block_size));
  // align_block_size only reads the plan; the view type is shared with the writers.
  const BucketPlanView view{const_cast<std::int32_t*>(plan.expert_offsets().data()), nullptr,
                            const_cast<std::int32_t*>(plan.row_pair().data()), nullptr};
  align_block_size(
      {.plan = view,
       .num_pairs = plan.num_pairs(),
       .num_experts = num_experts,
       .block_size = block_size,
       .block_capacity = capacity / block_size,
       .row_space = row_space,
       .out = {aligned.sorted_ids_.data(), aligned.block_experts_.data(), &aligned.num_post_pad_}});
  aligned.sorted_ids_.resize(static_cast<std::size_t>(aligned.num_post_pad_));
  return aligned;
}

}  // namespace moesaic

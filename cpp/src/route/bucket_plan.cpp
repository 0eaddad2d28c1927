#include <algorithm>
#include <array>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/interrupt.hpp"
#include "moesaic/plan.hpp"

namespace moesaic {
namespace {

// Some milliseconds of work between two looks at the clock.
constexpr std::int64_t kPairsPerCheck = std::int64_t{1} << 20;
constexpr std::int32_t kTokensPerCheck = 1 << 16;

}  // namespace

void build_bucket_plan(const op::BucketPlan& call) {
  const std::int32_t* const topk_ids = call.routing.topk_ids;
  const std::int64_t num_pairs = call.routing.num_pairs();
  const std::int32_t top_k = call.routing.top_k;
  const std::int32_t num_experts = call.num_experts;
  const BucketPlanView& out = call.out;
  // Counts, shifted by one, become start positions; the starts then serve as cursors and end as the
  // starts of the next expert. So the sort needs no memory of its own.
  std::int32_t* cursor = out.expert_offsets;
  std::fill_n(cursor, num_experts + 1, 0);
  for (std::int64_t p = 0; p < num_pairs; ++p) {
    if (p % kPairsPerCheck == 0) Interrupt::check();
    if (topk_ids[p] >= 0) ++cursor[topk_ids[p] + 1];
  }
  for (std::int32_t e = 0; e < num_experts; ++e) cursor[e + 1] += cursor[e];

  std::int32_t pair = 0;
  for (std::int32_t token = 0; pair < num_pairs; ++token) {
    if (token % kTokensPerCheck == 0) Interrupt::check();
    for (std::int32_t slot = 0; slot < top_k; ++slot, ++pair) {
      const std::int32_t expert = topk_ids[pair];
      if (expert < 0) {
        out.pair_row[pair] = -1;
        continue;
      }
      const std::int32_t row = cursor[expert]++;
      out.row_token[row] = token;
      out.row_pair[row] = pair;
      out.pair_row[pair] = row;
    }
  }
  const std::int32_t rows = cursor[num_experts];
  std::copy_backward(cursor, cursor + num_experts, cursor + num_experts + 1);
  cursor[0] = 0;
  std::fill(out.row_token + rows, out.row_token + num_pairs, -1);
  std::fill(out.row_pair + rows, out.row_pair + num_pairs, -1);
}

BucketPlan BucketPlan::build(const Routing& routing, std::int32_t num_experts) {
  require<ShapeError>(num_experts >= 1, [&] {
    return Problem{"BucketPlan", "num_experts", "at least 1", std::to_string(num_experts), ""};
  });
  BucketPlan plan;
  plan.num_experts_ = num_experts;
  plan.rebuild(routing);
  return plan;
}

void BucketPlan::rebuild(const Routing& routing) {
  const auto ids = routing.topk_ids();
  // Both users only read; the view type is shared with the writers.
  const RoutingView view{const_cast<std::int32_t*>(ids.data()), nullptr, routing.num_tokens(),
                         routing.top_k()};
  check_ids(view, num_experts_, "BucketPlan");
  expert_offsets_.resize(static_cast<std::size_t>(num_experts_) + 1);
  const std::array lists{&row_token_, &row_pair_, &pair_row_};
  for (auto* list : lists) list->reserve(ids.size());  // may fail, and then all is as it was
  for (auto* list : lists) list->resize(ids.size());
  num_tokens_ = routing.num_tokens();
  top_k_ = routing.top_k();
  try {
    build_bucket_plan(
        {.routing = view,
         .num_experts = num_experts_,
         .out = {expert_offsets_.data(), row_token_.data(), row_pair_.data(), pair_row_.data()}});
  } catch (...) {  // interrupted: what is left is a plan of no tokens
    num_tokens_ = 0;
    std::ranges::fill(expert_offsets_, 0);
    for (auto* list : lists) list->clear();
    throw;
  }
}

}  // namespace moesaic

/// From logits or a table to a routing, and from a routing to plans.

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/cpu_backend.hpp"
#include "cpu/ops/ranges.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {

RouteStats CpuBackend::route(Context& context, const op::Route& call) const {
  constexpr std::int64_t kOperations = 32;  // per expert: an exponential, and the scans of top-k
  const std::int64_t scratch_elems = route_scratch_elems(call);
  std::atomic<std::int64_t> nonfinite{0};
  parallel_ranges(context.pool(), call.out.num_tokens, kOperations * call.num_experts,
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    op::Route part = call;
                    part.logits += begin * call.row_stride;
                    part.out.topk_ids += begin * call.out.top_k;
                    part.out.topk_weights += begin * call.out.top_k;
                    part.out.num_tokens = end - begin;
                    part.scratch = static_cast<float*>(call.scratch) + thread * scratch_elems;
                    const RouteStats stats = route_rows(part);
                    nonfinite.fetch_add(stats.nonfinite_rows, std::memory_order_relaxed);
                  });
  return {.nonfinite_rows = nonfinite.load(std::memory_order_relaxed)};
}

void CpuBackend::look_up_experts(Context&, const op::LookUpExperts& call) const {
  const RoutingView& out = call.out;
  for (std::int64_t t = 0; t < out.num_tokens; ++t) {
    const std::int64_t first = std::int64_t{call.token_ids[t]} * out.top_k;
    std::copy_n(call.table + first, out.top_k, out.topk_ids + t * out.top_k);
  }
}

void CpuBackend::shared_routing(Context&, const op::SharedRouting& call) const {
  for (std::int64_t t = 0; t < call.out.num_tokens; ++t) {
    call.out.topk_ids[t] = 0;
    call.out.topk_weights[t] =
        call.logits != nullptr ? 1.0F / (1.0F + std::exp(-call.logits[t])) : 1.0F;
  }
}

void CpuBackend::bucket_plan(Context&, const op::BucketPlan& call) const {
  build_bucket_plan(call);
}

void CpuBackend::align(Context&, const op::Align& call) const { align_block_size(call); }

}  // namespace moesaic::cpu

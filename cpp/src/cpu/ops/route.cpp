#include "cpu/ops/route.hpp"

#include <atomic>

#include "cpu/ops/ranges.hpp"

namespace moesaic::cpu {

RouteStats route(ThreadPool& pool, const float* logits, std::int64_t row_stride,
                 const RouterConfig& config, RoutingView out, float* scratch) {
  constexpr std::int64_t kOperations = 32;  // per expert: an exponential, and the scans of top-k
  const std::int64_t scratch_elems = route_scratch_elems(config);
  std::atomic<std::int64_t> nonfinite{0};
  parallel_ranges(pool, out.num_tokens, kOperations * config.num_experts,
                  [&](std::int64_t begin, std::int64_t end, int thread) {
                    RoutingView part = out;
                    part.topk_ids += begin * out.top_k;
                    part.topk_weights += begin * out.top_k;
                    part.num_tokens = end - begin;
                    const RouteStats stats =
                        route_rows(logits + begin * row_stride, row_stride, config, part,
                                   scratch + thread * scratch_elems);
                    nonfinite.fetch_add(stats.nonfinite_rows, std::memory_order_relaxed);
                  });
  return {.nonfinite_rows = nonfinite.load(std::memory_order_relaxed)};
}

}  // namespace moesaic::cpu

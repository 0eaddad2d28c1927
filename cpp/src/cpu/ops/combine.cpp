#include <algorithm>

#include "cpu/cpu_backend.hpp"
#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

/// Columns whose sums stay in the first cache, in runs long enough for the prefetcher.
constexpr std::int64_t kColumns = 2048;

void add_scaled(const float* __restrict row, float weight, std::int64_t count,
                float* __restrict sum) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += weight * row[i];
}

/// Columns [first, first + count) of one token.
void combine_block(const op::Combine& call, std::int64_t token, std::int64_t first,
                   std::int64_t count) {
  const std::int64_t hidden = call.out.cols;
  const RoutingView& routing = call.routing;
  const auto* const rows = static_cast<const float*>(call.rows);
  alignas(64) float sum[kColumns];
  std::fill_n(sum, count, 0.0F);
  for (std::int32_t slot = 0; slot < routing.top_k; ++slot) {
    const std::int64_t pair = token * routing.top_k + slot;
    if (routing.topk_ids[pair] < 0) continue;
    const std::int64_t row = call.pair_row != nullptr ? call.pair_row[pair] : pair;
    if (row < 0) continue;  // the plan skips it
    const float weight = routing.topk_weights != nullptr ? routing.topk_weights[pair] : 1.0F;
    add_scaled(rows + row * hidden + first, weight, count, sum);
  }
  const std::int64_t offset = token * call.out.stride + first;
  if (call.accumulate) {
    alignas(64) float before[kColumns];
    to_f32(call.out.data, call.out.dtype, offset, count, before);
    for (std::int64_t i = 0; i < count; ++i) sum[i] = before[i] + sum[i];
  }
  from_f32(sum, count, call.out.dtype, call.out.data, offset);
}

}  // namespace

void CpuBackend::combine(Context& context, const op::Combine& call) const {
  const std::int64_t hidden = call.out.cols;
  const std::int64_t blocks = (hidden + kColumns - 1) / kColumns;
  const std::int64_t work = std::min(hidden, kColumns) * (call.routing.top_k + 1);
  parallel_ranges(context.pool(), call.routing.num_tokens * blocks, work,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t i = begin; i < end; ++i) {
                      const std::int64_t first = i % blocks * kColumns;
                      combine_block(call, i / blocks, first, std::min(kColumns, hidden - first));
                    }
                  });
}

}  // namespace moesaic::cpu

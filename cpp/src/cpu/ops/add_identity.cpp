#include <algorithm>

#include "cpu/cpu_backend.hpp"
#include "cpu/ops/convert.hpp"
#include "cpu/ops/ranges.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cpu {
namespace {

constexpr std::int64_t kColumns = 1024;

float identity_weight(const op::AddIdentity& call, std::int64_t token) {
  const RoutingView& routing = call.routing;
  float weight = 0.0F;
  for (std::int64_t pair = token * routing.top_k; pair < (token + 1) * routing.top_k; ++pair) {
    const std::int32_t id = routing.topk_ids[pair];
    if (id >= call.first && id < call.first + call.count) weight += routing.topk_weights[pair];
  }
  return weight;
}

void add_token(const op::AddIdentity& call, std::int64_t token) {
  const float weight = identity_weight(call, token);
  if (weight == 0.0F) return;
  float* const out = static_cast<float*>(call.out.data) + token * call.out.stride;
  for (std::int64_t first = 0; first < call.x.cols; first += kColumns) {
    const std::int64_t count = std::min(kColumns, call.x.cols - first);
    alignas(64) float x[kColumns];
    row_to_f32(call.x, token, first, count, x);
    for (std::int64_t i = 0; i < count; ++i) out[first + i] += weight * x[i];
  }
}

}  // namespace

void CpuBackend::add_identity(Context& context, const op::AddIdentity& call) const {
  parallel_ranges(context.pool(), call.routing.num_tokens, 2 * call.x.cols,
                  [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) add_token(call, t);
                  });
}

}  // namespace moesaic::cpu

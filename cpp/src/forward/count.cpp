#include <algorithm>

#include "forward/steps.hpp"
#include "moesaic/expert_pool.hpp"

namespace moesaic::forward {

void count_call(const Call& call, const RoutingView& routing) {
  if (call.layer.usage != nullptr && call.backend().device_type() == DeviceType::Cpu) {
    call.layer.usage->add({routing.topk_ids, static_cast<std::size_t>(call.sizes.num_pairs)},
                          call.sizes.top_k);
  }
  Profiler* profiler = call.context.profiler();
  if (profiler == nullptr) return;
  profiler->add(Counter::Calls, 1);
  profiler->add(Counter::Tokens, call.sizes.num_tokens);
  profiler->add(Counter::Pairs, call.sizes.num_pairs);
  if (call.backend().device_type() != DeviceType::Cpu) return;
  // The plan's offsets are free until the plan is built.
  std::int32_t* seen = call.scratch.plan.expert_offsets;
  const std::int32_t experts = call.stack().num_experts();
  std::fill_n(seen, experts, 0);
  for (std::int64_t pair = 0; pair < call.sizes.num_pairs; ++pair) {
    if (routing.topk_ids[pair] >= 0) seen[routing.topk_ids[pair]] = 1;
  }
  const std::int64_t touched = std::count(seen, seen + experts, 1);
  profiler->add(Counter::ExpertsTouched, touched);
  std::int64_t bytes = touched * call.stack().bytes_per_expert();
  if (call.layer.shared != nullptr) bytes += call.layer.shared->stack.nbytes();
  if (call.layer.latent != nullptr) bytes += call.layer.latent->projections.nbytes();
  profiler->add(Counter::WeightBytes, bytes);
}

}  // namespace moesaic::forward

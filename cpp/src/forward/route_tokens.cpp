#include "forward/steps.hpp"

namespace moesaic::forward {
namespace {

void copy_routing(const Backend& backend, const RoutingView& from, const RoutingView& to) {
  const auto pairs = static_cast<std::size_t>(from.num_pairs());
  if (to.topk_ids != from.topk_ids) {
    backend.copy(to.topk_ids, from.topk_ids, pairs * sizeof(std::int32_t));
  }
  if (to.topk_weights != from.topk_weights) {
    backend.copy(to.topk_weights, from.topk_weights, pairs * sizeof(float));
  }
}

void check_finite(const Call& call, const RouteStats& stats) {
  if (Profiler* profiler = call.context.profiler(); profiler != nullptr) {
    profiler->add(Counter::NonfiniteRows, stats.nonfinite_rows);
  }
  require<ConfigError>(stats.nonfinite_rows == 0 || !call.context.tuning().strict, [&] {
    return Problem{.operation = call.operation,
                   .what = "logits",
                   .expected = "finite values (strict)",
                   .got = std::to_string(stats.nonfinite_rows) + " rows with NaN or infinity",
                   .hint = {}};
  });
}

/// Router logits given, or computed from x; f32 rows `stride` elements apart.
struct Logits {
  const float* data;
  std::int64_t stride;
};
Logits logits_of(const Call& call) {
  if (call.io.logits.data != nullptr) {
    return {static_cast<const float*>(call.io.logits.data), call.io.logits.stride(0)};
  }
  const ScopedZone zone(call.context.profiler(), Zone::Router);
  const std::int32_t experts = call.stack().num_experts();
  call.backend().router_logits(call.context, call.x, call.layer.router_weight->data(), experts,
                               call.scratch.logits);
  return {call.scratch.logits, experts};
}

}  // namespace

RoutingView route_tokens(const Call& call) {
  RoutingView routing = call.io.routing;
  if (routing.topk_ids == nullptr) {
    const Logits logits = logits_of(call);
    const ScopedZone zone(call.context.profiler(), Zone::Route);
    routing = call.scratch.routing;
    check_finite(call, call.backend().route(call.context, logits.data, logits.stride,
                                            *call.layer.router, routing, call.scratch.route));
  }
  if (call.io.routing_out.topk_ids != nullptr) {
    copy_routing(call.backend(), routing, call.io.routing_out);
  }
  return routing;
}

}  // namespace moesaic::forward

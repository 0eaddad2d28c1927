#include "forward/steps.hpp"

namespace moesaic::forward {
namespace {

void copy_routing(const Call& call, const RoutingView& from, const RoutingView& to) {
  const Backend& backend = call.backend();
  const auto pairs = static_cast<std::size_t>(from.num_pairs());
  if (to.topk_ids != from.topk_ids) {
    backend.copy_on_stream(call.context, to.topk_ids, from.topk_ids, pairs * sizeof(std::int32_t));
  }
  if (to.topk_weights != from.topk_weights) {
    backend.copy_on_stream(call.context, to.topk_weights, from.topk_weights, pairs * sizeof(float));
  }
}

void check_finite(const Call& call, const RouteStats& stats) {
  if (Profiler* profiler = call.context.profiler(); profiler != nullptr) {
    profiler->add(Counter::NonfiniteRows, stats.nonfinite_rows);
  }
  require<ConfigError>(stats.nonfinite_rows == 0 || !call.context.tuning().strict, [&] {
    return Problem{.operation = call.operation,
                   .what = "router_logits",
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
  const ScopedZone zone(call.context, Zone::Router);
  const std::int32_t experts = call.layer.router_experts();
  call.backend().router_logits(call.context, {.x = router_input(call),
                                              .weight = call.layer.router_weight->data(),
                                              .num_experts = experts,
                                              .logits = call.scratch.logits});
  return {call.scratch.logits, experts};
}

/// The ids of a router that only weighs them.
void take_given_ids(const Call& call, const RoutingView& to) {
  if (call.layer.router->select_on != SelectOn::Given) return;
  if (call.io.token_ids.data != nullptr) {
    const std::span<const std::int32_t> table = call.layer.token_experts;
    call.backend().look_up_experts(
        call.context, {.table = table.data(),
                       .num_rows = static_cast<std::int64_t>(table.size()) / to.top_k,
                       .token_ids = static_cast<const std::int32_t*>(call.io.token_ids.data),
                       .out = to});
    return;
  }
  call.backend().copy_on_stream(call.context, to.topk_ids, call.io.routing.topk_ids,
                                static_cast<std::size_t>(to.num_pairs()) * sizeof(std::int32_t));
}

}  // namespace

RoutingView route_tokens(const Call& call) {
  RoutingView routing = call.io.routing;
  if (!call.sizes.ready_routing) {
    const Logits logits = logits_of(call);
    routing = call.scratch.routing;
    if (routes_on_host(call.context)) {
      take_given_ids(call, routing);
      check_finite(call, route_on_host(call, logits.data, logits.stride, routing));
    } else {
      const ScopedZone zone(call.context, Zone::Route);
      take_given_ids(call, routing);
      op::Route route = route_by(*call.layer.router);
      route.logits = logits.data;
      route.row_stride = logits.stride;
      route.out = routing;
      route.scratch = call.scratch.route;
      check_finite(call, call.backend().route(call.context, route));
    }
  }
  if (call.io.routing_out.topk_ids != nullptr) {
    copy_routing(call, routing, call.io.routing_out);
  }
  return routing;
}

}  // namespace moesaic::forward

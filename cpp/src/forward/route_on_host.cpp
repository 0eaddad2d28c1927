/// The knob `route`: where the routing of a layer runs.

#include <vector>

#include "forward/steps.hpp"

namespace moesaic::forward {

bool routes_on_host(const Context& context) {
  return context.tuning().route == RouteMode::Host &&
         context.backend().device_type() != DeviceType::Cpu;
}

void check_route_mode(const char* operation, const Context& context) {
  require<ConfigError>(context.tuning().route != RouteMode::Device ||
                           context.backend().device_type() != DeviceType::Cpu,
                       [&] {
                         return Problem{.operation = operation,
                                        .what = "route",
                                        .expected = "auto or host: the layer lies on the CPU",
                                        .got = "device",
                                        .hint = {}};
                       });
  require<CaptureError>(!routes_on_host(context) || !context.backend().capturing(context), [&] {
    return Problem{.operation = operation,
                   .what = "route",
                   .expected = "auto or device while a graph is recorded",
                   .got = "host",
                   .hint = "the host would have to wait for the logits"};
  });
}

RouteStats route_on_host(const Call& call, const float* logits, std::int64_t row_stride,
                         const RoutingView& out) {
  Context& context = call.context;
  const Backend& backend = call.backend();
  const RouterConfig& config = *call.layer.router;
  const auto rows = static_cast<std::size_t>(out.num_tokens);
  const auto stride = static_cast<std::size_t>(row_stride);
  std::vector<float> host_logits((rows - 1) * stride +
                                 static_cast<std::size_t>(config.num_experts));
  Routing routing(out.num_tokens, out.top_k);
  {
    const ScopedZone zone(context, Zone::Download);
    backend.copy_on_stream(context, host_logits.data(), logits, host_logits.size() * sizeof(float));
    if (config.select_on == SelectOn::Given) {
      backend.copy_on_stream(context, routing.topk_ids().data(), out.topk_ids,
                             routing.topk_ids().size_bytes());
    }
    backend.synchronize(context);
  }
  RouteStats stats;
  {
    const ScopedZone zone(context, Zone::Route);
    std::vector<float> scratch(static_cast<std::size_t>(route_scratch_elems(config)));
    op::Route route = route_by(config);
    route.logits = host_logits.data();
    route.row_stride = row_stride;
    route.out = routing.view();
    route.scratch = scratch.data();
    stats = route_rows(route);
  }
  const ScopedZone zone(context, Zone::Upload);
  backend.copy_on_stream(context, out.topk_ids, routing.topk_ids().data(),
                         routing.topk_ids().size_bytes());
  backend.copy_on_stream(context, out.topk_weights, routing.topk_weights().data(),
                         routing.topk_weights().size_bytes());
  backend.synchronize(context);  // the copies read memory of this function
  return stats;
}

}  // namespace moesaic::forward

#include "forward/choose_path.hpp"
#include "forward/steps.hpp"

namespace moesaic::forward {
namespace {

/// Every token goes to expert 0 with weight 1 or sigmoid(gate . x).
RoutingView route_shared(const Call& call, Context& context) {
  const std::vector<float>& gate = call.layer.shared->gate;
  if (gate.empty()) return every_token_once(call);
  const RoutingView routing = call.scratch.token_routing;
  call.backend().router_logits(context, call.x, gate.data(), 1, call.scratch.logits);
  call.backend().shared_routing(context, call.scratch.logits, routing);
  return routing;
}

}  // namespace

void add_shared(const Call& call, const TensorView& sum, const Tuning& tuning) {
  const ScopedZone zone(call.context, Zone::Shared);
  // The phases would count their time a second time.
  Context context = call.context;
  context.attach(nullptr);

  const ExpertStack& stack = call.layer.shared->stack;
  const Scratch& s = call.scratch;
  const std::int64_t tokens = call.sizes.num_tokens;
  const Precision precision = choose_precision(tokens, 1, tuning).precision;
  const RoutingView routing = route_shared(call, context);
  const PhaseMaps maps = single_expert_maps(tokens);
  const DType working = call.backend().working_dtype(call.io.x.dtype);
  call.backend().gate_up(context, {.stack = &stack,
                                   .activation = call.layer.shared->activation,
                                   .rows = maps.gate_up,
                                   .x = call.x,
                                   .hidden = s.hidden,
                                   .working = working,
                                   .precision = precision,
                                   .gate_up = s.gate_up,
                                   .scratch = s.backend});
  call.backend().down(context, {.stack = &stack,
                                .rows = maps.down,
                                .hidden = s.hidden,
                                .hidden_rows = tokens,
                                .down_rows = s.rows,
                                .working = working,
                                .combine = {.rows = s.rows,
                                            .pair_row = nullptr,
                                            .routing = routing,
                                            .out = sum,
                                            .accumulate = true},
                                .precision = precision,
                                .scratch = s.backend});
}

}  // namespace moesaic::forward

#include "forward/choose_path.hpp"
#include "forward/steps.hpp"

namespace moesaic::forward {
namespace {

/// Every token goes to expert 0 with weight 1 or sigmoid(gate . x).
RoutingView route_shared(const Call& call, Context& context) {
  const std::vector<float>& gate = call.layer.shared->gate;
  if (gate.empty()) return every_token_once(call);
  const RoutingView routing = call.scratch.token_routing;
  call.backend().router_logits(
      context,
      {.x = call.x, .weight = gate.data(), .num_experts = 1, .logits = call.scratch.logits});
  call.backend().shared_routing(context, {.logits = call.scratch.logits, .out = routing});
  return routing;
}

}  // namespace

void add_shared(const Call& call, const TensorView& sum, const Tuning& tuning) {
  const ScopedZone zone(call.context, Zone::Shared);
  // The copy has no profiler: gate_up and down would open zones inside Zone::Shared, and their time
  // would count twice.
  Context context = call.context;
  context.attach(nullptr);

  const ExpertStack& stack = call.layer.shared->stack;
  const Scratch& s = call.scratch;
  const std::int64_t tokens = call.sizes.num_tokens;
  const Precision precision = choose_precision(tokens, 1, tuning).precision;
  const RoutingView routing = route_shared(call, context);
  const PhaseMaps maps = single_expert_maps(tokens);
  const DType working = call.backend().working_dtype(call.io.x.dtype);
  call.backend().gate_up(context, {.gate = stack.gate().view(),
                                   .up = stack.up().view(),
                                   .activation = call.layer.shared->activation,
                                   .map = maps.gate_up,
                                   .in = call.x,
                                   .hidden = s.hidden,
                                   .hidden_dtype = working,
                                   .precision = precision,
                                   .gate_up = s.gate_up,
                                   .scratch = s.backend});
  call.backend().down(context,
                      {.weight = stack.down().view(),
                       .map = maps.down,
                       .in = dense_rows(s.hidden, working, tokens, stack.shape().intermediate_size),
                       .rows = s.rows,
                       .combine = {.rows = s.rows,
                                   .rows_dtype = working,
                                   .routing = routing,
                                   .out = output_rows(sum),
                                   .accumulate = true},
                       .precision = precision,
                       .scratch = s.backend});
}

}  // namespace moesaic::forward

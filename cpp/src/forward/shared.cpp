#include <algorithm>
#include <cmath>

#include "forward/choose_path.hpp"
#include "forward/steps.hpp"

namespace moesaic::forward {
namespace {

/// Every token goes to expert 0 with weight 1 or sigmoid(gate . x).
RoutingView route_shared(const Call& call, Context& context) {
  const Scratch& s = call.scratch;
  const RoutingView routing = s.shared_routing;
  std::fill_n(routing.topk_ids, routing.num_tokens, 0);
  std::fill_n(routing.topk_weights, routing.num_tokens, 1.0F);
  if (!call.layer.shared->gate.empty()) {
    call.backend().router_logits(context, call.x, call.layer.shared->gate.data(), 1, s.logits);
    for (std::int64_t t = 0; t < routing.num_tokens; ++t) {
      routing.topk_weights[t] = 1.0F / (1.0F + std::exp(-s.logits[t]));
    }
  }
  return routing;
}

}  // namespace

void add_shared(const Call& call, const TensorView& sum, const Tuning& tuning) {
  const ScopedZone zone(call.context.profiler(), Zone::Shared);
  // The phases would count their time a second time.
  Context context = call.context;
  context.attach(nullptr);

  const ExpertStack& stack = call.layer.shared->stack;
  const Scratch& s = call.scratch;
  const std::int64_t tokens = call.sizes.num_tokens;
  const Precision precision = choose_precision(tokens, 1, tuning).precision;
  const RoutingView routing = route_shared(call, context);
  const PhaseMaps maps = single_expert_maps(tokens);
  call.backend().gate_up(context, {.stack = &stack,
                                   .activation = call.layer.activation,
                                   .rows = maps.gate_up,
                                   .x = call.x,
                                   .hidden = s.hidden,
                                   .precision = precision,
                                   .gate_up = s.gate_up,
                                   .scratch = s.backend});
  call.backend().down(context, {.stack = &stack,
                                .rows = maps.down,
                                .hidden = s.hidden,
                                .hidden_rows = tokens,
                                .down_rows = s.rows,
                                .combine = {.rows = s.rows,
                                            .pair_row = nullptr,
                                            .routing = routing,
                                            .out = sum,
                                            .accumulate = true},
                                .precision = precision,
                                .scratch = s.backend});
  if (sum.data == call.io.out.data) return;
  // A combine with weight 1 rounds the f32 sum to the output's type.
  std::fill_n(routing.topk_weights, tokens, 1.0F);
  call.backend().combine(context, {.rows = static_cast<const float*>(sum.data),
                                   .pair_row = nullptr,
                                   .routing = routing,
                                   .out = call.io.out,
                                   .accumulate = call.io.accumulate});
}

}  // namespace moesaic::forward

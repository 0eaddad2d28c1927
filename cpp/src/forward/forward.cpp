#include "moesaic/forward.hpp"

#include "forward/choose_path.hpp"
#include "forward/steps.hpp"
#include "moesaic/offload.hpp"

namespace moesaic {
namespace forward {
namespace {

TensorView f32_rows(const Call& call, float* data, std::int64_t cols) {
  return {data, DType::F32, {call.sizes.num_tokens, cols}, call.io.out.device};
}

/// Uploads, before anything is launched, what a device still lacks of the layer's host values.
void ready_host_values(const char* operation, Context& context, const LayerRef& layer,
                       const ForwardIo& io, const CallSizes& sizes) {
  const bool own_logits = !sizes.ready_routing && io.logits.data == nullptr;
  const auto norm = [](const RmsNorm* n) {
    return n != nullptr ? host_values(n->weight) : HostValues();
  };
  context.backend().before_launches(
      context, sizes.ready_routing ? nullptr : layer.router,
      {own_logits ? host_values(*layer.router_weight) : HostValues(),
       own_logits ? norm(layer.router_norm) : HostValues(), norm(layer.input_norm),
       layer.latent != nullptr ? norm(&layer.latent->norm) : HostValues(),
       layer.shared != nullptr ? host_values(layer.shared->gate) : HostValues(),
       io.token_ids.data != nullptr ? std::as_bytes(layer.token_experts) : HostValues()},
      operation);
}

/// A combine with weight 1 rounds the f32 sum to the output's type.
void round_sum(const Call& call) {
  const ScopedZone zone(call.context, Zone::Combine);
  call.backend().combine(call.context, {.rows = call.scratch.sum,
                                        .routing = every_token_once(call),
                                        .out = output_rows(call.io.out),
                                        .accumulate = call.io.accumulate});
}

}  // namespace

void make_ready(const char* operation, Context& context, const LayerRef& layer, const ForwardIo& io,
                const CallSizes& sizes) {
  check_supported(operation, context, layer);
  if (sizes.num_tokens == 0) return;
  if (context.backend().device_type() != DeviceType::Cpu) {
    check_device_ids(operation, context, layer, io);
  }
  if (!sizes.ready_routing) check_route_mode(operation, context);
  ready_host_values(operation, context, layer, io, sizes);
  if (context.profiler() != nullptr && context.profiler()->waits()) {
    const ScopedZone earlier_work(context, Zone::Sync);
  }
}

PathChoice choose(const Call& call, const RoutingView& pairs, const Tuning& tuning) {
  std::int64_t computed = call.sizes.num_pairs;
  if (call.backend().device_type() == DeviceType::Cpu) {
    computed = computed_pairs({pairs.topk_ids, static_cast<std::size_t>(computed)},
                              call.stack().num_experts());
  }
  return choose_path(call.sizes.num_tokens, computed, reachable_experts(call.layer), tuning);
}

ExpertPhases expert_phases(const Call& call, const RoutingView& routing, const RoutingView& pairs,
                           const PathChoice& choice) {
  const ExpertStack& stack = call.stack();
  const Scratch& s = call.scratch;
  InputRows in = project_down(call);
  const PhaseMaps maps =
      choice.path == Path::Gemv ? pair_maps(pairs) : plan_buckets(call, pairs, choice, in);
  const DType working = call.backend().working_dtype(call.io.x.dtype);
  return {
      {.gate = stack.gate().view(),
       .up = stack.up().view(),
       .activation = call.layer.activation,
       .map = maps.gate_up,
       .in = in,
       .hidden = s.hidden,
       .hidden_dtype = working,
       .precision = choice.precision,
       .row_weight = row_weights(call, routing, choice.row_space),
       .gate_up = s.gate_up,
       .scratch = s.backend},
      {.weight = stack.down().view(),
       .map = maps.down,
       .in = dense_rows(s.hidden, working, call.sizes.num_pairs, stack.shape().intermediate_size),
       .rows = s.rows,
       .precision = choice.precision,
       .scratch = s.backend},
      maps.pair_row};
}

void run_experts(const Call& call, const ExpertPhases& phases) {
  if (call.layer.residency != nullptr) {
    call.layer.residency->run(call.context, phases.gate_up, phases.down);
    return;
  }
  call.backend().gate_up(call.context, phases.gate_up);
  call.backend().down(call.context, phases.down);
}

Sums sums_of(const Call& call) {
  const LayerRef& layer = call.layer;
  Sums sums;
  sums.direct = call.scratch.sum == nullptr || call.io.out.dtype == DType::F32;
  sums.sum = sums.direct ? call.io.out : f32_rows(call, call.scratch.sum, layer.hidden_size());
  const bool latent = layer.latent != nullptr;
  sums.routed =
      latent ? f32_rows(call, call.scratch.latent_sum, layer.stack->shape().hidden_size) : sums.sum;
  sums.accumulate = !latent && sums.direct && call.io.accumulate;
  return sums;
}

op::Combine sum_of_rows(const Call& call, const RoutingView& pairs, const Sums& sums,
                        const void* rows, DType rows_dtype, const std::int32_t* pair_row) {
  return {.rows = rows,
          .rows_dtype = rows_dtype,
          .pair_row = pair_row,
          .routing = pairs,
          .out = output_rows(sums.routed),
          .accumulate = sums.accumulate,
          .num_experts = call.stack().num_experts()};
}

void add_rest(const Call& call, const RoutingView& routing, const Sums& sums,
              const Tuning& tuning) {
  if (call.layer.latent != nullptr) {
    project_up(call, sums.sum, sums.direct && call.io.accumulate);
  }
  add_identity(call, routing, sums.sum);
  if (call.layer.shared != nullptr) add_shared(call, sums.sum, tuning);
  if (!sums.direct) round_sum(call);
  call.backend().submit(call.context);
  call.context.throw_kept_error();
}

void run(const char* operation, Context& context, const LayerRef& layer, const ForwardIo& io,
         Workspace& workspace, const Tuning& tuning) {
  const CallSizes sizes = check_forward(operation, context.backend().device(), layer, io);
  make_ready(operation, context, layer, io, sizes);
  if (sizes.num_tokens == 0) return;
  const Workspace::Use use(workspace);
  const Scratch s =
      carve_workspace(operation, context, layer, sizes.top_k, sizes.num_tokens, workspace);
  const Call call{operation, context, layer, io, sizes, expert_input(context, layer, io, s), s};

  const RoutingView routing = route_tokens(call);
  const RoutingView pairs = expert_pairs(call, routing);
  if (context.backend().device_type() == DeviceType::Cpu) {
    check_kept(operation, layer, pairs);
  }
  count_call(call, pairs);

  ExpertPhases phases = expert_phases(call, routing, pairs, choose(call, pairs, tuning));
  const Sums sums = sums_of(call);
  phases.down.combine =
      sum_of_rows(call, pairs, sums, s.rows, phases.gate_up.hidden_dtype, phases.pair_row);
  run_experts(call, phases);
  add_rest(call, routing, sums, tuning);
}

}  // namespace forward

LayerRef::LayerRef(const MoeLayer& layer)
    : stack(&layer.stack()),
      router(&layer.config().router),
      activation(layer.config().activation),
      router_weight(&layer.router_weight()),
      shared(layer.shared()),
      latent(layer.latent()),
      input_norm(&layer.parts().input_norm),
      router_norm(&layer.parts().router_norm),
      separate_router_input(layer.config().router_input == RouterInput::Separate),
      token_experts(layer.parts().token_experts),
      residency(layer.parts().residency.get()) {}

void moe_forward(Context& context, const LayerRef& layer, const ForwardIo& io,
                 Workspace& workspace) {
  forward::run("moe_forward", context, layer, io, workspace, context.tuning());
}

}  // namespace moesaic

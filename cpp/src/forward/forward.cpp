#include "moesaic/forward.hpp"

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

void run(const char* operation, Context& context, const LayerRef& layer, const ForwardIo& io,
         Workspace& workspace, const Tuning& tuning) {
  const Backend& backend = context.backend();
  const CallSizes sizes = check_forward(operation, backend.device(), layer, io);
  check_supported(operation, context, layer);
  if (sizes.num_tokens == 0) return;
  if (backend.device_type() != DeviceType::Cpu) check_device_ids(operation, context, layer, io);
  if (!sizes.ready_routing) check_route_mode(operation, context);
  ready_host_values(operation, context, layer, io, sizes);

  if (context.profiler() != nullptr && context.profiler()->waits()) {
    const ScopedZone earlier_work(context, Zone::Sync);
  }
  const PathChoice choice =
      choose_path(sizes.num_tokens, sizes.top_k, layer.stack->shape(), tuning);
  const Workspace::Use use(workspace);
  const Scratch s =
      carve_workspace(operation, context, layer, sizes.top_k, sizes.num_tokens, workspace);
  const InputRows x = expert_input(context, layer, io, s);
  const Call call{operation, context, layer, io, sizes, x, s};

  const RoutingView routing = route_tokens(call);
  const RoutingView pairs = expert_pairs(call, routing);
  count_call(call, pairs);

  InputRows in = project_down(call);
  const PhaseMaps maps =
      choice.path == Path::Gemv ? pair_maps(pairs) : plan_buckets(call, pairs, choice, in);
  const DType working = backend.working_dtype(io.x.dtype);
  const op::GateUp gate_up{.gate = layer.stack->gate().view(),
                           .up = layer.stack->up().view(),
                           .activation = layer.activation,
                           .map = maps.gate_up,
                           .in = in,
                           .hidden = s.hidden,
                           .hidden_dtype = working,
                           .precision = choice.precision,
                           .row_weight = row_weights(call, routing, choice.row_space),
                           .gate_up = s.gate_up,
                           .scratch = s.backend};

  // Several terms are summed in f32 and rounded once.
  const bool direct = s.sum == nullptr || io.out.dtype == DType::F32;
  const TensorView sum = direct ? io.out : f32_rows(call, s.sum, layer.hidden_size());
  const bool accumulate = direct && io.accumulate;
  const bool latent = layer.latent != nullptr;
  const TensorView routed =
      latent ? f32_rows(call, s.latent_sum, layer.stack->shape().hidden_size) : sum;
  const op::Down down{
      .weight = layer.stack->down().view(),
      .map = maps.down,
      .in = dense_rows(s.hidden, working, sizes.num_pairs, layer.stack->shape().intermediate_size),
      .rows = s.rows,
      .combine = {.rows = s.rows,
                  .rows_dtype = working,
                  .pair_row = maps.pair_row,
                  .routing = pairs,
                  .out = output_rows(routed),
                  .accumulate = !latent && accumulate,
                  .num_experts = layer.stack->num_experts()},
      .precision = choice.precision,
      .scratch = s.backend};
  if (layer.residency != nullptr) {
    layer.residency->run(context, gate_up, down);
  } else {
    backend.gate_up(context, gate_up);
    backend.down(context, down);
  }
  if (latent) project_up(call, sum, accumulate);
  add_identity(call, routing, sum);
  if (layer.shared != nullptr) add_shared(call, sum, tuning);
  if (!direct) round_sum(call);
  backend.submit(context);
  context.throw_kept_error();
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

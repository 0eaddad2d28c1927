#include "moesaic/forward.hpp"

#include "forward/steps.hpp"

namespace moesaic {
namespace forward {

void run(const char* operation, Context& context, const LayerRef& layer, const ForwardIo& io,
         Workspace& workspace, const Tuning& tuning) {
  const Backend& backend = context.backend();
  const CallSizes sizes = check_forward(operation, backend.device_type(), layer, io);
  check_supported(operation, context, layer);
  if (sizes.num_tokens == 0) return;

  const PathChoice choice =
      choose_path(sizes.num_tokens, sizes.top_k, layer.stack->shape(), tuning);
  const Workspace::Use use(workspace);
  const Scratch s =
      carve_workspace(operation, context, layer, sizes.top_k, sizes.num_tokens, workspace);
  const InputRows x = input_rows(io.x, operation, "x");
  const Call call{operation, context, layer, io, sizes, x, s};

  const RoutingView routing = route_tokens(call);
  count_call(call, routing);

  InputRows in = x;
  const PhaseMaps maps =
      choice.path == Path::Gemv ? pair_maps(routing) : plan_buckets(call, routing, choice, in);
  backend.gate_up(context, {.stack = layer.stack,
                            .activation = layer.activation,
                            .rows = maps.gate_up,
                            .x = in,
                            .hidden = s.hidden,
                            .precision = choice.precision,
                            .gate_up = s.gate_up,
                            .scratch = s.backend});

  // With shared experts a narrow output is summed in f32 and rounded once.
  const bool direct = layer.shared == nullptr || io.out.dtype == DType::F32;
  const TensorView sum =
      direct ? io.out
             : TensorView(s.sum, DType::F32, {sizes.num_tokens, layer.stack->shape().hidden_size},
                          io.out.device);
  backend.down(context, {.stack = layer.stack,
                         .rows = maps.down,
                         .hidden = s.hidden,
                         .hidden_rows = sizes.num_pairs,
                         .down_rows = s.rows,
                         .combine = {.rows = s.rows,
                                     .pair_row = maps.pair_row,
                                     .routing = routing,
                                     .out = sum,
                                     .accumulate = direct && io.accumulate},
                         .precision = choice.precision,
                         .scratch = s.backend});
  if (layer.shared != nullptr) add_shared(call, sum, tuning);
}

}  // namespace forward

LayerRef::LayerRef(const MoeLayer& layer)
    : stack(&layer.stack()),
      router(&layer.config().router),
      activation(layer.config().activation),
      router_weight(&layer.router_weight()),
      shared(layer.shared()) {}

void moe_forward(Context& context, const LayerRef& layer, const ForwardIo& io,
                 Workspace& workspace) {
  forward::run("moe_forward", context, layer, io, workspace, context.tuning());
}

}  // namespace moesaic

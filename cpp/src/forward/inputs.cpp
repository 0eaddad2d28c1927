/// What the experts and the router read: x, or a norm or a projection of it.

#include "forward/choose_path.hpp"
#include "forward/parts.hpp"
#include "forward/steps.hpp"

namespace moesaic::forward {
namespace {

/// `x` under the norm, in `to`; `x` itself without one.
InputRows norm_rows(Context& context, const RmsNorm* norm, const InputRows& x, float* to) {
  if (!has_norm(norm)) return x;
  context.backend().rms_norm(context,
                             {.x = x, .weight = norm->weight.data(), .eps = norm->eps, .out = to});
  return dense_rows(to, DType::F32, x.num_rows, x.cols);
}

}  // namespace

InputRows expert_input(Context& context, const LayerRef& layer, const ForwardIo& io,
                       const Scratch& scratch) {
  return norm_rows(context, layer.input_norm, input_rows(io.x), scratch.normed);
}

InputRows router_input(const Call& call) {
  const ForwardIo& io = call.io;
  const bool own_norm = has_norm(call.layer.router_norm);
  const InputRows rows = io.router_input.data != nullptr ? input_rows(io.router_input)
                                                         : (own_norm ? input_rows(io.x) : call.x);
  // The rows of the experts are not needed yet.
  return norm_rows(call.context, call.layer.router_norm, rows, call.scratch.rows);
}

InputRows project_down(const Call& call) {
  if (call.layer.latent == nullptr) return call.x;
  const ScopedZone zone(call.context, Zone::GateUp);
  const std::int64_t tokens = call.sizes.num_tokens;
  const std::int64_t width = call.stack().shape().hidden_size;
  call.backend().linear(call.context,
                        {.weight = call.layer.latent->projections.up().view(),
                         .in = call.x,
                         .out = {call.scratch.latent, DType::F32, width, width},
                         .precision = choose_precision(tokens, 1, call.context.tuning()).precision,
                         .scratch = call.scratch.backend});
  return dense_rows(call.scratch.latent, DType::F32, tokens, width);
}

void project_up(const Call& call, const TensorView& sum, bool accumulate) {
  const ScopedZone zone(call.context, Zone::Down);
  const Scratch& s = call.scratch;
  const LatentExperts& latent = *call.layer.latent;
  const std::int64_t tokens = call.sizes.num_tokens;
  const std::int64_t width = call.stack().shape().hidden_size;
  const InputRows rows = norm_rows(call.context, &latent.norm,
                                   dense_rows(s.latent_sum, DType::F32, tokens, width), s.latent);
  call.backend().linear(call.context,
                        {.weight = latent.projections.down().view(),
                         .in = rows,
                         .out = output_rows(sum),
                         .accumulate = accumulate,
                         .precision = choose_precision(tokens, 1, call.context.tuning()).precision,
                         .rows = s.rows,
                         .once = s.token_routing,
                         .scratch = s.backend});
}

}  // namespace moesaic::forward

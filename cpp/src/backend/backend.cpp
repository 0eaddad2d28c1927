#include "moesaic/backend.hpp"

#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic {

void Backend::refuse(const char* operation) const {
  const BackendInfo facts = info();
  if (!facts.available) throw DeviceError(Problem{facts.name, "backend", "", facts.reason, ""});
  throw UnsupportedError(Problem{.operation = operation,
                                 .what = "backend",
                                 .expected = "one that has this operation",
                                 .got = facts.name,
                                 .hint = {}});
}

// ---------------------------------------------------------------------------------- memory ----

void* Backend::allocate(std::size_t) const { refuse("allocate"); }
void Backend::deallocate(void*, std::size_t) const noexcept {}
void Backend::copy(void*, const void*, std::size_t) const { refuse("copy"); }
void Backend::synchronize(Context&) const { refuse("synchronize"); }
void Backend::fill(Context&, const op::Fill&) const { refuse("fill"); }
void Backend::prepare(ExpertStack::Parts&, const LoadOptions&) const { refuse("prepare"); }
std::size_t Backend::scratch_bytes(const ScratchQuery&) const { refuse("scratch_bytes"); }

void Backend::copy_on_stream(Context&, void* to, const void* from, std::size_t bytes) const {
  copy(to, from, bytes);
}

SharedHandle Backend::share_handle(void*) const { refuse("share_handle"); }

std::shared_ptr<void> Backend::upload(const void* from, std::size_t bytes) const {
  if (bytes == 0) return nullptr;
  const std::shared_ptr<void> memory(allocate(bytes),
                                     [this, bytes](void* p) { deallocate(p, bytes); });
  copy(memory.get(), from, bytes);
  return memory;
}

void Backend::before_launches(Context&, const RouterConfig*, std::initializer_list<HostValues>,
                              std::string_view) const {}

std::int64_t Backend::route_scratch(const RouterRules& router, std::int64_t, int threads) const {
  return route_scratch_elems(router) * threads;
}

void Backend::check_ids(Context&, const RoutingView& routing, std::int32_t num_experts,
                        std::string_view operation) const {
  moesaic::check_ids(routing, num_experts, operation);
}

std::string Backend::kernel_name(const WeightRef&, const Tuning&) const { return "none"; }

std::string Backend::down_name(const WeightRef& weight, const Tuning& tuning, std::int64_t,
                               bool) const {
  return kernel_name(weight, tuning);
}

// ------------------------------------------------------------------------------ operations ----

void Backend::router_logits(Context&, const op::RouterLogits&) const { refuse("router_logits"); }
RouteStats Backend::route(Context&, const op::Route&) const { refuse("route"); }
void Backend::look_up_experts(Context&, const op::LookUpExperts&) const {
  refuse("look_up_experts");
}
void Backend::shared_routing(Context&, const op::SharedRouting&) const { refuse("shared_routing"); }
void Backend::bucket_plan(Context&, const op::BucketPlan&) const { refuse("bucket_plan"); }
void Backend::align(Context&, const op::Align&) const { refuse("align"); }
void Backend::gather(Context&, const op::Gather&) const { refuse("gather"); }
void Backend::expert_gemm(Context&, const op::Gemm&) const { refuse("expert_gemm"); }
void Backend::activate(Context&, const op::Activate&) const { refuse("activate"); }
void Backend::combine(Context&, const op::Combine&) const { refuse("combine"); }
void Backend::zero_skipped(Context&, const op::ZeroSkipped&) const { refuse("zero_skipped"); }
void Backend::rms_norm(Context&, const op::RmsNorm&) const { refuse("rms_norm"); }
void Backend::add_identity(Context&, const op::AddIdentity&) const { refuse("add_identity"); }

void Backend::linear(Context& context, const op::Linear& call) const {
  const auto rows = static_cast<std::int32_t>(call.in.num_rows);
  const bool direct = call.out.dtype == DType::F32 && !call.accumulate &&
                      (rows == 1 || call.out.stride == call.out.cols);
  expert_gemm(context, {.weight = call.weight,
                        .map = {.num_segments = 1, .width = rows, .limit = rows},
                        .in = call.in,
                        .out = direct ? call.out.data : call.rows,
                        .precision = call.precision,
                        .scratch = call.scratch});
  if (direct) return;
  shared_routing(context, {.out = call.once});
  combine(
      context,
      {.rows = call.rows, .routing = call.once, .out = call.out, .accumulate = call.accumulate});
}

void Backend::gate_up(Context& context, const op::GateUp& call) const {
  const std::int64_t rows = call.map.limit;
  const std::int64_t intermediate = call.up.ref.rows;
  const bool gated = static_cast<bool>(call.gate.ref);
  const op::Activate activation{.activation = call.activation,
                                .gate = gated ? call.gate_up : nullptr,
                                .up = call.gate_up + (gated ? rows * intermediate : 0),
                                .row_stride = intermediate,
                                .rows = rows,
                                .intermediate = intermediate,
                                .hidden = static_cast<float*>(call.hidden)};
  {
    const ScopedZone zone(context, Zone::GateUp);
    op::Gemm gemm{.weight = call.gate,
                  .map = call.map,
                  .in = call.in,
                  .out = call.gate_up,
                  .precision = call.precision,
                  .scratch = call.scratch};
    if (gated) expert_gemm(context, gemm);
    gemm.weight = call.up;
    gemm.out = call.gate_up + (gated ? rows * intermediate : 0);
    expert_gemm(context, gemm);
  }
  const ScopedZone zone(context, Zone::Activate);
  activate(context, activation);
}

void Backend::down(Context& context, const op::Down& call) const {
  {
    const ScopedZone zone(context, Zone::Down);
    expert_gemm(context, {.weight = call.weight,
                          .map = call.map,
                          .in = call.in,
                          .out = call.rows,
                          .precision = call.precision,
                          .scratch = call.scratch});
  }
  const ScopedZone zone(context, Zone::Combine);
  combine(context, call.combine);
}

}  // namespace moesaic

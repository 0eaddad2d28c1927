#include "moesaic/backend.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

[[noreturn]] void throw_unsupported(const Backend& backend, LayerPart part) {
  throw UnsupportedError(Problem{backend.info().name, name_of(part), "a backend that runs them",
                                 std::string(backend.supports_part(part).reason), ""});
}

}  // namespace

void Backend::copy_on_stream(Context&, void* to, const void* from, std::size_t bytes) const {
  copy(to, from, bytes);
}

void Backend::fill(const Context&, void* memory, std::uint8_t value, std::size_t bytes) const {
  std::memset(memory, value, bytes);
}

std::int64_t Backend::route_scratch(const RouterConfig& config, std::int64_t, int threads) const {
  return route_scratch_elems(config) * threads;
}

void Backend::check_ids(Context&, const RoutingView& routing, std::int32_t num_experts,
                        std::string_view operation) const {
  moesaic::check_ids(routing, num_experts, operation);
}

void Backend::look_up_experts(Context&, std::span<const std::int32_t> table,
                              const std::int32_t* token_ids, RoutingView out) const {
  for (std::int64_t t = 0; t < out.num_tokens; ++t) {
    const std::int64_t first = std::int64_t{token_ids[t]} * out.top_k;
    std::copy_n(table.data() + first, out.top_k, out.topk_ids + t * out.top_k);
  }
}

void Backend::shared_routing(Context&, const float* logits, RoutingView out) const {
  for (std::int64_t t = 0; t < out.num_tokens; ++t) {
    out.topk_ids[t] = 0;
    out.topk_weights[t] = logits != nullptr ? 1.0F / (1.0F + std::exp(-logits[t])) : 1.0F;
  }
}

void Backend::zero_skipped(Context&, const std::int32_t* ids, std::int32_t, std::int64_t rows,
                           std::int64_t cols, float* out) const {
  for (std::int64_t r = 0; r < rows; ++r) {
    if (ids[r] < 0) std::fill_n(out + r * cols, cols, 0.0F);
  }
}

std::shared_ptr<void> Backend::upload(const void* from, std::size_t bytes) const {
  if (bytes == 0) return nullptr;
  const std::shared_ptr<void> memory(allocate(bytes),
                                     [this, bytes](void* p) { deallocate(p, bytes); });
  copy(memory.get(), from, bytes);
  return memory;
}

void Backend::rms_norm(Context&, const InputRows&, const float*, float, float*) const {
  throw_unsupported(*this, LayerPart::Norms);
}

void Backend::add_identity(Context&, const IdentityCall&) const {
  throw_unsupported(*this, LayerPart::IdentityExperts);
}

void Backend::gate_up(Context& context, const GateUpCall& call) const {
  const ExpertStack& stack = *call.stack;
  const std::int64_t rows = call.rows.limit;
  const std::int64_t intermediate = stack.shape().intermediate_size;
  GemmCall gemm{.weights = &stack.gate(),
                .rows = call.rows,
                .in = call.x,
                .out = call.gate_up,
                .precision = call.precision,
                .scratch = call.scratch};
  const float* gate = nullptr;
  {
    const ScopedZone zone(context, Zone::GateUp);
    if (stack.gated()) {
      expert_gemm(context, gemm);
      gate = gemm.out;
      gemm.out += rows * intermediate;
    }
    gemm.weights = &stack.up();
    expert_gemm(context, gemm);
  }
  const ScopedZone zone(context, Zone::Activate);
  activate(context, call.activation, gate, gemm.out, intermediate, rows, intermediate, call.hidden);
}

std::string Backend::down_name(const WeightRef& weight, const Tuning& tuning, std::int64_t,
                               bool) const {
  return kernel_name(weight, tuning);
}

void Backend::down(Context& context, const DownCall& call) const {
  const std::int64_t intermediate = call.stack->shape().intermediate_size;
  const InputRows hidden{.data = call.hidden,
                         .dtype = DType::F32,
                         .num_rows = call.hidden_rows,
                         .cols = intermediate,
                         .inner_count = 1,
                         .outer_stride = intermediate,
                         .inner_stride = 0};
  {
    const ScopedZone zone(context, Zone::Down);
    expert_gemm(context, GemmCall{.weights = &call.stack->down(),
                                  .rows = call.rows,
                                  .in = hidden,
                                  .out = call.down_rows,
                                  .precision = call.precision,
                                  .scratch = call.scratch});
  }
  const ScopedZone zone(context, Zone::Combine);
  CombineCall sum = call.combine;
  sum.rows = call.down_rows;
  combine(context, sum);
}

}  // namespace moesaic

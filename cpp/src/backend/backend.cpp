#include "moesaic/backend.hpp"

#include "moesaic/context.hpp"

namespace moesaic {

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
    const ScopedZone zone(context.profiler(), Zone::GateUp);
    if (stack.gated()) {
      expert_gemm(context, gemm);
      gate = gemm.out;
      gemm.out += rows * intermediate;
    }
    gemm.weights = &stack.up();
    expert_gemm(context, gemm);
  }
  const ScopedZone zone(context.profiler(), Zone::Activate);
  activate(context, call.activation, gate, gemm.out, intermediate, rows, intermediate, call.hidden);
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
    const ScopedZone zone(context.profiler(), Zone::Down);
    expert_gemm(context, GemmCall{.weights = &call.stack->down(),
                                  .rows = call.rows,
                                  .in = hidden,
                                  .out = call.down_rows,
                                  .precision = call.precision,
                                  .scratch = call.scratch});
  }
  const ScopedZone zone(context.profiler(), Zone::Combine);
  CombineCall sum = call.combine;
  sum.rows = call.down_rows;
  combine(context, sum);
}

}  // namespace moesaic

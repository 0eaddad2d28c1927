/// The products of CudaBackend: expert_gemm and the two phases.

#include <algorithm>

#include "cuda/backend/arguments.hpp"
#include "cuda/backend/cuda_backend.hpp"
#include "moesaic/context.hpp"

namespace moesaic::cuda {
namespace {

/// Bytes that scratch_bytes promised for a call of this size.
GemmScratchArgs scratch_args(const WeightRef& weight, const RowMap& map, std::int64_t num_in,
                             bool separate) {
  return {.num_rows = map.limit,
          .num_in = num_in,
          .cols = std::max(weight.cols, weight.int4.packed_cols),
          .out_cols = weight.rows,
          .num_experts = weight.num_experts,
          .separate = separate ? 1 : 0};
}

}  // namespace

void CudaBackend::expert_gemm(Context& context, const GemmCall& call) const {
  const WeightRef& weight = call.weights->ref;
  const GemmScratchArgs sizes = scratch_args(weight, call.rows, call.in.num_rows, false);
  const GemmArgs args{.weight = weight_args(*call.weights),
                      .map = map_args(call.rows),
                      .in = rows_args(call.in),
                      .out = call.out,
                      .out_dtype = kF32,
                      .exact = call.precision == Precision::Fast ? 0 : 1,
                      .batch_invariant = context.tuning().batch_invariant ? 1 : 0,
                      .scratch = call.scratch,
                      .scratch_bytes = table().gemm_scratch_bytes(&sizes)};
  gpu_->run("expert_gemm", table().gemm, args, context.stream());
}

void CudaBackend::gate_up(Context& context, const GateUpCall& call) const {
  const ScopedZone zone(context, Zone::GateUp);
  const ExpertStack& stack = *call.stack;
  const WeightRef& up = stack.up().ref;
  const bool separate = stack.gated() && !stack.shares_units();
  GemmScratchArgs sizes = scratch_args(up, call.rows, call.x.num_rows, separate);
  // Groups of its own may pad gate to more columns than up.
  if (stack.gated()) sizes.cols = std::max(sizes.cols, stack.gate().ref.int4.packed_cols);
  const GateUpArgs args{.gate = stack.gated() ? weight_args(stack.gate()) : WeightArgs{},
                        .up = weight_args(stack.up()),
                        .activation = activation_args(call.activation),
                        .map = map_args(call.rows),
                        .in = rows_args(call.x),
                        .row_weight = call.row_weight,
                        .hidden = call.hidden,
                        .hidden_dtype = static_cast<std::int32_t>(call.working),
                        .exact = call.precision == Precision::Fast ? 0 : 1,
                        .batch_invariant = context.tuning().batch_invariant ? 1 : 0,
                        .scratch = call.scratch,
                        .scratch_bytes = table().gemm_scratch_bytes(&sizes)};
  gpu_->run("gate_up", table().gate_up, args, context.stream());
}

void CudaBackend::down(Context& context, const DownCall& call) const {
  const ScopedZone zone(context, Zone::Down);
  const WeightRef& weight = call.stack->down().ref;
  const GemmScratchArgs sizes = scratch_args(weight, call.rows, call.hidden_rows, false);
  DownArgs args{.weight = weight_args(call.stack->down()),
                .map = map_args(call.rows),
                .in = dense_rows(call.hidden, call.working, call.hidden_rows, weight.cols),
                .rows = call.down_rows,
                .combine = combine_args(call.combine),
                .exact = call.precision == Precision::Fast ? 0 : 1,
                .batch_invariant = context.tuning().batch_invariant ? 1 : 0,
                .scratch = call.scratch,
                .scratch_bytes = table().gemm_scratch_bytes(&sizes)};
  args.combine.rows_dtype = static_cast<std::int32_t>(call.working);
  gpu_->run("down", table().down, args, context.stream());
}

}  // namespace moesaic::cuda

/// The small steps around the products, by name: rows to packed order, the activation, the weighted
/// sums.

#include <string>

#include "moesaic/forward.hpp"
#include "ops/call_memory.hpp"
#include "ops/check_tensor.hpp"

namespace moesaic {
namespace {

void check_plan(const char* operation, const BucketPlan& plan, const RoutingView& routing) {
  require<ShapeError>(
      plan.num_tokens() == routing.num_tokens && plan.top_k() == routing.top_k, [&] {
        return Problem{.operation = operation,
                       .what = "routing",
                       .expected = "the plan's " + std::to_string(plan.num_tokens()) +
                                   " tokens of top_k " + std::to_string(plan.top_k()),
                       .got = std::to_string(routing.num_tokens) + " tokens of top_k " +
                              std::to_string(routing.top_k),
                       .hint = {}};
      });
}

/// Sums rows of pairs by the routing; `pair_row` says where each pair's row is. `rows` has been
/// checked and is dense.
void combine_rows(const char* operation, const char* name, Context& context,
                  const ConstTensorView& rows, const std::int32_t* pair_row,
                  const RoutingView& routing, const TensorView& out, bool accumulate) {
  const Backend& backend = context.backend();
  ops::check_out(operation, backend.device(), out, routing.num_tokens, out.dim(1));
  ops::check_apart(operation, name, rows, out);
  if (out.empty()) return;
  backend.combine(context, {.rows = rows.data,
                            .pair_row = pair_row,
                            .routing = routing,
                            .out = output_rows(out),
                            .accumulate = accumulate});
}

/// `combine` without the wait at its end; `memory` lives until then.
void combine_buckets(ops::CallMemory& memory, Context& context, const ConstTensorView& rows,
                     const BucketPlan& plan, const RoutingView& routing, TensorView out,
                     bool accumulate) {
  constexpr const char* kName = "combine";
  check_plan(kName, plan, routing);
  if (out.rank != 2) ops::wrong_shape(kName, "out", "[T, H]", out);
  ops::check_dense(kName, "rows", context.backend().device(), rows, DType::F32,
                   {plan.num_pairs(), out.dim(1)});
  const std::int32_t* const pair_row = memory.on_device(plan.pair_row());
  combine_rows(kName, "rows", context, rows, pair_row, routing, out, accumulate);
}

/// `weighted_sum` without the wait at its end.
void sum_pairs(Context& context, const ConstTensorView& pairs, const RoutingView& routing,
               TensorView out, bool accumulate) {
  constexpr const char* kName = "weighted_sum";
  if (out.rank != 2) ops::wrong_shape(kName, "out", "[T, H]", out);
  const Device device = context.backend().device();
  // As [T, top_k, H] or flat.
  if (pairs.rank == 3) {
    ops::check_dense(kName, "pairs", device, pairs, DType::F32,
                     {routing.num_tokens, routing.top_k, out.dim(1)});
  } else {
    ops::check_dense(kName, "pairs", device, pairs, DType::F32, {routing.num_pairs(), out.dim(1)});
  }
  combine_rows(kName, "pairs", context, pairs, nullptr, routing, out, accumulate);
}

}  // namespace

void gather_rows(Context& context, const ConstTensorView& x, const BucketPlan& plan,
                 TensorView out) {
  constexpr const char* kName = "gather_rows";
  const Device device = context.backend().device();
  if (x.rank != 2 || x.dim(0) != plan.num_tokens()) {
    ops::wrong_shape(kName, "x", "[" + std::to_string(plan.num_tokens()) + ", H]", x);
  }
  ops::check_input(kName, "x", device, x);
  const std::int64_t cols = x.dim(1);
  ops::check_dense(kName, "out", device, out, DType::F32, {plan.num_pairs(), cols});
  ops::check_apart(kName, "x", x, out);
  if (out.empty()) return;
  const Backend& backend = context.backend();
  const std::int64_t used = plan.num_rows();
  ops::CallMemory memory(kName, context);
  const std::int32_t* const index =
      memory.on_device(plan.row_token().first(static_cast<std::size_t>(used)));
  auto* rows = static_cast<float*>(out.data);
  if (used > 0) {
    backend.gather(context, {.x = input_rows(x), .index = index, .rows = used, .out = rows});
  }
  if (used < plan.num_pairs()) {
    const std::int64_t left = (plan.num_pairs() - used) * cols;
    backend.fill(context, {.data = rows + used * cols,
                           .bytes = left * static_cast<std::int64_t>(sizeof(float))});
  }
  memory.finish();
}

void silu_mul(Context& context, const ConstTensorView& gate_up, TensorView out) {
  constexpr const char* kName = "silu_mul";
  const Device device = context.backend().device();
  if (gate_up.rank != 2 || gate_up.dim(1) % 2 != 0) {
    ops::wrong_shape(kName, "gate_up", "[P, 2I]", gate_up);
  }
  const std::int64_t rows = gate_up.dim(0), intermediate = gate_up.dim(1) / 2;
  ops::check_dense(kName, "gate_up", device, gate_up, DType::F32, {rows, 2 * intermediate});
  ops::check_dense(kName, "out", device, out, DType::F32, {rows, intermediate});
  ops::check_apart(kName, "gate_up", gate_up, out);
  if (out.empty()) return;
  const auto* gate = static_cast<const float*>(gate_up.data);
  context.backend().activate(context, {.activation = {},
                                       .gate = gate,
                                       .up = gate + intermediate,
                                       .row_stride = 2 * intermediate,
                                       .rows = rows,
                                       .intermediate = intermediate,
                                       .hidden = static_cast<float*>(out.data)});
  context.backend().submit(context);
  context.throw_kept_error();
}

void combine(Context& context, const ConstTensorView& rows, const BucketPlan& plan,
             const RoutingView& routing, TensorView out, bool accumulate) {
  ops::CallMemory memory("combine", context);
  combine_buckets(memory, context, rows, plan, routing, out, accumulate);
  memory.finish();
}

void combine(Context& context, const ConstTensorView& rows, const BucketPlan& plan,
             const Routing& routing, TensorView out, bool accumulate) {
  ops::CallMemory memory("combine", context);
  combine_buckets(memory, context, rows, plan, memory.on_device(routing), out, accumulate);
  memory.finish();
}

void weighted_sum(Context& context, const ConstTensorView& pairs, const RoutingView& routing,
                  TensorView out, bool accumulate) {
  sum_pairs(context, pairs, routing, out, accumulate);
  context.backend().submit(context);
  context.throw_kept_error();
}

void weighted_sum(Context& context, const ConstTensorView& pairs, const Routing& routing,
                  TensorView out, bool accumulate) {
  ops::CallMemory memory("weighted_sum", context);
  sum_pairs(context, pairs, memory.on_device(routing), out, accumulate);
  memory.finish();
}

}  // namespace moesaic

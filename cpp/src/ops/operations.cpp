#include <string>

#include "forward/choose_path.hpp"
#include "ops/call_memory.hpp"
#include "ops/check.hpp"

namespace moesaic {
namespace {

[[noreturn]] void wrong_shape(const char* operation, const char* name, const std::string& expected,
                              const ConstTensorView& got) {
  throw ShapeError(Problem{.operation = operation,
                           .what = std::string(name) + ".shape",
                           .expected = expected,
                           .got = describe(got),
                           .hint = {}});
}

const RoleWeights& role_of(const char* operation, const Context& context, const ExpertStack& stack,
                           Role role) {
  const RoleWeights& weights = stack.role(role);
  require<ShapeError>(static_cast<bool>(weights.ref), [&] {
    return Problem{.operation = operation,
                   .what = name_of(role),
                   .expected = "weights of this role",
                   .got = "none (the experts are ungated)",
                   .hint = {}};
  });
  require<DeviceError>(stack.device() == context.backend().device(), [&] {
    return Problem{.operation = operation,
                   .what = "expert weights",
                   .expected = "on " + to_string(context.backend().device()),
                   .got = to_string(stack.device()),
                   .hint = "load them with device="};
  });
  const Support support = context.backend().supports(weights.ref);
  require<UnsupportedError>(support.ok, [&] {
    return Problem{
        .operation = operation,
        .what = std::string(name_of(role)) + " weights",
        .expected = "a type that runs",
        .got = std::string(traits(weights.ref.type).name) + ": " + std::string(support.reason),
        .hint = {}};
  });
  return weights;
}

Precision decide(Precision asked, const Context& context, std::int64_t pairs,
                 std::int32_t experts) {
  if (asked != Precision::Auto) return asked;
  return forward::choose_precision(pairs, experts, context.tuning()).precision;
}

/// The arguments of an expert GEMV, checked: a row map over the slots and the rows of x.
struct GemvCall {
  RowMap map;
  InputRows x;
  std::int64_t num_tokens, num_pairs;
  std::int32_t top_k;
};

GemvCall check_gemv(const char* operation, Context& context, const StackShape& shape,
                    std::int64_t cols, std::int64_t rows, const ConstTensorView& x,
                    const ConstTensorView& ids, const ConstTensorView& out) {
  const DeviceType device = context.backend().device_type();
  forward::check_same_device(operation, context.backend().device(),
                             {{"x", x}, {"ids", ids}, {"out", out}});
  if (ids.rank != 1 && ids.rank != 2) wrong_shape(operation, "ids", "[k] or [T, k]", ids);
  const bool batched = ids.rank == 2;
  const std::int64_t tokens = batched ? ids.dim(0) : 1;
  const std::int64_t top_k = ids.dim(ids.rank - 1);
  if (batched) {
    forward::check_dense(operation, "ids", device, ids, DType::I32, {tokens, top_k});
    forward::check_dense(operation, "out", device, out, DType::F32, {tokens, top_k, rows});
  } else {
    forward::check_dense(operation, "ids", device, ids, DType::I32, {top_k});
    forward::check_dense(operation, "out", device, out, DType::F32, {top_k, rows});
  }
  if (tokens * top_k > INT32_MAX / 2) wrong_shape(operation, "ids", "at most 2^30 elements", ids);

  GemvCall call;
  call.num_tokens = tokens;
  call.top_k = static_cast<std::int32_t>(top_k);
  call.num_pairs = tokens * top_k;
  const auto pairs = static_cast<std::int32_t>(call.num_pairs);
  call.map = {
      .num_segments = pairs, .expert = static_cast<const std::int32_t*>(ids.data), .limit = pairs};
  forward::check_float_tensor(operation, "x", device, x);
  const bool per_slot = batched ? x.rank == 3 && x.dim(0) == tokens && x.dim(1) == top_k
                                : x.rank == 2 && x.dim(0) == top_k;
  const bool per_token = batched && x.rank == 2 && x.dim(0) == tokens;
  if (!(per_slot || per_token || x.rank == 1) || x.dim(x.rank - 1) != cols) {
    const std::string k = std::to_string(cols);
    wrong_shape(operation, "x",
                batched ? "[" + k + "], [T, " + k + "] or [T, k, " + k + "]"
                        : "[" + k + "] or [k, " + k + "]",
                x);
  }
  if (call.num_pairs == 0) return call;
  require<ShapeError>(x.data != nullptr, [&] {
    return Problem{.operation = operation,
                   .what = "x.data",
                   .expected = "memory for " + describe(x),
                   .got = "null",
                   .hint = {}};
  });
  call.x = input_rows(x, operation, "x");
  if (per_token) call.map.source_divisor = call.top_k;
  if (x.rank == 1) call.map.source_divisor = pairs;
  const RoutingView view{const_cast<std::int32_t*>(call.map.expert), nullptr, tokens, call.top_k};
  context.backend().check_ids(context, view, shape.num_experts, operation);
  return call;
}

/// Of a product over `pairs` rows of one role; gate and up never meet in it.
ScratchQuery query_of(const ExpertStack& stack, std::int64_t tokens, std::int32_t top_k,
                      std::int64_t pairs) {
  return {stack.shape(), tokens, top_k, pairs, stack.packed_cols(), true};
}

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

/// Checked rows, dense on the device, summed as the routing and the way from pair to row say.
void combine_rows(const char* operation, const char* name, Context& context,
                  const ConstTensorView& rows, const std::int32_t* pair_row,
                  const RoutingView& routing, const TensorView& out, bool accumulate) {
  const Backend& backend = context.backend();
  forward::check_out(operation, backend.device_type(), out, routing.num_tokens, out.dim(1));
  forward::check_same_device(operation, backend.device(), {{name, rows}, {"out", out}});
  if (out.empty()) return;
  backend.combine(context, {.rows = static_cast<const float*>(rows.data),
                            .pair_row = pair_row,
                            .routing = routing,
                            .out = out,
                            .accumulate = accumulate});
}

}  // namespace

void expert_gemv(Context& context, const ExpertStack& stack, Role role, const ConstTensorView& x,
                 const ConstTensorView& ids, TensorView out, Precision precision) {
  constexpr const char* kName = "expert_gemv";
  const RoleWeights& weights = role_of(kName, context, stack, role);
  const GemvCall call =
      check_gemv(kName, context, stack.shape(), weights.ref.cols, weights.ref.rows, x, ids, out);
  if (call.num_pairs == 0) return;
  const Backend& backend = context.backend();
  forward::CallMemory memory(kName, context);
  std::byte* const scratch = memory.take(
      backend.scratch_bytes(query_of(stack, call.num_tokens, call.top_k, call.num_pairs)));
  auto* y = static_cast<float*>(out.data);
  backend.zero_skipped(context, call.map.expert, stack.num_experts(), call.num_pairs,
                       weights.ref.rows, y);
  backend.expert_gemm(context,
                      {.weights = &weights,
                       .rows = call.map,
                       .in = call.x,
                       .out = y,
                       .precision = decide(precision, context, call.num_pairs, stack.num_experts()),
                       .scratch = scratch});
}

void expert_gemv_gate_up(Context& context, const ExpertStack& stack, const Activation& activation,
                         const ConstTensorView& x, const ConstTensorView& ids, TensorView out,
                         Precision precision) {
  constexpr const char* kName = "expert_gemv_gate_up";
  if (activation.gated()) role_of(kName, context, stack, Role::Gate);
  role_of(kName, context, stack, Role::Up);
  require<ShapeError>(stack.gated() == activation.gated(), [&] {
    return Problem{
        .operation = kName,
        .what = "stack",
        .expected = std::string("no gate tensor for activation ") + name_of(activation.kind),
        .got = "one",
        .hint = {}};
  });
  const StackShape& shape = stack.shape();
  const GemvCall call =
      check_gemv(kName, context, shape, shape.hidden_size, shape.intermediate_size, x, ids, out);
  if (call.num_pairs == 0) return;
  const Backend& backend = context.backend();
  forward::CallMemory memory(kName, context);
  std::byte* const scratch =
      memory.take(backend.scratch_bytes({shape, call.num_tokens, call.top_k, call.num_pairs,
                                         stack.packed_cols(), stack.shares_units()}));
  float* const gate_up = memory.take_floats(
      backend.fuses_activation() ? 0 : 2 * call.num_pairs * shape.intermediate_size);
  auto* hidden = static_cast<float*>(out.data);
  backend.gate_up(context,
                  {.stack = &stack,
                   .activation = activation,
                   .rows = call.map,
                   .x = call.x,
                   .hidden = hidden,
                   .precision = decide(precision, context, call.num_pairs, stack.num_experts()),
                   .gate_up = gate_up,
                   .scratch = scratch});
  // Afterwards: a backend without a fused activation runs over all rows.
  backend.zero_skipped(context, call.map.expert, shape.num_experts, call.num_pairs,
                       shape.intermediate_size, hidden);
}

void expert_gemm(Context& context, const ExpertStack& stack, Role role, const ConstTensorView& x,
                 const BucketPlan& plan, TensorView out, Precision precision) {
  constexpr const char* kName = "expert_gemm";
  const DeviceType device = context.backend().device_type();
  const RoleWeights& weights = role_of(kName, context, stack, role);
  require<ShapeError>(plan.num_experts() == stack.num_experts(), [&] {
    return Problem{.operation = kName,
                   .what = "plan.num_experts",
                   .expected = std::to_string(stack.num_experts()),
                   .got = std::to_string(plan.num_experts()),
                   .hint = {}};
  });
  const std::int64_t pairs = plan.num_pairs();
  const bool is_down = role == Role::Down;
  const std::int64_t in_rows = is_down ? pairs : plan.num_tokens();
  if (x.rank != 2 || x.dim(0) != in_rows || x.dim(1) != weights.ref.cols) {
    wrong_shape(kName, "x",
                "[" + std::to_string(in_rows) + ", " + std::to_string(weights.ref.cols) + "]", x);
  }
  forward::check_float_tensor(kName, "x", device, x);
  forward::check_dense(kName, "out", device, out, DType::F32, {pairs, weights.ref.rows});
  forward::check_same_device(kName, context.backend().device(), {{"x", x}, {"out", out}});
  if (pairs == 0) return;
  const InputRows in = input_rows(x, kName, "x");
  const Backend& backend = context.backend();
  forward::CallMemory memory(kName, context);
  std::byte* const scratch =
      memory.take(backend.scratch_bytes(query_of(stack, plan.num_tokens(), plan.top_k(), pairs)));
  const std::int32_t* row_pair = plan.row_pair().data();
  const RowMap map = memory.place({.num_segments = plan.num_experts(),
                                   .offsets = plan.expert_offsets().data(),
                                   .source = is_down ? row_pair : plan.row_token().data(),
                                   .destination = row_pair,
                                   .limit = static_cast<std::int32_t>(pairs)},
                                  plan.num_rows());
  auto* y = static_cast<float*>(out.data);
  if (plan.num_rows() < pairs) {
    backend.zero_skipped(context, memory.place(plan.pair_row()), static_cast<std::int32_t>(pairs),
                         pairs, weights.ref.rows, y);
  }
  backend.expert_gemm(context, {.weights = &weights,
                                .rows = map,
                                .in = in,
                                .out = y,
                                .precision = decide(precision, context, pairs, stack.num_experts()),
                                .scratch = scratch});
}

void gather_rows(Context& context, const ConstTensorView& x, const BucketPlan& plan,
                 TensorView out) {
  constexpr const char* kName = "gather_rows";
  const DeviceType device = context.backend().device_type();
  if (x.rank != 2 || x.dim(0) != plan.num_tokens()) {
    wrong_shape(kName, "x", "[" + std::to_string(plan.num_tokens()) + ", H]", x);
  }
  forward::check_float_tensor(kName, "x", device, x);
  const std::int64_t cols = x.dim(1);
  forward::check_dense(kName, "out", device, out, DType::F32, {plan.num_pairs(), cols});
  forward::check_same_device(kName, context.backend().device(), {{"x", x}, {"out", out}});
  if (out.empty()) return;
  const InputRows in = input_rows(x, kName, "x");
  const Backend& backend = context.backend();
  const std::int64_t used = plan.num_rows();
  forward::CallMemory memory(kName, context);
  const std::int32_t* const index =
      memory.place(plan.row_token().first(static_cast<std::size_t>(used)));
  auto* rows = static_cast<float*>(out.data);
  if (used > 0) backend.gather(context, in, index, used, rows);
  if (used < plan.num_pairs()) {
    backend.fill(context, rows + used * cols, 0,
                 static_cast<std::size_t>((plan.num_pairs() - used) * cols) * sizeof(float));
  }
}

void silu_mul(Context& context, const ConstTensorView& gate_up, TensorView out) {
  constexpr const char* kName = "silu_mul";
  const DeviceType device = context.backend().device_type();
  if (gate_up.rank != 2 || gate_up.dim(1) % 2 != 0) {
    wrong_shape(kName, "gate_up", "[P, 2I]", gate_up);
  }
  const std::int64_t rows = gate_up.dim(0), intermediate = gate_up.dim(1) / 2;
  forward::check_dense(kName, "gate_up", device, gate_up, DType::F32, {rows, 2 * intermediate});
  forward::check_dense(kName, "out", device, out, DType::F32, {rows, intermediate});
  forward::check_same_device(kName, context.backend().device(),
                             {{"gate_up", gate_up}, {"out", out}});
  if (out.empty()) return;
  const auto* gate = static_cast<const float*>(gate_up.data);
  context.backend().activate(context, Activation{}, gate, gate + intermediate, 2 * intermediate,
                             rows, intermediate, static_cast<float*>(out.data));
  context.backend().submit(context);
}

void combine(Context& context, const ConstTensorView& rows, const BucketPlan& plan,
             const RoutingView& routing, TensorView out, bool accumulate) {
  constexpr const char* kName = "combine";
  check_plan(kName, plan, routing);
  if (out.rank != 2) wrong_shape(kName, "out", "[T, H]", out);
  forward::check_dense(kName, "rows", context.backend().device_type(), rows, DType::F32,
                       {plan.num_pairs(), out.dim(1)});
  forward::CallMemory memory(kName, context);
  const std::int32_t* const pair_row = memory.place(plan.pair_row());
  combine_rows(kName, "rows", context, rows, pair_row, routing, out, accumulate);
}

void combine(Context& context, const ConstTensorView& rows, const BucketPlan& plan,
             const Routing& routing, TensorView out, bool accumulate) {
  forward::CallMemory memory("combine", context);
  combine(context, rows, plan, memory.place(routing), out, accumulate);
}

void weighted_sum(Context& context, const ConstTensorView& pairs, const RoutingView& routing,
                  TensorView out, bool accumulate) {
  constexpr const char* kName = "weighted_sum";
  if (out.rank != 2) wrong_shape(kName, "out", "[T, H]", out);
  const DeviceType device = context.backend().device_type();
  // As [T, top_k, H] or flat.
  if (pairs.rank == 3) {
    forward::check_dense(kName, "pairs", device, pairs, DType::F32,
                         {routing.num_tokens, routing.top_k, out.dim(1)});
  } else {
    forward::check_dense(kName, "pairs", device, pairs, DType::F32,
                         {routing.num_pairs(), out.dim(1)});
  }
  combine_rows(kName, "pairs", context, pairs, nullptr, routing, out, accumulate);
  context.backend().submit(context);
}

void weighted_sum(Context& context, const ConstTensorView& pairs, const Routing& routing,
                  TensorView out, bool accumulate) {
  forward::CallMemory memory("weighted_sum", context);
  weighted_sum(context, pairs, memory.place(routing), out, accumulate);
}

}  // namespace moesaic

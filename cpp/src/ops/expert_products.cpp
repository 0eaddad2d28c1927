/// Products of the experts of one stack, by name: GEMVs over slots, a GEMM over a plan.

#include <string>

#include "forward/check_call.hpp"
#include "forward/choose_path.hpp"
#include "moesaic/forward.hpp"
#include "ops/call_memory.hpp"
#include "ops/check_tensor.hpp"

namespace moesaic {
namespace {

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
  ops::check_weights(operation, context, std::string(name_of(role)) + " weights", weights.ref,
                     stack.device(), "load them with device=");
  return weights;
}

/// The arguments of an expert GEMV, checked: a row map over the slots and the rows of x.
struct GemvCall {
  RowMap map;
  InputRows x;
  std::int64_t num_tokens, num_pairs;
  std::int64_t computed;  ///< pairs that are not skipped, as far as the host knows
  std::int32_t top_k;
};

GemvCall check_gemv(const char* operation, Context& context, const ExpertStack& stack,
                    std::int64_t cols, std::int64_t rows, const ConstTensorView& x,
                    const ConstTensorView& ids, const ConstTensorView& out) {
  const StackShape& shape = stack.shape();
  const Device device = context.backend().device();
  if (ids.rank != 1 && ids.rank != 2) ops::wrong_shape(operation, "ids", "[k] or [T, k]", ids);
  const bool batched = ids.rank == 2;
  const std::int64_t tokens = batched ? ids.dim(0) : 1;
  const std::int64_t top_k = ids.dim(ids.rank - 1);
  if (batched) {
    ops::check_dense(operation, "ids", device, ids, DType::I32, {tokens, top_k});
    ops::check_dense(operation, "out", device, out, DType::F32, {tokens, top_k, rows});
  } else {
    ops::check_dense(operation, "ids", device, ids, DType::I32, {top_k});
    ops::check_dense(operation, "out", device, out, DType::F32, {top_k, rows});
  }
  if (tokens * top_k > INT32_MAX / 2)
    ops::wrong_shape(operation, "ids", "at most 2^30 elements", ids);

  GemvCall call;
  call.num_tokens = tokens;
  call.top_k = static_cast<std::int32_t>(top_k);
  call.num_pairs = tokens * top_k;
  const auto pairs = static_cast<std::int32_t>(call.num_pairs);
  call.map = {
      .num_segments = pairs, .expert = static_cast<const std::int32_t*>(ids.data), .limit = pairs};
  ops::check_input(operation, "x", device, x);
  ops::check_apart(operation, "x", x, out);
  ops::check_apart(operation, "ids", ids, out);
  const bool per_slot = batched ? x.rank == 3 && x.dim(0) == tokens && x.dim(1) == top_k
                                : x.rank == 2 && x.dim(0) == top_k;
  const bool per_token = batched && x.rank == 2 && x.dim(0) == tokens;
  if (!(per_slot || per_token || x.rank == 1) || x.dim(x.rank - 1) != cols) {
    const std::string k = std::to_string(cols);
    ops::wrong_shape(operation, "x",
                     batched ? "[" + k + "], [T, " + k + "] or [T, k, " + k + "]"
                             : "[" + k + "] or [k, " + k + "]",
                     x);
  }
  if (call.num_pairs == 0) return call;
  call.x = input_rows(x);
  if (per_token) call.map.source_divisor = call.top_k;
  if (x.rank == 1) call.map.source_divisor = pairs;
  const RoutingView view{const_cast<std::int32_t*>(call.map.expert), nullptr, tokens, call.top_k};
  context.backend().check_ids(context, view, shape.num_experts, operation);
  call.computed = call.num_pairs;
  if (context.backend().device_type() == DeviceType::Cpu) {
    forward::check_kept(operation, stack, view);
    call.computed = forward::computed_pairs(
        {view.topk_ids, static_cast<std::size_t>(call.num_pairs)}, shape.num_experts);
  }
  return call;
}

/// What the scratch of a product over `pairs` rows of one role depends on. No second role needs
/// room, as where gate and up share units.
ScratchQuery query_of(const ExpertStack& stack, std::int64_t tokens, std::int32_t top_k,
                      std::int64_t pairs) {
  return {stack.shape(), tokens, top_k, pairs, stack.packed_cols(), true, stack.low_rank()};
}

}  // namespace

void expert_gemv(Context& context, const ExpertStack& stack, Role role, const ConstTensorView& x,
                 const ConstTensorView& ids, TensorView out, Precision precision) {
  constexpr const char* kName = "expert_gemv";
  const RoleWeights& weights = role_of(kName, context, stack, role);
  const GemvCall call =
      check_gemv(kName, context, stack, weights.ref.cols, weights.ref.rows, x, ids, out);
  if (call.num_pairs == 0) return;
  const Backend& backend = context.backend();
  ops::CallMemory memory(kName, context);
  std::byte* const scratch = memory.take(
      backend.scratch_bytes(query_of(stack, call.num_tokens, call.top_k, call.num_pairs)));
  auto* y = static_cast<float*>(out.data);
  backend.zero_skipped(context, {.ids = call.map.expert,
                                 .num_experts = stack.num_experts(),
                                 .out = y,
                                 .rows = call.num_pairs,
                                 .cols = weights.ref.rows});
  backend.expert_gemm(context, {.weight = weights.view(),
                                .map = call.map,
                                .in = call.x,
                                .out = y,
                                .precision = forward::decide(precision, call.computed,
                                                             stack.num_kept(), context.tuning()),
                                .scratch = scratch});
  memory.finish();
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
      check_gemv(kName, context, stack, shape.hidden_size, shape.intermediate_size, x, ids, out);
  if (call.num_pairs == 0) return;
  const Backend& backend = context.backend();
  ops::CallMemory memory(kName, context);
  std::byte* const scratch =
      memory.take(backend.scratch_bytes({shape, call.num_tokens, call.top_k, call.num_pairs,
                                         stack.packed_cols(), stack.shares_units()}));
  float* const gate_up = memory.take_floats(
      backend.fuses_activation() ? 0 : 2 * call.num_pairs * shape.intermediate_size);
  auto* hidden = static_cast<float*>(out.data);
  backend.gate_up(context, {.gate = stack.gate().view(),
                            .up = stack.up().view(),
                            .activation = activation,
                            .map = call.map,
                            .in = call.x,
                            .hidden = hidden,
                            .precision = forward::decide(precision, call.computed, stack.num_kept(),
                                                         context.tuning()),
                            .gate_up = gate_up,
                            .scratch = scratch});
  // Only now: a backend without a fused activation writes all rows, those of skipped pairs too.
  backend.zero_skipped(context, {.ids = call.map.expert,
                                 .num_experts = shape.num_experts,
                                 .out = hidden,
                                 .rows = call.num_pairs,
                                 .cols = shape.intermediate_size});
  memory.finish();
}

void expert_gemm(Context& context, const ExpertStack& stack, Role role, const ConstTensorView& x,
                 const BucketPlan& plan, TensorView out, Precision precision) {
  constexpr const char* kName = "expert_gemm";
  const Device device = context.backend().device();
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
    ops::wrong_shape(kName, "x",
                     "[" + std::to_string(in_rows) + ", " + std::to_string(weights.ref.cols) + "]",
                     x);
  }
  ops::check_input(kName, "x", device, x);
  ops::check_dense(kName, "out", device, out, DType::F32, {pairs, weights.ref.rows});
  ops::check_apart(kName, "x", x, out);
  for (std::int32_t e = 0; e < plan.num_experts(); ++e) {
    require<DeviceError>(
        stack.keeps(e) || plan.expert_offsets()[static_cast<std::size_t>(e)] ==
                              plan.expert_offsets()[static_cast<std::size_t>(e) + 1],
        [&] {
          return Problem{.operation = kName,
                         .what = "plan",
                         .expected = "rows of experts in memory",
                         .got = "rows of expert " + std::to_string(e),
                         .hint = "stack.experts lists those that are"};
        });
  }
  if (pairs == 0) return;
  const Backend& backend = context.backend();
  ops::CallMemory memory(kName, context);
  std::byte* const scratch =
      memory.take(backend.scratch_bytes(query_of(stack, plan.num_tokens(), plan.top_k(), pairs)));
  const std::int32_t* row_pair = plan.row_pair().data();
  const RowMap map = memory.on_device({.num_segments = plan.num_experts(),
                                       .offsets = plan.expert_offsets().data(),
                                       .source = is_down ? row_pair : plan.row_token().data(),
                                       .destination = row_pair,
                                       .limit = static_cast<std::int32_t>(pairs)},
                                      plan.num_rows());
  auto* y = static_cast<float*>(out.data);
  if (plan.num_rows() < pairs) {
    backend.zero_skipped(context, {.ids = memory.on_device(plan.pair_row()),
                                   .num_experts = static_cast<std::int32_t>(pairs),
                                   .out = y,
                                   .rows = pairs,
                                   .cols = weights.ref.rows});
  }
  backend.expert_gemm(context, {.weight = weights.view(),
                                .map = map,
                                .in = input_rows(x),
                                .out = y,
                                .precision = forward::decide(precision, plan.num_rows(),
                                                             stack.num_kept(), context.tuning()),
                                .scratch = scratch});
  memory.finish();
}

}  // namespace moesaic

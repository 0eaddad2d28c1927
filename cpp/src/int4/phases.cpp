// The products over a Marlin stack: each call becomes one row map and one expert_gemm.

#include <algorithm>
#include <string>
#include <vector>

#include "forward/choose_path.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"
#include "moesaic/marlin_stack.hpp"
#include "ops/call_memory.hpp"
#include "ops/check_tensor.hpp"

namespace moesaic {
namespace {

/// Checks what every product asks: weights, x and out on one device, out f32 [rows, N], x float
/// [*, K], numbers of rows that an int32 can count.
void check_call(const char* operation, const Context& context, const WeightRef& weight,
                Device weights_on, const ConstTensorView& x, const ConstTensorView& out) {
  const Device device = context.backend().device();
  ops::check_weights(operation, context, "weights", weight, weights_on,
                     "MarlinExpertStack.to moves a stack, and what is then cut out of it");
  require<ShapeError>(x.rank == 2 && x.dim(1) == weight.cols && x.dim(0) <= INT32_MAX / 2, [&] {
    return Problem{.operation = operation,
                   .what = "x.shape",
                   .expected = "[rows, " + std::to_string(weight.cols) + "]",
                   .got = describe(x),
                   .hint = {}};
  });
  ops::check_input(operation, "x", device, x);
  require<ShapeError>(out.rank == 2 && out.dim(0) <= INT32_MAX / 2, [&] {
    return Problem{.operation = operation,
                   .what = "out.shape",
                   .expected = "[rows, " + std::to_string(weight.rows) + "]",
                   .got = describe(out),
                   .hint = {}};
  });
  ops::check_dense(operation, "out", device, out, DType::F32, {out.dim(0), weight.rows});
  ops::check_apart(operation, "x", x, out);
}

/// A product whose arguments have been checked, and the memory that it needs. It is made before the
/// first launch, so that an error leaves the output alone.
class Product {
 public:
  /// `rows` is the larger of the number of map entries, padding included, and the rows of out.
  Product(const char* operation, Context& context, const RoleWeights& weights, const InputRows& in,
          std::int64_t rows)
      : context_(context), weights_(weights), in_(in), memory_(operation, context) {
    const WeightRef& ref = weights.ref;
    const Backend& backend = context.backend();
    scratch_ = memory_.take(backend.scratch_bytes(
        {{ref.num_experts, ref.cols, ref.rows}, in.num_rows, 1, rows, ref.int4.packed_cols, true}));
  }
  ops::CallMemory& memory() { return memory_; }

  void run(const RowMap& map, float* out, Precision precision) {
    context_.backend().expert_gemm(context_, {.weight = weights_.view(),
                                              .map = map,
                                              .in = in_,
                                              .out = out,
                                              .precision = precision,
                                              .scratch = scratch_});
    memory_.finish();
  }

 private:
  Context& context_;
  const RoleWeights& weights_;
  const InputRows in_;
  ops::CallMemory memory_;
  std::byte* scratch_;
};

Problem dispatch_problem(std::size_t i, const char* field, std::string expected, std::string got) {
  return {.operation = "gemm_phase_batched",
          .what = "dispatches[" + std::to_string(i) + "]." + field,
          .expected = std::move(expected),
          .got = std::move(got),
          .hint = {}};
}

void check_dispatches(std::span<const MarlinDispatch> dispatches, std::int32_t experts,
                      std::int64_t in_rows, std::int64_t out_rows) {
  std::vector<std::pair<std::int64_t, std::int64_t>> written;
  for (std::size_t i = 0; i < dispatches.size(); ++i) {
    const MarlinDispatch& d = dispatches[i];
    require<ShapeError>(d.expert >= 0 && d.expert < experts, [&] {
      return dispatch_problem(i, "expert", "0 .. " + std::to_string(experts - 1),
                              std::to_string(d.expert));
    });
    const auto inside = [&](std::int64_t first, std::int64_t limit) {
      return first >= 0 && d.rows >= 0 && d.rows <= limit && first <= limit - d.rows;
    };
    require<ShapeError>(inside(d.in_row, in_rows), [&] {
      return dispatch_problem(
          i, "in_row", "rows within x, which has " + std::to_string(in_rows),
          std::to_string(d.in_row) + " and " + std::to_string(d.rows) + " rows");
    });
    require<ShapeError>(inside(d.out_row, out_rows), [&] {
      return dispatch_problem(
          i, "out_row", "rows within out, which has " + std::to_string(out_rows),
          std::to_string(d.out_row) + " and " + std::to_string(d.rows) + " rows");
    });
    if (d.rows > 0) written.emplace_back(d.out_row, d.rows);
  }
  std::sort(written.begin(), written.end());
  for (std::size_t i = 1; i < written.size(); ++i) {
    const auto& [first, rows] = written[i - 1];
    require<ShapeError>(first + rows <= written[i].first, [&] {
      return Problem{.operation = "gemm_phase_batched",
                     .what = "dispatches",
                     .expected = "output rows written once",
                     .got = "row " + std::to_string(written[i].first) + " twice",
                     .hint = {}};
    });
  }
}

}  // namespace

void MarlinExpertStack::gemm_phase_batched(Context& context, const ConstTensorView& x,
                                           std::span<const MarlinDispatch> dispatches,
                                           TensorView out, Precision precision) const {
  constexpr const char* kName = "gemm_phase_batched";
  check_call(kName, context, kernel_weights().ref, device(), x, out);
  check_dispatches(dispatches, num_experts(), x.dim(0), out.dim(0));
  // Each dispatch becomes a segment, whose entries name an input and an output row.
  std::vector<std::int32_t> expert, offsets{0}, source, destination;
  for (const MarlinDispatch& d : dispatches) {
    if (d.rows == 0) continue;
    expert.push_back(d.expert);
    for (std::int64_t i = 0; i < d.rows; ++i) {
      source.push_back(static_cast<std::int32_t>(d.in_row + i));
      destination.push_back(static_cast<std::int32_t>(d.out_row + i));
    }
    offsets.push_back(static_cast<std::int32_t>(source.size()));
  }
  if (source.empty()) return;
  const auto entries = static_cast<std::int64_t>(source.size());
  Product product(kName, context, kernel_weights(), input_rows(x), std::max(entries, out.dim(0)));
  const RowMap map =
      product.memory().on_device({.num_segments = static_cast<std::int32_t>(expert.size()),
                                  .expert = expert.data(),
                                  .offsets = offsets.data(),
                                  .source = source.data(),
                                  .destination = destination.data(),
                                  .limit = static_cast<std::int32_t>(out.dim(0))},
                                 entries);
  product.run(map, static_cast<float*>(out.data),
              forward::decide(precision, entries, num_experts(), context.tuning()));
}

void MarlinExpertStack::gemm_phase_vllm(Context& context, const ConstTensorView& x,
                                        const AlignedRouting& aligned, std::int32_t top_k,
                                        TensorView out, Precision precision) const {
  constexpr const char* kName = "gemm_phase_vllm";
  check_call(kName, context, kernel_weights().ref, device(), x, out);
  const std::int64_t pairs = aligned.num_pairs();
  require<ShapeError>(top_k >= 1 && x.dim(0) * top_k == pairs, [&] {
    return Problem{.operation = kName,
                   .what = "x rows * top_k",
                   .expected = std::to_string(pairs) + ", the pairs of the aligned routing",
                   .got = std::to_string(x.dim(0)) + " * " + std::to_string(top_k),
                   .hint = "top_k is 1 when x already holds one row per pair"};
  });
  require<ShapeError>(aligned.row_space() == RowSpace::TokenPairs || top_k == 1, [&] {
    return Problem{.operation = kName,
                   .what = "aligned.row_space",
                   .expected = "token_pairs, or top_k 1",
                   .got = "packed_rows and top_k " + std::to_string(top_k),
                   .hint = "a packed row over top_k is not a token"};
  });
  require<ShapeError>(out.dim(0) == pairs, [&] {
    return Problem{.operation = kName,
                   .what = "out.shape[0]",
                   .expected = std::to_string(pairs),
                   .got = std::to_string(out.dim(0)),
                   .hint = {}};
  });
  require<ShapeError>(aligned.num_experts() == num_experts(), [&] {
    return Problem{.operation = kName,
                   .what = "aligned.num_experts",
                   .expected = std::to_string(num_experts()),
                   .got = std::to_string(aligned.num_experts()),
                   .hint = {}};
  });
  if (pairs == 0) return;
  // The product assigns the rows that ids name; rows that no id names must become zero.
  std::vector<std::int32_t> named(static_cast<std::size_t>(pairs), -1);
  for (const std::int32_t id : aligned.sorted_ids()) {
    if (id >= 0 && id < pairs) named[static_cast<std::size_t>(id)] = 0;
  }
  const bool all = std::ranges::find(named, -1) == named.end();
  Product product(kName, context, kernel_weights(), input_rows(x),
                  std::max<std::int64_t>(pairs, aligned.num_post_pad()));
  const std::int32_t* const rows = all ? nullptr : product.memory().on_device(named);
  const RowMap map =
      product.memory().on_device({.num_segments = static_cast<std::int32_t>(aligned.num_blocks()),
                                  .expert = aligned.block_experts().data(),
                                  .width = aligned.block_size(),
                                  .source = aligned.sorted_ids().data(),
                                  .destination = aligned.sorted_ids().data(),
                                  .source_divisor = top_k,
                                  .limit = static_cast<std::int32_t>(pairs)},
                                 aligned.num_post_pad());
  auto* y = static_cast<float*>(out.data);
  if (!all) {
    context.backend().zero_skipped(
        context, {.ids = rows, .num_experts = 1, .out = y, .rows = pairs, .cols = n_per_expert()});
  }
  product.run(map, y, forward::decide(precision, pairs, num_experts(), context.tuning()));
}

void MarlinLinear::forward(Context& context, const ConstTensorView& x, TensorView out,
                           Precision precision) const {
  constexpr const char* kName = "MarlinLinear.forward";
  check_call(kName, context, weights_.ref, device_, x, out);
  const std::int64_t rows = x.dim(0);
  require<ShapeError>(out.dim(0) == rows, [&] {
    return Problem{.operation = kName,
                   .what = "out.shape[0]",
                   .expected = std::to_string(rows),
                   .got = std::to_string(out.dim(0)),
                   .hint = {}};
  });
  if (rows == 0) return;
  const RowMap map{.num_segments = 1,
                   .width = static_cast<std::int32_t>(rows),
                   .limit = static_cast<std::int32_t>(rows)};
  Product product(kName, context, weights_, input_rows(x), rows);
  product.run(map, static_cast<float*>(out.data),
              forward::decide(precision, rows, 1, context.tuning()));
}

}  // namespace moesaic

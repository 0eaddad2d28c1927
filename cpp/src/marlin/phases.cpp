// The products over a Marlin stack, each as one row map.

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "forward/check.hpp"
#include "forward/choose_path.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"
#include "moesaic/marlin_stack.hpp"

namespace moesaic {
namespace {

/// Memory of the backend for the length of one call.
class Scratch {
 public:
  Scratch(const Backend& backend, std::size_t bytes)
      : backend_(backend), bytes_(bytes), data_(bytes > 0 ? backend.allocate(bytes) : nullptr) {}
  ~Scratch() {
    if (data_ != nullptr) backend_.deallocate(data_, bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::byte* get() const { return static_cast<std::byte*>(data_); }

 private:
  const Backend& backend_;
  std::size_t bytes_;
  void* data_;
};

/// Checks that hold for every product: host memory, f32 out [rows, N], float x [*, K], rows that an
/// int32 counts.
void check_call(const char* operation, const Context& context, const WeightRef& weight,
                const ConstTensorView& x, const ConstTensorView& out) {
  const DeviceType device = context.backend().device_type();
  require<UnsupportedError>(device == DeviceType::Cpu, [&] {
    return Problem{.operation = operation,
                   .what = "backend",
                   .expected = "one that works on host memory",
                   .got = to_string({device, 0}),
                   .hint = {}};
  });
  const Support support = context.backend().supports(weight);
  require<UnsupportedError>(support.ok, [&] {
    return Problem{.operation = operation,
                   .what = "weights",
                   .expected = "a type that runs",
                   .got = "INT4: " + std::string(support.reason),
                   .hint = {}};
  });
  require<ShapeError>(x.rank == 2 && x.dim(1) == weight.cols && x.dim(0) <= INT32_MAX / 2, [&] {
    return Problem{.operation = operation,
                   .what = "x.shape",
                   .expected = "[rows, " + std::to_string(weight.cols) + "]",
                   .got = describe(x),
                   .hint = {}};
  });
  forward::check_float_tensor(operation, "x", device, x);
  require<ShapeError>(out.rank == 2 && out.dim(0) <= INT32_MAX / 2, [&] {
    return Problem{.operation = operation,
                   .what = "out.shape",
                   .expected = "[rows, " + std::to_string(weight.rows) + "]",
                   .got = describe(out),
                   .hint = {}};
  });
  forward::check_dense(operation, "out", device, out, DType::F32, {out.dim(0), weight.rows});
}

Precision decide(Precision asked, const Context& context, std::int64_t rows, std::int32_t experts) {
  if (asked != Precision::Auto) return asked;
  return forward::choose_precision(rows, experts, context.tuning()).precision;
}

/// Runs a checked map of `entries` rows, padding included.
void run(Context& context, const RoleWeights& weights, const RowMap& map, std::int64_t entries,
         const InputRows& in, float* out, Precision precision) {
  const Backend& backend = context.backend();
  const WeightRef& ref = weights.ref;
  ScratchQuery query{
      {ref.num_experts, ref.cols, ref.rows}, in.num_rows, 1, entries, ref.int4.packed_cols};
  const Scratch scratch(backend, backend.scratch_bytes(query));
  backend.expert_gemm(context, {.weights = &weights,
                                .rows = map,
                                .in = in,
                                .out = out,
                                .precision = precision,
                                .scratch = scratch.get()});
}

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
  check_call(kName, context, weights_.ref, x, out);
  check_dispatches(dispatches, num_experts(), x.dim(0), out.dim(0));
  // One segment per dispatch; its entries name an input and an output row.
  std::vector<std::int32_t> expert, offsets{0}, source, destination;
  for (const MarlinDispatch& d : dispatches) {
    expert.push_back(d.expert);
    for (std::int64_t i = 0; i < d.rows; ++i) {
      source.push_back(static_cast<std::int32_t>(d.in_row + i));
      destination.push_back(static_cast<std::int32_t>(d.out_row + i));
    }
    offsets.push_back(static_cast<std::int32_t>(source.size()));
  }
  if (source.empty()) return;
  const auto entries = static_cast<std::int64_t>(source.size());
  const RowMap map{.num_segments = static_cast<std::int32_t>(expert.size()),
                   .expert = expert.data(),
                   .offsets = offsets.data(),
                   .source = source.data(),
                   .destination = destination.data(),
                   .limit = static_cast<std::int32_t>(out.dim(0))};
  run(context, weights_, map, std::max(entries, out.dim(0)), input_rows(x, kName, "x"),
      static_cast<float*>(out.data), decide(precision, context, entries, num_experts()));
}

void MarlinExpertStack::gemm_phase_vllm(Context& context, const ConstTensorView& x,
                                        const AlignedRouting& aligned, std::int32_t top_k,
                                        TensorView out, Precision precision) const {
  constexpr const char* kName = "gemm_phase_vllm";
  check_call(kName, context, weights_.ref, x, out);
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
  const RowMap map{.num_segments = static_cast<std::int32_t>(aligned.num_blocks()),
                   .expert = aligned.block_experts().data(),
                   .width = aligned.block_size(),
                   .source = aligned.sorted_ids().data(),
                   .destination = aligned.sorted_ids().data(),
                   .source_divisor = top_k,
                   .limit = static_cast<std::int32_t>(pairs)};
  // Rows that no id names must be zero; the others are assigned.
  auto* y = static_cast<float*>(out.data);
  std::vector<bool> written(static_cast<std::size_t>(pairs));
  for (const std::int32_t id : aligned.sorted_ids()) {
    if (id >= 0 && id < pairs) written[static_cast<std::size_t>(id)] = true;
  }
  const std::int64_t n = n_per_expert();
  for (std::int64_t row = 0; row < pairs; ++row) {
    if (written[static_cast<std::size_t>(row)]) continue;
    std::memset(y + row * n, 0, static_cast<std::size_t>(n) * sizeof(float));
  }
  run(context, weights_, map, std::max<std::int64_t>(pairs, aligned.num_post_pad()),
      input_rows(x, kName, "x"), y, decide(precision, context, pairs, num_experts()));
}

void MarlinLinear::forward(Context& context, const ConstTensorView& x, TensorView out,
                           Precision precision) const {
  constexpr const char* kName = "MarlinLinear.forward";
  check_call(kName, context, weights_.ref, x, out);
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
  run(context, weights_, map, rows, input_rows(x, kName, "x"), static_cast<float*>(out.data),
      decide(precision, context, rows, 1));
}

}  // namespace moesaic

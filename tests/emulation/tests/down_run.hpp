// Down products and their weighted sum: by launch_down, in the two steps it may fuse, and in f64.
#pragma once

#include <optional>

#include "gemm_run.hpp"

namespace moesaic::testing {

inline std::int32_t dtype_code(DType dtype) {
  return dtype == DType::F32 ? cuda::kF32 : dtype == DType::F16 ? cuda::kF16 : cuda::kBF16;
}

// Where the hidden row and the row of a pair stand.
struct PairRows {
  Map map;
  std::vector<std::int32_t> pair_row{};  // empty: row = pair

  std::int64_t row(std::size_t pair) const {
    return pair_row.empty() ? static_cast<std::int64_t>(pair) : pair_row[pair];
  }
};

// The maps of a forward: single pairs, buckets and blocks, in pair order or packed.
inline PairRows single_pairs(const Routing& routing) {
  PairRows rows{pairs_map(routing)};
  rows.map.facts.source_divisor = 1;
  return rows;
}
inline PairRows bucket_pairs(const Routing& routing, std::int32_t experts) {
  PairRows rows{buckets_map(routing, experts)};
  rows.map.source.clear();  // one array for both, as in a forward
  return rows;
}
inline PairRows block_pairs(const Routing& routing, std::int32_t experts, std::int32_t width) {
  PairRows rows{blocks_map(routing, experts, width)};
  rows.map.source.clear();
  rows.map.facts.source_divisor = 1;
  return rows;
}
inline PairRows packed_pairs(const Routing& routing, std::int32_t experts) {
  PairRows rows{buckets_map(routing, experts)};
  rows.map.name = "packed";
  rows.pair_row.assign(routing.topk_ids().size(), -1);
  for (std::size_t i = 0; i < rows.map.destination.size(); ++i) {
    const std::int32_t pair = rows.map.destination[i];
    if (pair >= 0) rows.pair_row[static_cast<std::size_t>(pair)] = static_cast<std::int32_t>(i);
  }
  rows.map.source.clear();
  rows.map.destination.clear();
  return rows;
}

struct Down {
  const PackedRole& role;
  const Routing& routing;
  const Input& hidden;  // [P, I]; pair rows have its type
  DType out_dtype = DType::F32;
  std::int64_t gap = 0;  // columns between rows of out
  bool accumulate = false;
  bool exact = true;
  bool weightless = false;                   // all weights are 1
  std::optional<cuda::WeightArgs> weight{};  // instead of role.args()

  DType working() const {
    return hidden.rows.dtype == cuda::kF32   ? DType::F32
           : hidden.rows.dtype == cuda::kF16 ? DType::F16
                                             : DType::BF16;
  }
  // [T, H + gap]; NaN, or numbers to add to.
  Tensor start() const {
    const std::int64_t cols = role.ref.rows + gap;
    return accumulate ? Tensor(out_dtype, routing.num_tokens(), cols,
                               random_values(routing.num_tokens() * cols, 91))
                      : Tensor(out_dtype, routing.num_tokens(), cols);
  }
  cuda::MapArgs map_args(const PairRows& rows) const {
    cuda::MapArgs args = rows.map.args();
    args.source = args.destination;
    return args;
  }
  cuda::CombineArgs combine(const PairRows& rows, Tensor& out) const {
    cuda::CombineArgs args{};
    args.pair_row = rows.pair_row.empty() ? nullptr : rows.pair_row.data();
    args.topk_ids = routing.topk_ids().data();
    args.topk_weights = weightless ? nullptr : routing.topk_weights().data();
    args.out = out.bytes.data();
    args.out_stride = out.cols;
    args.num_tokens = routing.num_tokens();
    args.hidden_size = role.ref.rows;
    args.rows_dtype = hidden.rows.dtype;
    args.out_dtype = dtype_code(out_dtype);
    args.top_k = routing.top_k();
    args.num_experts = role.ref.num_experts;
    args.accumulate = accumulate ? 1 : 0;
    return args;
  }

  // launch_down; says whether it left the pair rows alone.
  Tensor run(const PairRows& rows, std::uint64_t seed = 0, bool batch_invariant = false,
             bool* fused = nullptr) const {
    Tensor out = start();
    Tensor pair_rows(working(), pairs_of(routing), role.ref.rows);
    const Tensor untouched = pair_rows;
    const Scratch scratch(rows.map, hidden.rows.num_rows, role.ref, false);
    emulation::options().seed = seed;
    cuda::DownArgs args{};
    args.weight = weight.value_or(role.args());
    args.map = map_args(rows);
    args.in = hidden.rows;
    args.rows = pair_rows.bytes.data();
    args.combine = combine(rows, out);
    args.exact = exact ? 1 : 0;
    args.batch_invariant = batch_invariant ? 1 : 0;
    args.scratch = scratch.data();
    args.scratch_bytes = scratch.bytes();
    EXPECT_EQ(cuda::launch_down(args, nullptr), cuda::kOk);
    emulation::options().seed = 0;
    if (fused != nullptr) *fused = pair_rows.bytes == untouched.bytes;
    return out;
  }

  // Narrow products into pair rows, then combine.
  Tensor run_in_steps(const PairRows& rows) const {
    Tensor out = start();
    Tensor pair_rows(working(), pairs_of(routing), role.ref.rows);
    const Scratch scratch(rows.map, hidden.rows.num_rows, role.ref, false);
    EXPECT_EQ(cuda::launch_gemm({.weight = weight.value_or(role.args()),
                                 .map = map_args(rows),
                                 .in = hidden.rows,
                                 .out = pair_rows.bytes.data(),
                                 .out_dtype = hidden.rows.dtype,
                                 .exact = exact ? 1 : 0,
                                 .batch_invariant = 1,
                                 .scratch = scratch.data(),
                                 .scratch_bytes = scratch.bytes()},
                                nullptr),
              cuda::kOk);
    cuda::CombineArgs sum = combine(rows, out);
    sum.rows = pair_rows.bytes.data();
    EXPECT_EQ(cuda::launch_combine(sum, nullptr), cuda::kOk);
    return out;
  }

  // NaN in the gaps, where nobody may write unless the sum was started with numbers.
  Doubles answer(const TestRole& test, const PairRows& rows) const {
    const Tensor before = start();
    Doubles want(static_cast<std::size_t>(before.rows * before.cols));
    for (std::size_t i = 0; i < want.size(); ++i) {
      const bool in_row = static_cast<std::int64_t>(i) % before.cols < role.ref.rows;
      want[i] = accumulate || !in_row ? static_cast<double>(before.get(i)) : 0.0;
    }
    for (std::size_t p = 0; p < routing.topk_ids().size(); ++p) {
      const std::int32_t e = routing.topk_ids()[p];
      if (e < 0 || e >= role.ref.num_experts) continue;
      const float* h = hidden.values.data() + rows.row(p) * role.ref.cols;
      const Doubles y = apply_f64(test, e, Doubles(h, h + role.ref.cols).data());
      const double factor = weightless ? 1.0 : static_cast<double>(routing.topk_weights()[p]);
      double* const to = want.data() + static_cast<std::int64_t>(p) / routing.top_k() * before.cols;
      for (std::size_t r = 0; r < y.size(); ++r) to[r] += factor * y[r];
    }
    return want;
  }

  // By all three ways, which must be fused and agree.
  void expect_right(const TestRole& test, const PairRows& rows, const std::string& what) const {
    bool fused = false;
    const Tensor got = run(rows, 0, false, &fused);
    EXPECT_TRUE(fused) << what;
    EXPECT_EQ(got.bytes, run_in_steps(rows).bytes) << what;
    const bool rounded = working() != DType::F32 || out_dtype != DType::F32;
    const double bound = rounded ? 5e-3 : exact ? kExactBound : kFastBound;
    EXPECT_LT(relative_error(got.values(), answer(test, rows)), bound) << what;
  }
};

}  // namespace moesaic::testing

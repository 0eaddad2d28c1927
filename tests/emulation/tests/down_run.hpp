// Down products and their weighted sum: by launch_down, in the two steps it may fuse, and in f64.
#pragma once

#include <optional>

#include "gemm_run.hpp"

namespace moesaic::testing {

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
  bool weightless = false;          // all weights are 1
  std::optional<RoleRef> weight{};  // instead of role.view()

  DType working() const { return hidden.rows.dtype; }
  // [T, H + gap]; NaN, or numbers to add to.
  Tensor start() const {
    const std::int64_t cols = role.ref.rows + gap;
    return accumulate ? Tensor(out_dtype, routing.num_tokens(), cols,
                               random_values(routing.num_tokens() * cols, 91))
                      : Tensor(out_dtype, routing.num_tokens(), cols);
  }
  RowMap map_of(const PairRows& rows) const {
    RowMap map = rows.map.view();
    map.source = map.destination;
    return map;
  }
  op::Combine combine(const PairRows& rows, const Tensor& pair_rows, Tensor& out) const {
    return {.rows = pair_rows.bytes.data(),
            .rows_dtype = working(),
            .pair_row = rows.pair_row.empty() ? nullptr : rows.pair_row.data(),
            .routing = {const_cast<std::int32_t*>(routing.topk_ids().data()),
                        weightless ? nullptr : const_cast<float*>(routing.topk_weights().data()),
                        routing.num_tokens(), routing.top_k()},
            .out = {out.bytes.data(), out_dtype, role.ref.rows, out.cols},
            .accumulate = accumulate,
            .num_experts = role.ref.num_experts};
  }

  // launch_down; says whether it left the pair rows alone.
  Tensor run(const PairRows& rows, std::uint64_t seed = 0, bool batch_invariant = false,
             bool* fused = nullptr) const {
    Tensor out = start();
    Tensor pair_rows(working(), pairs_of(routing), role.ref.rows);
    const Tensor untouched = pair_rows;
    const Scratch scratch(rows.map, hidden.rows.num_rows, role.ref, false);
    emulation::options().seed = seed;
    const op::Down call{.weight = weight.value_or(role.view()),
                        .map = map_of(rows),
                        .in = hidden.rows,
                        .rows = pair_rows.bytes.data(),
                        .combine = combine(rows, pair_rows, out),
                        .precision = exact ? Precision::Exact : Precision::Fast,
                        .batch_invariant = batch_invariant,
                        .scratch = scratch.data()};
    EXPECT_EQ(cuda::launch_down(call, nullptr), cuda::kOk);
    emulation::options().seed = 0;
    if (fused != nullptr) *fused = pair_rows.bytes == untouched.bytes;
    return out;
  }

  // Narrow products into pair rows, then combine.
  Tensor run_in_steps(const PairRows& rows) const {
    Tensor out = start();
    Tensor pair_rows(working(), pairs_of(routing), role.ref.rows);
    const Scratch scratch(rows.map, hidden.rows.num_rows, role.ref, false);
    EXPECT_EQ(cuda::launch_gemm({.weight = weight.value_or(role.view()),
                                 .map = map_of(rows),
                                 .in = hidden.rows,
                                 .out = pair_rows.bytes.data(),
                                 .out_dtype = working(),
                                 .precision = exact ? Precision::Exact : Precision::Fast,
                                 .batch_invariant = true,
                                 .scratch = scratch.data()},
                                nullptr),
              cuda::kOk);
    EXPECT_EQ(cuda::launch_combine(combine(rows, pair_rows, out), nullptr), cuda::kOk);
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

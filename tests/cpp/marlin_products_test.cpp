// Products with INT4 group weights in every form of call: beside f64, and bit for bit beside each
// other.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "cpu/isa.hpp"
#include "gptq_checkpoint.hpp"
#include "moesaic/marlin_stack.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

constexpr double kExactBound = 1e-4;
constexpr double kFastBound = 2e-2;

TEST(MarlinProducts, AgreeWithF64OnEveryInstructionSet) {
  for (const Recipe& r : recipes()) {
    const Checkpoint c = make_checkpoint(r);
    const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
    // Rows of the experts lie apart in x and in out, and not in their order.
    const std::vector<MarlinDispatch> dispatches = {
        {2, 0, 11, 9}, {0, 12, 2, 1}, {1, 14, 4, 3}, {1, 2, 0, 2}};
    const Floats x = random_values(20 * c.k, 5);
    Doubles want;
    for (const MarlinDispatch& d : dispatches) {
      for (std::int64_t i = 0; i < d.rows; ++i) {
        const auto first = x.begin() + (d.in_row + i) * c.k;
        const Doubles row(first, first + c.k);
        const Doubles y = apply_f64(c.matrices[static_cast<std::size_t>(d.expert)], row.data());
        want.insert(want.end(), y.begin(), y.end());
      }
    }
    for (const CpuIsa isa : cpu::supported_isas()) {
      for (const Precision precision : {Precision::Exact, Precision::Fast}) {
        Context context = cpu_context(isa);
        Floats out = poisoned(21 * c.n);
        stack.gemm_phase_batched(context, rows_of(x, c.k), dispatches, rows_of(out, c.n),
                                 precision);
        Floats got;
        for (const MarlinDispatch& d : dispatches) {
          got.insert(got.end(), out.begin() + d.out_row * c.n,
                     out.begin() + (d.out_row + d.rows) * c.n);
        }
        const double bound = precision == Precision::Exact ? kExactBound : kFastBound;
        EXPECT_LT(rel_l2(got, want), bound) << describe_recipe(r) << " " << name_of(isa);
        // Rows that no dispatch names stay as they were.
        for (const std::int64_t row : {3, 7, 10, 20})
          EXPECT_TRUE(std::isnan(out[static_cast<std::size_t>(row * c.n)]));
      }
    }
  }
}

TEST(MarlinProducts, ManyRowsPerExpertGiveTheBitsOfOneRowEach) {
  const Checkpoint c = make_checkpoint({.experts = 2,
                                        .k = 256,
                                        .n = 80,
                                        .group_size = 64,
                                        .order = Order::Permuted,
                                        .shared_order = false});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  const Floats x = random_values(150 * c.k, 6);
  const std::vector<MarlinDispatch> dispatches = {{1, 0, 0, 131}, {0, 131, 131, 19}};
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    Context context = cpu_context();
    Floats out = poisoned(150 * c.n), one = poisoned(150 * c.n);
    stack.gemm_phase_batched(context, rows_of(x, c.k), dispatches, rows_of(out, c.n), precision);
    // One row at a time gives the same bits.
    for (std::int64_t row = 0; row < 150; ++row) {
      const std::vector<MarlinDispatch> single = {{row < 131 ? 1 : 0, row, row, 1}};
      stack.gemm_phase_batched(context, rows_of(x, c.k), single, rows_of(one, c.n), precision);
    }
    EXPECT_EQ(out, one);
  }
}

TEST(MarlinProducts, PhasesAgreeBitForBit) {
  for (const Recipe& r :
       {Recipe{.experts = 4,
               .k = 128,
               .n = 64,
               .group_size = 32,
               .order = Order::Permuted,
               .shared_order = false},
        Recipe{.experts = 4, .k = 256, .n = 70, .group_size = 128},
        Recipe{.experts = 4, .k = 136, .n = 24, .group_size = 64, .zeros = false}}) {
    const Checkpoint c = make_checkpoint(r);
    const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
    constexpr std::int32_t kTopK = 3;
    const Routing routing = make_routing(int4_case(37, c.k, c.n, 4, kTopK, RoutingShape::Skipped));
    const std::int64_t pairs = 37 * kTopK;
    const Floats x = random_values(37 * c.k, 8);
    const BucketPlan plan = BucketPlan::build(routing, 4);
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      Context context = cpu_context();
      // Per pair, by expert linears.
      Floats want(static_cast<std::size_t>(pairs * c.n));
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        const std::int32_t e = routing.topk_ids()[static_cast<std::size_t>(pair)];
        if (e < 0) continue;
        const ConstTensorView row(x.data() + pair / kTopK * c.k, DType::F32, {1, c.k});
        stack.make_expert_linear(e).forward(
            context, row, {want.data() + pair * c.n, DType::F32, {1, c.n}}, precision);
      }
      // Buckets over packed rows.
      Floats packed(static_cast<std::size_t>(pairs * c.k));
      std::vector<MarlinDispatch> dispatches;
      for (std::int64_t row = 0; row < plan.num_rows(); ++row) {
        std::copy_n(x.begin() + plan.row_token()[static_cast<std::size_t>(row)] * c.k, c.k,
                    packed.begin() + row * c.k);
      }
      for (std::int32_t e = 0; e < 4; ++e) {
        const std::int64_t first = plan.expert_offsets()[static_cast<std::size_t>(e)];
        dispatches.push_back(
            {e, first, first, plan.expert_offsets()[static_cast<std::size_t>(e) + 1] - first});
      }
      Floats rows = poisoned(pairs * c.n);
      stack.gemm_phase_batched(context, rows_of(packed, c.k), dispatches, rows_of(rows, c.n),
                               precision);
      for (std::int64_t row = 0; row < plan.num_rows(); ++row) {
        const std::int64_t pair = plan.row_pair()[static_cast<std::size_t>(row)];
        EXPECT_TRUE(std::equal(rows.begin() + row * c.n, rows.begin() + (row + 1) * c.n,
                               want.begin() + pair * c.n));
      }
      for (const std::int32_t block : {4, 8, 16, 32, 48, 64}) {
        const AlignedRouting pairs_aligned =
            AlignedRouting::build(routing, 4, block, RowSpace::TokenPairs);
        Floats out = poisoned(pairs * c.n);
        stack.gemm_phase_vllm(context, rows_of(x, c.k), pairs_aligned, kTopK, rows_of(out, c.n),
                              precision);
        EXPECT_EQ(out, want) << block;
        const AlignedRouting rows_aligned =
            AlignedRouting::build(routing, 4, block, RowSpace::PackedRows);
        Floats out_rows = poisoned(pairs * c.n);
        stack.gemm_phase_vllm(context, rows_of(packed, c.k), rows_aligned, 1,
                              rows_of(out_rows, c.n), precision);
        for (std::int64_t i = plan.num_rows() * c.n; i < pairs * c.n; ++i)
          rows[static_cast<std::size_t>(i)] = 0.0F;
        EXPECT_EQ(out_rows, rows) << block;
      }
    }
  }
}

TEST(MarlinProducts, ExpertLinearsTakeColumnsAndBias) {
  const Checkpoint c = make_checkpoint({.experts = 2,
                                        .k = 128,
                                        .n = 200,
                                        .group_size = 32,
                                        .order = Order::Permuted,
                                        .shared_order = false});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  Context context = cpu_context();
  const Floats x = random_values(5 * c.k, 9);
  const std::pair<std::int64_t, std::int64_t> pieces[] = {
      {0, 64}, {64, 128}, {128, 72}, {192, 8}, {0, 200}};
  for (const auto& [first, cols] : pieces) {
    const Floats bias = random_values(cols, 10);
    const MarlinLinear linear = stack.make_expert_linear(1, first, cols, bias);
    EXPECT_EQ(linear.in_features(), c.k);
    EXPECT_EQ(linear.out_features(), cols);
    Floats out = poisoned(5 * cols);
    linear.forward(context, rows_of(x, c.k), rows_of(out, cols), Precision::Exact);
    Doubles want;
    for (std::int64_t row = 0; row < 5; ++row) {
      const Doubles in(x.begin() + row * c.k, x.begin() + (row + 1) * c.k);
      const Doubles y = apply_f64(c.matrices[1], in.data());
      for (std::int64_t n = 0; n < cols; ++n) {
        want.push_back(y[static_cast<std::size_t>(first + n)] +
                       static_cast<double>(bias[static_cast<std::size_t>(n)]));
      }
    }
    EXPECT_LT(rel_l2(out, want), kExactBound);
  }
  EXPECT_THROW(stack.make_expert_linear(2), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(-1), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 32, 64), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 64, 32), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 64, 192), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 256), ShapeError);
  EXPECT_THROW(stack.make_expert_linear(0, 0, 64, Floats(63)), ShapeError);
}

TEST(MarlinProducts, BadCallsAreRefused) {
  const Checkpoint c = make_checkpoint({.experts = 2, .k = 64, .n = 32});
  const MarlinExpertStack stack = MarlinExpertStack::from_gptq(c.tensors());
  Context context = cpu_context();
  const Floats x = random_values(4 * 64, 1);
  Floats out = poisoned(4 * 32);
  const auto batched = [&](const std::vector<MarlinDispatch>& dispatches) {
    stack.gemm_phase_batched(context, rows_of(x, 64), dispatches, rows_of(out, 32));
  };
  EXPECT_NO_THROW(batched({}));
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_THROW(batched({{2, 0, 0, 1}}), ShapeError);
  EXPECT_THROW(batched({{-1, 0, 0, 1}}), ShapeError);
  EXPECT_THROW(batched({{0, 3, 0, 2}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 3, 2}}), ShapeError);
  EXPECT_THROW(batched({{0, -1, 0, 1}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 0, -1}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 0, INT64_MAX}}), ShapeError);
  EXPECT_THROW(batched({{0, 0, 0, 2}, {1, 2, 1, 2}}), ShapeError);
  const Routing routing = make_routing(int4_case(2, 64, 32, 2, 2));
  const AlignedRouting aligned = AlignedRouting::build(routing, 2, 8, RowSpace::TokenPairs);
  const auto vllm = [&](std::int64_t rows, std::int32_t top_k) {
    stack.gemm_phase_vllm(context, {x.data(), DType::F32, {rows, 64}}, aligned, top_k,
                          rows_of(out, 32));
  };
  EXPECT_NO_THROW(vllm(2, 2));
  EXPECT_NO_THROW(vllm(4, 1));
  EXPECT_THROW(vllm(2, 1), ShapeError);
  EXPECT_THROW(vllm(4, 2), ShapeError);
  EXPECT_THROW(vllm(4, 0), ShapeError);
  const AlignedRouting others = AlignedRouting::build(routing, 3, 8, RowSpace::TokenPairs);
  EXPECT_THROW(
      stack.gemm_phase_vllm(context, {x.data(), DType::F32, {2, 64}}, others, 2, rows_of(out, 32)),
      ShapeError);
}

}  // namespace
}  // namespace moesaic::testing

// The small kernels against the host's definitions: routing, plans, rows.

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>

#include "metal_fixture.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/routing.hpp"

namespace moesaic::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class MetalOps : public MetalTest {
 protected:
  /// Routes on both and compares: ids exactly, weights to 1e-6, the count of non-finite rows.
  void expect_same_routing(const RouterConfig& config, const Floats& logits,
                           const std::string& what, const std::vector<std::int32_t>& given = {}) {
    config.validate();
    const auto tokens = static_cast<std::int64_t>(logits.size()) / config.num_experts;
    const std::int64_t pairs = tokens * config.top_k;
    Routing host(tokens, config.top_k);
    std::ranges::copy(given, host.topk_ids().begin());
    const RouteStats want = route(
        ConstTensorView(logits.data(), DType::F32, {tokens, config.num_experts}), config, host);

    Tuning tuning;
    tuning.strict = true;  // counts non-finite rows
    Context context = this->context(tuning);
    const auto in = array(logits);
    const auto ids = given.empty() ? std::make_unique<DeviceArray<std::int32_t>>(backend(), pairs)
                                   : std::make_unique<DeviceArray<std::int32_t>>(backend(), given);
    const auto weights = poisoned<float>(pairs);
    const auto scratch = poisoned<float>(backend().route_scratch(config, tokens, 1));
    op::Route call = route_by(config);
    call.logits = in.data();
    call.row_stride = config.num_experts;
    call.out = {ids->data(), weights.data(), tokens, config.top_k};
    call.scratch = scratch.data();
    const RouteStats got = backend().route(context, call);
    EXPECT_EQ(got.nonfinite_rows, want.nonfinite_rows) << what;
    EXPECT_TRUE(std::ranges::equal(ids->host(), host.topk_ids())) << what;
    const Floats w = weights.host();
    for (std::size_t i = 0; i < w.size(); ++i) {
      ASSERT_NEAR(w[i], host.topk_weights()[i], 1e-6F * (1.0F + std::abs(w[i])))
          << what << " " << i;
    }
  }
};

RouterConfig router(std::int32_t experts, std::int32_t top_k) {
  RouterConfig config;
  config.num_experts = experts;
  config.top_k = top_k;
  return config;
}

/// Distinct values whose scores differ by more than the rounding of exp.
Floats spread_logits(std::int64_t tokens, std::int32_t experts, std::uint32_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(experts));
  for (std::size_t e = 0; e < values.size(); ++e) {
    values[e] = 8.0F * static_cast<float>(e) / static_cast<float>(experts) - 4.0F;
  }
  Floats logits;
  for (std::int64_t t = 0; t < tokens; ++t) {
    random.shuffle(values);
    logits.insert(logits.end(), values.begin(), values.end());
  }
  return logits;
}

TEST_F(MetalOps, RouteEveryStep) {
  for (const std::uint64_t seed : emulation::seeds()) {
    emulation::options().seed = seed;
    for (const ScoreFunction score : {ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected,
                                      ScoreFunction::Sigmoid, ScoreFunction::SqrtSoftplus}) {
      for (const bool renormalize : {false, true}) {
        for (int variant = 0; variant < 7; ++variant) {
          RouterConfig c = router(48, 5);
          c.score = score;
          c.renormalize = renormalize;
          if (variant == 1) c.router_bias = random_values(48, 9);
          if (variant == 2) c.selection_bias = random_values(48, 9);
          if (variant == 3) c.guard = NormGuard::AddEps, c.guard_eps = 0.25F, c.scale = 2.5F;
          if (variant == 4) c.guard = NormGuard::ClampMin, c.guard_eps = 3.0F, c.scale = 0.0F;
          if (variant >= 5) c.num_groups = 8, c.groups_used = 3;
          if (variant == 6) {
            c.group_reduce = GroupReduce::Max;
            c.group_mask = GroupMask::Zero;
            c.select_on = SelectOn::Logits;
          }
          expect_same_routing(c, spread_logits(3, 48, 1 + static_cast<std::uint32_t>(variant)),
                              "score " + std::to_string(static_cast<int>(score)) + ", variant " +
                                  std::to_string(variant));
        }
      }
    }
  }
}

TEST_F(MetalOps, RouteSizes) {
  for (const auto& [experts, top_k] : std::vector<std::pair<int, int>>{
           {1, 1}, {2, 2}, {5, 3}, {31, 31}, {33, 7}, {64, 64}, {128, 8}, {1025, 33}, {2048, 64}}) {
    expect_same_routing(router(experts, top_k), spread_logits(2, experts, 3),
                        std::to_string(experts) + " experts, top " + std::to_string(top_k));
  }
  RouterConfig groups = router(512, 6);
  groups.num_groups = 256;
  groups.groups_used = 9;
  expect_same_routing(groups, spread_logits(1, 512, 3), "256 groups");
}

// The GPU flushes subnormal numbers, so that scores which the host tells apart are 0 there, and
// logits which differ are equal in its arithmetic.
TEST_F(MetalOps, RouteBelowTheNormalNumbers) {
  constexpr std::int32_t kExperts = 16;
  const Floats far{-88.0F,  0.0F,   -95.0F,  -103.0F, -90.0F, -87.0F, -100.0F, -102.0F,
                   -104.0F, -89.0F, -101.0F, -88.5F,  -97.0F, -92.0F, -106.0F, -86.0F};
  Floats all_far = far;
  all_far[1] = -88.2F;
  Floats tiny;
  for (int e = 0; e < kExperts; ++e) {
    tiny.push_back(1e-39F * static_cast<float>((e * 7) % kExperts - 8));
  }
  for (const Floats& row : {far, all_far, tiny}) {
    for (const ScoreFunction score : {ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected,
                                      ScoreFunction::Sigmoid, ScoreFunction::SqrtSoftplus}) {
      for (const SelectOn select : {SelectOn::Scores, SelectOn::Logits}) {
        RouterConfig c = router(kExperts, 12);
        c.score = score;
        c.select_on = select;
        c.renormalize = false;
        const std::string what =
            "score " + std::to_string(static_cast<int>(score)) + " of " + std::to_string(row[0]);
        expect_same_routing(c, row, what);
        c.selection_bias.assign(kExperts, 0.0F);
        expect_same_routing(c, row, what + ", biased by 0");
      }
    }
  }
}

TEST_F(MetalOps, RouteTiesAndNonfiniteValues) {
  Floats logits(12 * 8, 0.5F);  // row 0: ties only
  const auto set = [&](int row, std::vector<float> values) {
    std::ranges::copy(values, logits.begin() + row * 12);
  };
  set(1, {kPoison, 1.0F, -kInf, 1.0F, kInf, 1.0F});
  set(2, Floats(12, kPoison));
  set(3, Floats(12, -kInf));
  set(4, {kInf, kInf, -kInf, kPoison});
  Floats one(12, kPoison);
  one[7] = -3.0F;
  set(5, one);
  set(6, {-0.0F, 0.0F, -0.0F, 0.0F});
  set(7, {3.4e38F, -3.4e38F, 3.4e38F, 200.0F, -200.0F, -300.0F});
  for (const ScoreFunction score : {ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected,
                                    ScoreFunction::Sigmoid, ScoreFunction::SqrtSoftplus}) {
    for (int variant = 0; variant < 4; ++variant) {
      RouterConfig c = router(12, 5);
      c.score = score;
      c.renormalize = variant != 1;
      if (variant == 2) c.num_groups = 4, c.groups_used = 2;
      if (variant == 3) c.router_bias.assign(12, 3e38F), c.selection_bias.assign(12, -3e38F);
      expect_same_routing(c, logits,
                          "score " + std::to_string(static_cast<int>(score)) + ", variant " +
                              std::to_string(variant));
    }
  }
}

TEST_F(MetalOps, RouteWeighsGivenIds) {
  RouterConfig c = router(7, 3);
  c.select_on = SelectOn::Given;
  for (const ScoreFunction score : {ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected}) {
    c.score = score;
    expect_same_routing(c, spread_logits(3, 7, 2), "given ids", {6, 0, 3, -1, 2, 1, -1, -1, -1});
  }
}

/// Ids that make buckets uneven: empty, full, skipped.
std::vector<std::int32_t> nasty_ids(int shape, std::int64_t pairs, std::int32_t experts,
                                    std::uint32_t seed) {
  Random random(seed);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(pairs));
  for (std::int32_t& id : ids) {
    id = random.below(experts);
    if (shape == 1) id = experts - 1;
    if (shape == 2) id = random.below(3) == 0 ? -1 : id / 2;
    if (shape == 3) id = -1;
  }
  return ids;
}

TEST_F(MetalOps, PlansAreTheHostsBitForBit) {
  Context context = this->context();
  for (const std::uint64_t seed : emulation::seeds()) {
    emulation::options().seed = seed;
    for (const auto& [tokens, top_k, experts] : std::vector<std::tuple<int, int, int>>{
             {0, 2, 3}, {1, 1, 1}, {9, 3, 4}, {300, 2, 5}, {5, 8, 40}, {130, 4, 3}}) {
      for (int shape = 0; shape < 4; ++shape) {
        SCOPED_TRACE(std::to_string(tokens) + " tokens, " + std::to_string(experts) +
                     " experts, shape " + std::to_string(shape));
        const std::int64_t pairs = std::int64_t{tokens} * top_k;
        Routing routing(tokens, top_k);
        std::ranges::copy(nasty_ids(shape, pairs, experts, 5), routing.topk_ids().begin());
        const BucketPlan want = BucketPlan::build(routing, experts);

        const auto ids =
            array(std::vector<std::int32_t>(routing.topk_ids().begin(), routing.topk_ids().end()));
        const auto offsets = poisoned<std::int32_t>(experts + 1);
        const auto token = poisoned<std::int32_t>(pairs), pair = poisoned<std::int32_t>(pairs),
                   row = poisoned<std::int32_t>(pairs);
        const BucketPlanView plan{offsets.data(), token.data(), pair.data(), row.data()};
        backend().bucket_plan(
            context,
            {.routing = {ids.data(), nullptr, tokens, top_k}, .num_experts = experts, .out = plan});
        EXPECT_TRUE(std::ranges::equal(offsets.host(), want.expert_offsets()));
        EXPECT_TRUE(std::ranges::equal(token.host(), want.row_token()));
        EXPECT_TRUE(std::ranges::equal(pair.host(), want.row_pair()));
        EXPECT_TRUE(std::ranges::equal(row.host(), want.pair_row()));

        for (const std::int32_t block : {8, 48}) {
          for (const RowSpace space : {RowSpace::TokenPairs, RowSpace::PackedRows}) {
            const AlignedRouting aligned = AlignedRouting::build(routing, experts, block, space);
            const auto sorted = poisoned<std::int32_t>(aligned_capacity(pairs, experts, block));
            const auto blocks =
                poisoned<std::int32_t>(aligned_block_capacity(pairs, experts, block));
            const auto padded = poisoned<std::int32_t>(1);
            backend().align(context, {.plan = plan,
                                      .num_pairs = pairs,
                                      .num_experts = experts,
                                      .block_size = block,
                                      .block_capacity = static_cast<std::int64_t>(blocks.size()),
                                      .row_space = space,
                                      .out = {sorted.data(), blocks.data(), padded.data()}});
            EXPECT_EQ(padded.host()[0], aligned.num_post_pad());
            std::vector<std::int32_t> all(aligned.sorted_ids().begin(), aligned.sorted_ids().end());
            all.resize(sorted.size(), static_cast<std::int32_t>(pairs));
            EXPECT_EQ(sorted.host(), all);
            EXPECT_TRUE(std::ranges::equal(blocks.host(), aligned.block_experts()));
          }
        }
      }
    }
  }
}

TEST_F(MetalOps, PlanSkipsIdsOutOfRange) {
  Context context = this->context();
  const auto ids = array(std::vector<std::int32_t>{2, 3, -5, 0, 1 << 30, 2});
  const auto offsets = poisoned<std::int32_t>(4);
  const auto token = poisoned<std::int32_t>(6), pair = poisoned<std::int32_t>(6),
             row = poisoned<std::int32_t>(6);
  backend().bucket_plan(context, {.routing = {ids.data(), nullptr, 3, 2},
                                  .num_experts = 3,
                                  .out = {offsets.data(), token.data(), pair.data(), row.data()}});
  using Ints = std::vector<std::int32_t>;
  EXPECT_EQ(offsets.host(), (Ints{0, 1, 1, 3}));
  EXPECT_EQ(pair.host(), (Ints{3, 0, 5, -1, -1, -1}));
  EXPECT_EQ(row.host(), (Ints{1, -1, -1, 0, -1, 2}));
}

TEST_F(MetalOps, GatherTakesStridedRowsOfEveryType) {
  Context context = this->context();
  const Floats values = random_values(7 * 40, 3);
  const std::vector<std::int32_t> order{6, -1, 0, 3, 3};
  const auto index = array(order);
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    Tensor x(dtype, 7, 40, values);
    const auto memory = array(x.bytes);
    for (const std::int64_t inner : {1, 2}) {
      InputRows rows{.data = memory.data() + size_of(dtype),  // begins at an odd element
                     .dtype = dtype,
                     .num_rows = 7,
                     .cols = 33,
                     .inner_count = inner,
                     .outer_stride = 40,
                     .inner_stride = 3};
      const auto out = poisoned<float>(5 * 33);
      backend().gather(context, {.x = rows, .index = index.data(), .rows = 5, .out = out.data()});
      const Floats got = out.host();
      for (std::size_t r = 0; r < 5; ++r) {
        for (std::size_t c = 0; c < 33; ++c) {
          const auto at =
              static_cast<std::size_t>(order[r] < 0 ? 0 : rows.element_offset(order[r]));
          const float want = order[r] < 0 ? 0.0F : x.get(1 + at + c);
          ASSERT_EQ(got[r * 33 + c], want) << r << " " << c;
        }
      }
    }
  }
}

TEST_F(MetalOps, EveryActivationIsTheScalarDefinition) {
  Context context = this->context();
  Floats values = random_values(3 * 2 * 35, 3, 4.0F);
  values[0] = kPoison;
  values[1] = kInf;
  values[2] = -kInf;
  values[3] = 200.0F;
  values[4] = -200.0F;
  const auto gate_up = array(values);
  for (int kind = 0; kind <= static_cast<int>(ActivationKind::SiTu); ++kind) {
    Activation a{static_cast<ActivationKind>(kind), 2.0F, 1.7F, 1.5F, kind % 2 == 0 ? 0.0F : 2.0F};
    const auto hidden = poisoned<float>(3 * 35);
    backend().activate(context, {.activation = a,
                                 .gate = gate_up.data(),
                                 .up = gate_up.data() + 35,
                                 .row_stride = 70,
                                 .rows = 3,
                                 .intermediate = 35,
                                 .hidden = hidden.data()});
    const Floats got = hidden.host();
    for (std::size_t i = 0; i < got.size(); ++i) {
      const std::size_t at = i / 35 * 70 + i % 35;
      const float want = activate(a, values[at], values[at + 35]);
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(got[i])) << name_of(a.kind) << " " << i;
      } else if (std::isinf(want)) {
        EXPECT_EQ(got[i], want) << name_of(a.kind) << " " << i;
      } else {
        EXPECT_NEAR(got[i], want, 4e-6F * (1.0F + std::abs(want))) << name_of(a.kind) << " " << i;
      }
    }
  }
}

TEST_F(MetalOps, CombineSumsInSlotOrder) {
  Context context = this->context();
  const std::int64_t tokens = 4, hidden = 300;
  const Floats rows = random_values(8 * hidden, 3);
  const std::vector<std::int32_t> chosen{0, -1, 2, 1, -1, -1, 9, 0};
  const Floats weights = random_values(8, 4);
  std::vector<std::int32_t> pair_row{3, -1, 0, 7, -1, -1, -1, 1};
  const auto in = array(rows);
  const auto ids = array(chosen), where = array(pair_row);
  const auto w = array(weights);
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    for (const bool packed : {false, true}) {
      for (const bool accumulate : {false, true}) {
        const Floats before = random_values(tokens * (hidden + 5), 6);
        Tensor expected(dtype, tokens, hidden + 5, before);
        const auto out = array(expected.bytes);
        op::Combine call;
        call.rows = in.data();
        call.pair_row = packed ? where.data() : nullptr;
        call.routing = {ids.data(), w.data(), tokens, 2};
        call.out = {.data = out.data(), .dtype = dtype, .cols = hidden, .stride = hidden + 5};
        call.accumulate = accumulate;
        // Id 9 counts as -1; where a plan was made, its row says so.
        if (!packed) call.num_experts = 9;
        backend().combine(context, call);
        for (std::int64_t t = 0; t < tokens; ++t) {
          for (std::int64_t h = 0; h < hidden; ++h) {
            float sum = 0.0F;
            for (std::int64_t p = 2 * t; p < 2 * t + 2; ++p) {
              const auto at = static_cast<std::size_t>(p);
              if (chosen[at] < 0 || chosen[at] >= 9) continue;
              const std::int64_t row = packed ? pair_row[at] : p;
              sum += weights[at] * rows[static_cast<std::size_t>(row * hidden + h)];
            }
            const auto i = static_cast<std::size_t>(t * (hidden + 5) + h);
            expected.set(i, accumulate ? expected.get(i) + sum : sum);
          }
        }
        Tensor got(dtype, tokens, hidden + 5);
        got.bytes = out.host();
        EXPECT_LE(rel_l2(got.values(), expected.values()), 1e-7) << name_of(dtype);
      }
    }
  }
}

TEST_F(MetalOps, CopiesAndFillsOfOddSizes) {
  Context context = this->context();
  for (const std::size_t bytes : {1U, 4U, 64U, 1025U, 4096U}) {
    const auto memory = poisoned<std::byte>(static_cast<std::int64_t>(bytes));
    const auto other = poisoned<std::byte>(static_cast<std::int64_t>(bytes));
    backend().fill(
        context, {.data = memory.data(), .bytes = static_cast<std::int64_t>(bytes), .value = 0x5A});
    backend().copy_on_stream(context, other.data(), memory.data(), bytes);
    EXPECT_EQ(other.host(), std::vector<std::byte>(bytes, std::byte{0x5A})) << bytes;
    const std::vector<std::byte> host(bytes, std::byte{0x11});
    backend().copy_on_stream(context, other.data(), host.data(), bytes);
    EXPECT_EQ(other.host(), host) << bytes;
  }
}

TEST_F(MetalOps, RouterLogitsOfEveryType) {
  Context context = this->context();
  const std::int64_t tokens = 3, cols = 77;
  const std::int32_t experts = 6;
  const Floats values = random_values(tokens * cols, 3);
  const Floats weight = random_values(experts * cols, 4);
  for (const bool pinned : {false, true}) {
    const auto pin = pinned ? backend().pin(host_values(weight)) : nullptr;
    for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
      Tensor x(dtype, tokens, cols, values);
      const auto memory = array(x.bytes);
      const auto logits = poisoned<float>(tokens * experts);
      backend().router_logits(context, {.x = dense_rows(memory.data(), dtype, tokens, cols),
                                        .weight = weight.data(),
                                        .num_experts = experts,
                                        .logits = logits.data()});
      Doubles want;
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int32_t e = 0; e < experts; ++e) {
          double sum = 0.0;
          for (std::int64_t c = 0; c < cols; ++c) {
            sum += static_cast<double>(x.get(static_cast<std::size_t>(t * cols + c))) *
                   static_cast<double>(weight[static_cast<std::size_t>(e * cols + c)]);
          }
          want.push_back(sum);
        }
      }
      EXPECT_LE(rel_l2(logits.host(), want), 1e-6) << name_of(dtype);
    }
  }
}

}  // namespace
}  // namespace moesaic::testing

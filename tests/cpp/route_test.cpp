#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "count_allocations.hpp"
#include "gtest/gtest.h"
#include "moesaic/error.hpp"
#include "moesaic/routing.hpp"
#include "random.hpp"

namespace moesaic {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using ::moesaic::test::count_allocations;

RouterConfig softmax_router(std::int32_t num_experts, std::int32_t top_k, bool renormalize = true) {
  RouterConfig config;
  config.num_experts = num_experts;
  config.top_k = top_k;
  config.renormalize = renormalize;
  return config;
}

/// Routes through `route`, into arrays that held something else before.
Routing run(const std::vector<float>& logits, const RouterConfig& config,
            RouteStats* stats = nullptr) {
  const auto rows = static_cast<std::int64_t>(logits.size()) / config.num_experts;
  Routing out(rows, config.top_k);
  std::ranges::fill(out.topk_ids(), -77);
  std::ranges::fill(out.topk_weights(), kNaN);
  const RouteStats got =
      route(ConstTensorView(logits.data(), DType::F32, {rows, config.num_experts}), config, out);
  if (stats != nullptr) *stats = got;
  return out;
}

struct Picks {
  std::vector<std::int32_t> ids;
  std::vector<double> weights;
};

/// One row by the definition, in double, sorting everything. Finite logits only.
Picks reference(const float* logits, const RouterConfig& c) {
  const auto n = static_cast<std::size_t>(c.num_experts);
  std::vector<double> x(logits, logits + n);
  if (!c.router_bias.empty()) {
    for (std::size_t e = 0; e < n; ++e) x[e] += static_cast<double>(c.router_bias[e]);
  }
  std::vector<double> score(x);
  const auto normalise_exp = [](std::vector<double> v) {
    const double top = *std::ranges::max_element(v);
    double sum = 0;
    for (double& a : v) sum += a = std::exp(a - top);
    for (double& a : v) a /= sum;
    return v;
  };
  if (c.score == ScoreFunction::Softmax) score = normalise_exp(x);
  if (c.score == ScoreFunction::Sigmoid) {
    for (double& s : score) s = 1 / (1 + std::exp(-s));
  }
  if (c.score == ScoreFunction::SqrtSoftplus) {
    for (double& s : score) s = std::sqrt(std::log1p(std::exp(s)));
  }
  std::vector<double> selection = c.select_on == SelectOn::Logits ? x : score;
  if (!c.selection_bias.empty()) {
    for (std::size_t e = 0; e < n; ++e) selection[e] += static_cast<double>(c.selection_bias[e]);
  }
  if (c.num_groups > 1) {
    const std::size_t size = n / static_cast<std::size_t>(c.num_groups);
    std::vector<std::pair<double, std::size_t>> groups;
    for (std::size_t g = 0; g * size < n; ++g) {
      std::vector<double> members(selection.begin() + static_cast<std::ptrdiff_t>(g * size),
                                  selection.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
      std::ranges::sort(members, std::greater{});
      double value = members[0];
      if (c.group_reduce == GroupReduce::Top2Sum && size > 1) value += members[1];
      groups.emplace_back(-value, g);
    }
    std::ranges::sort(groups);
    for (std::size_t i = static_cast<std::size_t>(c.groups_used); i < groups.size(); ++i) {
      const std::size_t g = groups[i].second;
      for (std::size_t e = g * size; e < (g + 1) * size; ++e) {
        selection[e] = c.group_mask == GroupMask::Zero ? 0 : -1e300;
      }
    }
  }
  std::vector<std::pair<double, std::int32_t>> order;
  for (std::size_t e = 0; e < n; ++e) {
    order.emplace_back(-selection[e], static_cast<std::int32_t>(e));
  }
  std::ranges::sort(order);
  Picks picks;
  for (std::int32_t s = 0; s < c.top_k; ++s) {
    const std::int32_t id = order[static_cast<std::size_t>(s)].second;
    picks.ids.push_back(id);
    picks.weights.push_back(score[static_cast<std::size_t>(id)]);
  }
  if (c.score == ScoreFunction::SoftmaxSelected) picks.weights = normalise_exp(picks.weights);
  if (c.renormalize) {
    double sum = std::accumulate(picks.weights.begin(), picks.weights.end(), 0.0);
    if (c.guard == NormGuard::AddEps) sum += static_cast<double>(c.guard_eps);
    if (c.guard == NormGuard::ClampMin) sum = std::max(sum, static_cast<double>(c.guard_eps));
    for (double& w : picks.weights) w /= sum;
  }
  if (c.scale != 0.0F) {
    for (double& w : picks.weights) w *= static_cast<double>(c.scale);
  }
  return picks;
}

/// Multiples of 1/64, so that scores are equal or clearly apart; with many exact ties.
std::vector<float> grid_values(std::size_t count, std::uint32_t seed, int range) {
  testing::Random random(seed);
  std::vector<float> values(count);
  for (float& v : values) {
    v = static_cast<float>(random.below(128 * range + 1) - 64 * range) / 64.0F;
  }
  return values;
}

void expect_matches_reference(const RouterConfig& config, std::size_t rows, std::uint32_t seed) {
  const auto n = static_cast<std::size_t>(config.num_experts);
  const auto k = static_cast<std::size_t>(config.top_k);
  const std::vector<float> logits = grid_values(rows * n, seed, 4);
  const Routing got = run(logits, config);
  for (std::size_t t = 0; t < rows; ++t) {
    const Picks want = reference(&logits[t * n], config);
    for (std::size_t s = 0; s < k; ++s) {
      ASSERT_EQ(got.topk_ids()[t * k + s], want.ids[s])
          << "E=" << n << " k=" << k << " seed=" << seed << " token=" << t << " slot=" << s;
      ASSERT_NEAR(static_cast<double>(got.topk_weights()[t * k + s]), want.weights[s],
                  2e-6 * std::max(1.0, want.weights[s]))
          << "E=" << n << " k=" << k << " seed=" << seed << " token=" << t << " slot=" << s;
    }
  }
}

TEST(Route, WorkedExample) {
  const std::vector<float> logits{0, 1, 1, -1, 2, 0, 0, 2, -1, -1, 3, 0};
  const Routing with = run(logits, softmax_router(4, 2));
  const std::vector<std::int32_t> ids{1, 2, 0, 3, 2, 3};
  EXPECT_TRUE(std::ranges::equal(with.topk_ids(), ids));
  const std::vector<float> renormalized{.5F, .5F, .5F, .5F, .952574F, .047426F};
  const std::vector<float> raw{.399486F, .399486F, .440399F, .440399F, .920456F, .045827F};
  const Routing without = run(logits, softmax_router(4, 2, false));
  EXPECT_TRUE(std::ranges::equal(without.topk_ids(), ids));
  for (std::size_t p = 0; p < 6; ++p) {
    EXPECT_NEAR(with.topk_weights()[p], renormalized[p], 1e-6F);
    EXPECT_NEAR(without.topk_weights()[p], raw[p], 1e-6F);
  }
}

TEST(Route, UpstreamShapes) {
  for (const std::size_t rows : {32, 1, 64}) {
    expect_matches_reference(softmax_router(128, 8), rows, 11);
  }
  expect_matches_reference(softmax_router(64, 4, false), 8, 12);
  expect_matches_reference(softmax_router(16, 1), 8, 13);
}

TEST(Route, OtherSizes) {
  for (const auto& [experts, top_k] :
       std::vector<std::pair<std::int32_t, std::int32_t>>{{1, 1},
                                                          {2, 2},
                                                          {15, 15},
                                                          {16, 16},
                                                          {17, 5},
                                                          {33, 33},
                                                          {60, 4},
                                                          {2048, 64},
                                                          {4096, 10}}) {
    expect_matches_reference(softmax_router(experts, top_k), 3, 21);
  }
}

class EveryRouter : public ::testing::TestWithParam<ScoreFunction> {};

TEST_P(EveryRouter, MatchesReference) {
  int combinations = 0;
  for (const bool on_logits : {false, true}) {
    for (const bool router_bias : {false, true}) {
      for (const bool selection_bias : {false, true}) {
        for (const int groups : {1, 4}) {
          for (const auto reduce : {GroupReduce::Top2Sum, GroupReduce::Max}) {
            for (const auto mask : {GroupMask::MinusInfinity, GroupMask::Zero}) {
              for (const auto guard : {NormGuard::None, NormGuard::AddEps, NormGuard::ClampMin}) {
                for (const bool renormalize : {true, false}) {
                  for (const float scale : {0.0F, 1.0F, 2.5F}) {
                    RouterConfig c = softmax_router(32, 6, renormalize);
                    c.score = GetParam();
                    c.select_on = on_logits ? SelectOn::Logits : SelectOn::Scores;
                    if (router_bias) c.router_bias = grid_values(32, 5, 1);
                    if (selection_bias) c.selection_bias = grid_values(32, 6, 1);
                    c.num_groups = groups;
                    c.groups_used = groups == 1 ? 1 : 2;
                    c.group_reduce = reduce;
                    c.group_mask = mask;
                    c.guard = guard;
                    c.guard_eps = guard == NormGuard::ClampMin ? 2.0F : 0.25F;
                    c.scale = scale;
                    SCOPED_TRACE(combinations++);
                    expect_matches_reference(c, 5, 100U + static_cast<std::uint32_t>(combinations));
                    if (HasFatalFailure()) return;
                  }
                }
              }
            }
          }
        }
      }
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Scores, EveryRouter,
                         ::testing::Values(ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected,
                                           ScoreFunction::Sigmoid, ScoreFunction::SqrtSoftplus));

TEST(Route, GroupsOfOneExpert) {
  RouterConfig c = softmax_router(8, 2);
  c.num_groups = 8;
  c.groups_used = 3;
  expect_matches_reference(c, 20, 31);
}

TEST(Route, TiesGoToTheLowerId) {
  const Routing all_equal = run(std::vector<float>(40, 0.25F), softmax_router(40, 5));
  for (std::int32_t s = 0; s < 5; ++s)
    EXPECT_EQ(all_equal.topk_ids()[static_cast<std::size_t>(s)], s);

  std::vector<float> zeros(20, -0.0F);  // -0 and +0 are equal
  zeros[7] = 0.0F;
  RouterConfig on_logits = softmax_router(20, 3);
  on_logits.select_on = SelectOn::Logits;
  const Routing picked = run(zeros, on_logits);
  EXPECT_EQ(picked.topk_ids()[0], 0);
}

/// The ids that were picked, given back, get the weights that picking gave them.
TEST(Route, GivenIdsGetTheWeightsOfPickedOnes) {
  for (const auto score : {ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected,
                           ScoreFunction::Sigmoid, ScoreFunction::SqrtSoftplus}) {
    for (const bool renormalize : {false, true}) {
      RouterConfig c = softmax_router(20, 4, renormalize);
      c.score = score;
      c.router_bias = grid_values(20, 5, 1);
      c.scale = 1.5F;
      const std::vector<float> logits = grid_values(3 * 20, 6, 1);
      const Routing picked = run(logits, c);
      c.select_on = SelectOn::Given;
      Routing given = picked;
      std::fill(given.topk_weights().begin(), given.topk_weights().end(), -1.0F);
      route(ConstTensorView(logits.data(), DType::F32, {3, 20}), c, given);
      for (std::size_t pair = 0; pair < picked.topk_ids().size(); ++pair) {
        EXPECT_EQ(given.topk_ids()[pair], picked.topk_ids()[pair]);
        EXPECT_EQ(given.topk_weights()[pair], picked.topk_weights()[pair]);
      }
    }
  }
}

TEST(Route, GivenIdsMaySkipRepeatAndMeetNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto weigh = [](std::vector<float> logits, std::vector<std::int32_t> ids,
                        ScoreFunction score, bool renormalize) {
    RouterConfig c = softmax_router(4, 3, renormalize);
    c.score = score;
    c.select_on = SelectOn::Given;
    Routing r(1, 3);
    std::copy(ids.begin(), ids.end(), r.topk_ids().begin());
    route(ConstTensorView(logits.data(), DType::F32, {1, 4}), c, r);
    EXPECT_TRUE(std::equal(ids.begin(), ids.end(), r.topk_ids().begin()));
    return std::vector<float>(r.topk_weights().begin(), r.topk_weights().end());
  };
  using Weights = std::vector<float>;
  const float third = 1.0F / 3;
  EXPECT_EQ(weigh({0, 0, 0, 0}, {2, -1, 2}, ScoreFunction::Sigmoid, false),
            (Weights{0.5F, 0, 0.5F}));
  EXPECT_EQ(weigh({0, 0, 0, 0}, {2, -1, 1}, ScoreFunction::SoftmaxSelected, false),
            (Weights{0.5F, 0, 0.5F}));
  EXPECT_EQ(weigh({0, 0, 0, 0}, {-1, -1, -1}, ScoreFunction::SoftmaxSelected, true),
            (Weights{0, 0, 0}));
  EXPECT_EQ(weigh({nan, 0, 0, 0}, {0, 1, 2}, ScoreFunction::Softmax, true),
            (Weights{0, 0.5F, 0.5F}));
  EXPECT_EQ(weigh({nan, nan, 0, 0}, {0, 1, -1}, ScoreFunction::SoftmaxSelected, true),
            (Weights{0, 0, 0}));
  EXPECT_EQ(weigh({nan, nan, nan, nan}, {3, -1, 1}, ScoreFunction::Softmax, true),
            (Weights{third, 0, third}));
}

TEST(Route, GivenIdsAreChecked) {
  RouterConfig c = softmax_router(4, 2);
  c.select_on = SelectOn::Given;
  const std::vector<float> logits(8);
  const ConstTensorView view(logits.data(), DType::F32, {2, 4});
  Routing r(2, 2);
  EXPECT_NO_THROW(route(view, c, r));
  r.topk_ids()[3] = 4;
  EXPECT_THROW(route(view, c, r), ShapeError);
  Routing other(1, 2);
  EXPECT_THROW(route(view, c, other), ShapeError);
}

TEST(Route, IdentityExpertsAreCounted) {
  RouterConfig c = softmax_router(6, 2);
  c.identity_experts = 2;
  EXPECT_EQ(c.weighted_experts(), 4);
  EXPECT_EQ(run({0, 1, 0, 0, 0, 2}, c).topk_ids()[0], 5);
  for (const std::int32_t bad : {-1, 6}) {
    c.identity_experts = bad;
    EXPECT_THROW(c.validate(), ConfigError);
  }
}

TEST(Route, SqrtSoftplusIsLinearForLargeLogits) {
  RouterConfig c = softmax_router(2, 1, false);
  c.score = ScoreFunction::SqrtSoftplus;
  EXPECT_FLOAT_EQ(run({-3, 100}, c).topk_weights()[0], 10.0F);
  EXPECT_EQ(run({0, 3e38F}, c).topk_weights()[0], std::sqrt(3e38F));
}

TEST(Route, SelectionBiasSelectsButDoesNotWeigh) {
  RouterConfig c = softmax_router(4, 2, false);
  c.score = ScoreFunction::Sigmoid;
  c.selection_bias = {0, 0, 0, 5};
  const Routing got = run({3, 2, 1, 0}, c);
  EXPECT_EQ(got.topk_ids()[0], 3);
  EXPECT_EQ(got.topk_ids()[1], 0);
  EXPECT_FLOAT_EQ(got.topk_weights()[0], 0.5F);
  EXPECT_FLOAT_EQ(got.topk_weights()[1], 1.0F / (1.0F + std::exp(-3.0F)));
}

TEST(Route, NormalisationGuards) {
  RouterConfig c = softmax_router(4, 2);
  c.score = ScoreFunction::Sigmoid;
  const std::vector<float> hopeless{-1000, -1000, -999, -1000};  // every sigmoid underflows to 0
  const Routing uniform = run(hopeless, c);
  EXPECT_EQ(uniform.topk_weights()[0], 0.5F);
  EXPECT_EQ(uniform.topk_weights()[1], 0.5F);
  c.guard_eps = 1e-20F;
  for (const NormGuard guard : {NormGuard::AddEps, NormGuard::ClampMin}) {
    c.guard = guard;
    EXPECT_EQ(run(hopeless, c).topk_weights()[0], 0.0F);
  }
  // The reciprocal of this sum is not a float.
  c.guard = NormGuard::None;
  const Routing tiny = run({-93, -93, -93, -93}, c);
  EXPECT_NEAR(tiny.topk_weights()[0], 0.5F, 1e-2F);
}

TEST(RouteNonFinite, OrderAndWeights) {
  RouteStats stats;
  const std::vector<float> logits{
      kNaN, -kInf, 0,    kInf, 1,     -kInf,  // +inf first, then finite
      kNaN, -kInf, kNaN, 0,    -kInf, -500,   // only two usable; one of them underflows
      1,    2,     3,    4,    5,     6,      // finite
  };
  const Routing got = run(logits, softmax_router(6, 4), &stats);
  EXPECT_EQ(stats.nonfinite_rows, 2);
  const std::vector<std::int32_t> ids{3, 2, 4, 1, 9 - 6, 11 - 6, 7 - 6, 10 - 6, 5, 4, 3, 2};
  EXPECT_TRUE(std::ranges::equal(got.topk_ids(), ids));
  EXPECT_EQ(got.topk_weights()[0], 1.0F);
  EXPECT_EQ(got.topk_weights()[3], 0.0F);
  EXPECT_EQ(got.topk_weights()[4], 1.0F);
  for (std::size_t p = 5; p < 8; ++p) EXPECT_EQ(got.topk_weights()[p], 0.0F);
}

TEST(RouteNonFinite, NothingUsable) {
  for (const float bad : {kNaN, -kInf}) {
    for (const bool renormalize : {true, false}) {
      RouterConfig c = softmax_router(8, 4, renormalize);
      c.scale = 3.0F;
      RouteStats stats;
      const Routing got = run(std::vector<float>(8, bad), c, &stats);
      EXPECT_EQ(stats.nonfinite_rows, 1);
      for (std::size_t s = 0; s < 4; ++s) {
        EXPECT_EQ(got.topk_ids()[s], static_cast<std::int32_t>(s));
        EXPECT_EQ(got.topk_weights()[s], 0.25F);
      }
    }
  }
}

TEST(RouteNonFinite, UnusableExpertsGetNoShareOfAUniformRow) {
  RouterConfig c = softmax_router(3, 3);
  c.score = ScoreFunction::Sigmoid;
  const Routing got = run({kNaN, -1000, -kInf}, c);
  EXPECT_EQ(got.topk_ids()[0], 1);
  EXPECT_FLOAT_EQ(got.topk_weights()[0], 1.0F / 3.0F);
  EXPECT_EQ(got.topk_weights()[1], 0.0F);
  EXPECT_EQ(got.topk_weights()[2], 0.0F);
}

TEST(RouteNonFinite, EveryRouterStaysValid) {
  testing::Random random(3);
  const float values[] = {kNaN, -kInf, kInf, 0, 1, -1, 3e38F, -3e38F, 1e-40F, -90, 90, 0.5F};
  for (int round = 0; round < 4000; ++round) {
    RouterConfig c = softmax_router(24, 1 + random.below(12), random.below(2));
    c.score = static_cast<ScoreFunction>(random.below(4));
    c.select_on = random.below(2) ? SelectOn::Logits : SelectOn::Scores;
    if (random.below(2)) c.router_bias.assign(24, 3e38F);
    if (random.below(2)) c.selection_bias.assign(24, -3e38F);
    if (random.below(2)) {
      c.num_groups = 4;
      c.groups_used = 2;
    }
    c.group_reduce = static_cast<GroupReduce>(random.below(2));
    c.group_mask = static_cast<GroupMask>(random.below(2));
    c.guard = static_cast<NormGuard>(random.below(3));
    c.guard_eps = 1e-20F;
    std::vector<float> logits(24);
    for (float& v : logits) v = values[random.below(std::ssize(values))];
    const Routing got = run(logits, c);
    std::set<std::int32_t> seen;
    for (std::size_t s = 0; s < static_cast<std::size_t>(c.top_k); ++s) {
      const std::int32_t id = got.topk_ids()[s];
      ASSERT_TRUE(id >= 0 && id < 24) << "round " << round;
      ASSERT_TRUE(seen.insert(id).second) << "round " << round;
      const float w = got.topk_weights()[s];
      ASSERT_TRUE(std::isfinite(w) && w >= 0) << "round " << round << " weight " << w;
      const float logit = logits[static_cast<std::size_t>(id)];
      if (!(logit > -kInf)) {
        ASSERT_EQ(w, 0.0F) << "round " << round;
      }
    }
  }
}

TEST(RouteNonFinite, InfinityIsTheLargestFloat) {
  const Routing two = run({kInf, 0, kInf}, softmax_router(3, 3));
  EXPECT_EQ(two.topk_ids()[0], 0);
  EXPECT_EQ(two.topk_ids()[1], 2);
  EXPECT_EQ(two.topk_weights()[0], 0.5F);
  EXPECT_EQ(two.topk_weights()[1], 0.5F);
}

TEST(RouteNonFinite, GroupWithoutUsableExpertsComesLast) {
  RouterConfig c = softmax_router(6, 2);
  c.num_groups = 3;
  c.groups_used = 1;
  c.score = ScoreFunction::Sigmoid;
  c.selection_bias.assign(6, -10.0F);  // every usable group scores below 0
  const Routing got = run({kNaN, -kInf, kNaN, 1, kNaN, kNaN}, c);
  EXPECT_EQ(got.topk_ids()[0], 3);
  EXPECT_EQ(got.topk_ids()[1], 2);  // of the same group, never of a masked one
  EXPECT_EQ(got.topk_weights()[0], 1.0F);
}

TEST(RouteNonFinite, UnusableExpertsDoNotCountInTheirGroup) {
  RouterConfig c = softmax_router(4, 2);
  c.num_groups = 2;
  c.groups_used = 1;
  c.score = ScoreFunction::Sigmoid;
  c.selection_bias.assign(4, -10.0F);
  // The sum of group 0 is that of its one usable expert, about -9.3; that of group 1 is about
  // -18.9.
  for (const float bad : {kNaN, -kInf}) {
    const Routing got = run({bad, 1.0F, 0.1F, 0.2F}, c);
    EXPECT_EQ(got.topk_ids()[0], 1);
    EXPECT_EQ(got.topk_ids()[1], 0);
  }
}

TEST(Route, StridedRowsAndNoRows) {
  const RouterConfig c = softmax_router(4, 2);
  std::vector<float> wide{0, 1, 1, -1, 99, 99, 2, 0, 0, 2, 99, 99};
  ConstTensorView view(wide.data(), DType::F32, {2, 4});
  view.strides[0] = 6;
  Routing out;
  route(view, c, out);
  const std::vector<std::int32_t> ids{1, 2, 0, 3};
  EXPECT_TRUE(std::ranges::equal(out.topk_ids(), ids));
  route(ConstTensorView(wide.data(), DType::F32, {0, 4}), c, out);
  EXPECT_EQ(out.num_tokens(), 0);
  EXPECT_EQ(out.topk_ids().size(), 0U);
}

TEST(Route, RejectsBadCalls) {
  const std::vector<float> logits(8);
  const RouterConfig c = softmax_router(4, 2);
  Routing out;
  EXPECT_THROW(route(ConstTensorView(logits.data(), DType::F32, {2, 3}), c, out), ShapeError);
  EXPECT_THROW(route(ConstTensorView(logits.data(), DType::F32, {8}), c, out), ShapeError);
  EXPECT_THROW(route(ConstTensorView(logits.data(), DType::F16, {2, 4}), c, out), DTypeError);
  ConstTensorView column(logits.data(), DType::F32, {2, 4});
  column.strides = {1, 2, 0, 0};
  EXPECT_THROW(route(column, c, out), ShapeError);
  EXPECT_THROW(route(ConstTensorView(logits.data(), DType::F32, {2, 4}), softmax_router(4, 5), out),
               ConfigError);
}

TEST(Route, DoesNotAllocateOnReuse) {
  RouterConfig c = softmax_router(128, 8);
  c.num_groups = 8;
  c.groups_used = 4;
  c.selection_bias.assign(128, 0.0F);
  const std::vector<float> logits = grid_values(128 * 16, 1, 4);
  Routing out;
  const auto call = [&] { route(ConstTensorView(logits.data(), DType::F32, {16, 128}), c, out); };
  EXPECT_GT(count_allocations(call), 0);  // the counter counts
  EXPECT_EQ(count_allocations(call), 0);
  EXPECT_EQ(count_allocations(
                [&] { route(ConstTensorView(logits.data(), DType::F32, {7, 128}), c, out); }),
            0);
}

TEST(Route, UsesItsScratchAndNoMore) {
  for (const std::int32_t experts : {1, 15, 16, 17, 128}) {
    RouterConfig c = softmax_router(experts, 1);
    c.num_groups = experts;
    const auto size = static_cast<std::size_t>(route_scratch_elems(c));
    std::vector<float> scratch(size + 4, 1234.0F);
    const std::vector<float> logits = grid_values(static_cast<std::size_t>(experts), 1, 4);
    Routing out(1, 1);
    op::Route call = route_by(c);
    call.logits = logits.data();
    call.row_stride = experts;
    call.out = out.view();
    call.scratch = scratch.data();
    route_rows(call);
    for (std::size_t i = size; i < scratch.size(); ++i) EXPECT_EQ(scratch[i], 1234.0F);
  }
}

TEST(RouterConfig, Validate) {
  const auto rejects = [](auto change, const std::string& word) {
    RouterConfig c = softmax_router(16, 4);
    c.validate();
    change(c);
    try {
      c.validate();
      ADD_FAILURE() << "accepted a bad " << word;
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
  };
  rejects([](RouterConfig& c) { c.num_experts = 0; }, "num_experts");
  rejects([](RouterConfig& c) { c.top_k = 0; }, "top_k");
  rejects([](RouterConfig& c) { c.top_k = 17; }, "top_k");
  rejects([](RouterConfig& c) { c.num_groups = 5; }, "num_groups");
  rejects([](RouterConfig& c) { c.num_groups = 0; }, "num_groups");
  rejects([](RouterConfig& c) { c.groups_used = 2; }, "groups_used");
  rejects([](RouterConfig& c) { c.num_groups = 8; }, "top_k");  // 2 experts in reach
  rejects([](RouterConfig& c) { c.scale = -1; }, "scale");
  rejects([](RouterConfig& c) { c.scale = kNaN; }, "scale");
  rejects([](RouterConfig& c) { c.guard = NormGuard::AddEps; }, "guard_eps");
  rejects([](RouterConfig& c) { c.router_bias.assign(15, 0); }, "router_bias");
  rejects([](RouterConfig& c) { (c.selection_bias.assign(16, 0), c.selection_bias[3] = kNaN); },
          "selection_bias[3]");
  rejects([](RouterConfig& c) { (c.router_bias.assign(16, 0), c.router_bias[0] = kInf); },
          "router_bias[0]");
}

TEST(Routing, ResizeChecksAndKeepsCapacity) {
  Routing routing(8, 4);
  const auto* before = routing.topk_ids().data();
  EXPECT_EQ(count_allocations([&] { routing.resize(4, 8); }), 0);
  EXPECT_EQ(routing.topk_ids().data(), before);
  EXPECT_EQ(routing.num_tokens(), 4);
  EXPECT_EQ(routing.top_k(), 8);
  EXPECT_EQ(routing.view().num_pairs(), 32);
  EXPECT_THROW(routing.resize(-1, 4), ShapeError);
  EXPECT_THROW(routing.resize(1, 0), ShapeError);
  EXPECT_THROW(routing.resize(std::int64_t{1} << 30, 2), ShapeError);
}

TEST(CheckIds, NamesTheFirst) {
  Routing routing(3, 2);
  const std::vector<std::int32_t> ids{0, 3, -1, 4, -2, 9};
  std::ranges::copy(ids, routing.topk_ids().begin());
  try {
    check_ids(routing.view(), 4, "moe_forward");
    FAIL() << "accepted";
  } catch (const ShapeError& error) {
    EXPECT_STREQ(error.what(),
                 "moe_forward: topk_ids[1, 1]: expected -1 (skipped) or 0 to 3, got 4");
  }
  EXPECT_THROW(check_ids(routing.view(), 5, "op"), ShapeError);
  routing.topk_ids()[4] = routing.topk_ids()[5] = -1;
  EXPECT_NO_THROW(check_ids(routing.view(), 5, "op"));
}

}  // namespace
}  // namespace moesaic

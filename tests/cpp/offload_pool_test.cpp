// The pool's bookkeeping: worked values, and invariants over random traces.

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "moesaic/error.hpp"
#include "moesaic/expert_pool.hpp"
#include "random.hpp"

namespace moesaic {
namespace {

using Ids = std::vector<std::int32_t>;

ExpertPoolConfig config(std::int32_t experts, std::int32_t budget,
                        Ranking ranking = Ranking::Hits) {
  ExpertPoolConfig c;
  c.num_experts = experts;
  c.budget = budget;
  c.ranking = ranking;
  return c;
}

TEST(TargetFromCounts, TiesGoToTheLowerIdAndZeroesAreDropped) {
  EXPECT_EQ(target_from_counts(std::vector<std::int64_t>{0, 2, 1, 0, 2}, 3), (Ids{1, 4, 2}));
  EXPECT_EQ(target_from_counts(std::vector<std::int64_t>{0, 5, 3, 0, 3, 1}, 3), (Ids{1, 2, 4}));
  EXPECT_EQ(target_from_counts(std::vector<std::int64_t>{0, 2, 2, 0, 9}, 3), (Ids{4, 1, 2}));
  EXPECT_EQ(target_from_counts(std::vector<std::int64_t>{0, 0, 7}, 3), (Ids{2}));
  EXPECT_EQ(target_from_counts(std::vector<std::int64_t>{1, 1}, 0), Ids{});
}

TEST(TargetFromCounts, HitsOutsideAreLeftOut) {
  EXPECT_EQ(count_hits(Ids{1, 1, 4, -1, 9, 0}, 5), (std::vector<std::int64_t>{1, 2, 0, 0, 1}));
}

TEST(ExpertPool, StartsWithTheFirstExperts) {
  const ExpertPool pool(config(6, 4));
  EXPECT_EQ(pool.residents(), (Ids{0, 1, 2, 3}));
  EXPECT_EQ(pool.slot_map(), (Ids{0, 1, 2, 3, -1, -1}));
  EXPECT_EQ(pool.resident_mask(), (std::vector<std::uint8_t>{1, 1, 1, 1, 0, 0}));
  EXPECT_TRUE(pool.offload_enabled());
  EXPECT_FALSE(ExpertPool(config(6, 9)).offload_enabled());
  EXPECT_EQ(ExpertPool(config(6, 9)).budget(), 6);
  EXPECT_FALSE(ExpertPool(ExpertPool::all_resident(6)).offload_enabled());
}

// A target shorter than the budget: the residents that nobody replaces stay.
TEST(ExpertPool, ASwapKeepsTheOtherResidents) {
  ExpertPool pool(config(8, 4));
  const RefreshResult result = pool.refresh_from_indices(Ids{5, 6, 5, 0});
  EXPECT_EQ(result.target, (Ids{5, 0, 6}));
  EXPECT_EQ(result.promotions, (std::vector<SlotLoad>{{5, 3, 3}, {6, 2, 2}}));
  EXPECT_EQ(result.demotions, (Ids{3, 2}));
  EXPECT_EQ(pool.residents(), (Ids{0, 1, 5, 6}));
  const PoolStats stats = pool.stats();
  EXPECT_EQ(stats.refreshes, 1);
  EXPECT_EQ(stats.promotions, 2);
  EXPECT_EQ(stats.demotions, 2);
  pool.reset_stats();
  EXPECT_EQ(pool.stats().promotions, 0);
}

TEST(ExpertPool, TheColdestLeavesFirst) {
  ExpertPoolConfig c = config(6, 3);
  c.decay = 1.0;
  ExpertPool pool(c);
  pool.observe(Ids{0, 0, 0, 1, 2, 2});
  EXPECT_EQ(pool.refresh_from_indices(Ids{4, 4}).demotions, (Ids{1}));
  EXPECT_EQ(pool.residents(), (Ids{0, 2, 4}));
  EXPECT_EQ(pool.slot_map()[4], 1);
}

TEST(ExpertPool, RefreshDecisions) {
  ExpertPoolConfig c = config(8, 4);
  c.refresh = RefreshPolicy::every_decode_steps(3);
  const ExpertPool pool(c);
  Ids steps;
  for (std::int32_t step = 0; step < 10; ++step) {
    if (pool.should_refresh(step, false, ExecMode::Reuse)) steps.push_back(step);
  }
  EXPECT_EQ(steps, (Ids{0, 3, 6, 9}));
  EXPECT_TRUE(pool.should_refresh(1, true, ExecMode::Reuse));
  EXPECT_TRUE(pool.should_refresh(1, false, ExecMode::Refresh));

  c.refresh = RefreshPolicy::every_steps(2);
  EXPECT_TRUE(ExpertPool(c).should_refresh(4, false, ExecMode::Reuse));
  EXPECT_FALSE(ExpertPool(c).should_refresh(5, false, ExecMode::Reuse));
  c.refresh = RefreshPolicy::every_forward();
  EXPECT_TRUE(ExpertPool(c).should_refresh(5, false, ExecMode::Reuse));
  c.refresh = RefreshPolicy::manual();
  EXPECT_FALSE(ExpertPool(c).should_refresh(0, false, ExecMode::Reuse));
  EXPECT_TRUE(ExpertPool(c).should_refresh(0, true, ExecMode::Reuse));
  EXPECT_TRUE(ExpertPool(c).should_refresh(0, false, ExecMode::Refresh));
  c.budget = 8;  // nothing to offload
  EXPECT_FALSE(ExpertPool(c).should_refresh(0, true, ExecMode::Refresh));
  EXPECT_EQ(RefreshPolicy{}, RefreshPolicy::every_steps(1));
}

TEST(ExpertPool, AMarginKeepsIncumbents) {
  ExpertPoolConfig c = config(4, 2);
  c.decay = 1.0;
  c.margin = 0.5;
  ExpertPool pool(c);
  pool.observe(Ids{0, 0, 1, 1});
  EXPECT_TRUE(pool.refresh_from_indices(Ids{3, 3, 3}).promotions.empty());  // 3 is not above 3
  EXPECT_EQ(pool.refresh_from_indices(Ids{3}).promotions, (std::vector<SlotLoad>{{3, 1, 1}}));
}

TEST(ExpertPool, ADwellKeepsNewcomers) {
  ExpertPoolConfig c = config(4, 1);
  c.min_dwell = 2;
  ExpertPool pool(c);
  EXPECT_TRUE(pool.refresh_from_indices(Ids{1}).promotions.empty());  // expert 0 came at 0
  EXPECT_EQ(pool.refresh_from_indices(Ids{1}).promotions.size(), 1U);
  EXPECT_TRUE(pool.refresh_from_indices(Ids{2}).promotions.empty());
  EXPECT_EQ(pool.refresh_from_indices(Ids{2}).promotions.size(), 1U);
}

TEST(ExpertPool, PinnedExpertsStay) {
  ExpertPool pool(config(6, 2));
  const Ids needed = {0, 1};
  {
    const ExpertPool::Pins pins(pool, needed);
    EXPECT_TRUE(pool.refresh_from_indices(Ids{4, 5}).promotions.empty());
    EXPECT_EQ(pool.residents(), needed);
  }
  pool.refresh_from_indices(Ids{4, 5});
  EXPECT_EQ(pool.residents(), (Ids{4, 5}));
}

TEST(ExpertPool, StageNeverEvictsWhatTheForwardNeeds) {
  ExpertPool pool(config(6, 3, Ranking::Recency));
  const std::vector<SlotLoad> loads = pool.stage(Ids{1, 2, 4, 5});
  EXPECT_EQ(loads, (std::vector<SlotLoad>{{4, 0, 0}}));  // 5 finds no place
  EXPECT_EQ(pool.residents(), (Ids{1, 2, 4}));
  EXPECT_TRUE(pool.stage(Ids{4, 1}).empty());
}

TEST(ExpertPool, FixedResidentsNeverMove) {
  ExpertPool pool(config(6, 3, Ranking::Fixed));
  EXPECT_TRUE(pool.stage(Ids{4, 5, 4}).empty());
  EXPECT_TRUE(pool.refresh_from_indices(Ids{4, 5}).promotions.empty());
  EXPECT_EQ(pool.residents(), (Ids{0, 1, 2}));
  pool.warm(std::vector<double>{0, 0, 0, 3, 2, 1});  // but by a profile
  EXPECT_EQ(pool.residents(), (Ids{3, 4, 5}));
}

TEST(ExpertPool, ATargetFromOutside) {
  ExpertPool pool(config(6, 3));
  pool.apply_target(Ids{5});
  EXPECT_EQ(pool.residents(), (Ids{0, 1, 5}));
  EXPECT_THROW(pool.apply_target(Ids{1, 1}), ShapeError);
  EXPECT_THROW(pool.apply_target(Ids{6}), ShapeError);
  EXPECT_THROW(pool.apply_target(Ids{-1}), ShapeError);
  EXPECT_THROW(pool.apply_target(Ids{0, 1, 2, 3}), ShapeError);
  EXPECT_THROW(pool.observe(Ids{6}), ShapeError);
  EXPECT_THROW(pool.stage(Ids{-2}), ShapeError);
  EXPECT_THROW(pool.warm(std::vector<double>{1.0}), ShapeError);
  EXPECT_EQ(pool.residents(), (Ids{0, 1, 5}));
}

TEST(ExpertPool, BadConfigurations) {
  EXPECT_THROW(ExpertPool(config(0, 1)), ConfigError);
  EXPECT_THROW(ExpertPool(config(4, -1)), ConfigError);
  ExpertPoolConfig c = config(4, 2);
  c.decay = 1.5;
  EXPECT_THROW(ExpertPool{c}, ConfigError);
  c = config(4, 2);
  c.refresh.steps = 0;
  EXPECT_THROW(ExpertPool{c}, ConfigError);
}

TEST(ExpertPool, MergedMask) {
  ExpertPool a(config(5, 2)), b(config(5, 2)), c(config(6, 2));
  b.apply_target(Ids{4, 0});
  const ExpertPool* two[] = {&a, &b};
  EXPECT_EQ(merged_resident_mask(two), (std::vector<std::uint8_t>{1, 1, 0, 0, 1}));
  const ExpertPool* unequal[] = {&a, &c};
  EXPECT_THROW(merged_resident_mask(unequal), ShapeError);
}

TEST(ExpertUsage, CountsTotalsTimeAndPairs) {
  ExpertUsage usage(4, true);
  usage.add(Ids{0, 1, 0, 2}, 2);
  usage.add(Ids{3, -1}, 2);
  EXPECT_EQ(usage.tokens(), 3);
  EXPECT_EQ(usage.forwards(), 2);
  EXPECT_TRUE(std::ranges::equal(usage.counts(), std::vector<std::int64_t>{2, 1, 1, 1}));
  EXPECT_TRUE(
      std::ranges::equal(usage.history(), std::vector<std::int64_t>{2, 1, 1, 0, 0, 0, 0, 1}));
  EXPECT_EQ(usage.coactivation()[0 * 4 + 1], 1);
  EXPECT_EQ(usage.coactivation()[0 * 4 + 0], 2);
  EXPECT_EQ(usage.coactivation()[3 * 4 + 3], 1);
  for (int i = 0; i < 2 * ExpertUsage::kMaxRows; ++i) usage.add(Ids{1}, 1);
  EXPECT_LE(usage.history().size(), static_cast<std::size_t>(ExpertUsage::kMaxRows * 4));
  EXPECT_EQ(std::accumulate(usage.history().begin(), usage.history().end(), std::int64_t{0}),
            std::accumulate(usage.counts().begin(), usage.counts().end(), std::int64_t{0}));
  EXPECT_GT(usage.interval(), 1);
}

// What must hold whatever comes: random traces, every budget, every ranking, both ways of use.
TEST(ExpertPool, InvariantsOverRandomTraces) {
  constexpr std::int32_t kExperts = 9;
  for (const Ranking ranking : {Ranking::Hits, Ranking::Recency, Ranking::Fixed}) {
    for (std::int32_t budget = 0; budget <= kExperts; ++budget) {
      ExpertPoolConfig c = config(kExperts, budget, ranking);
      testing::Random random(static_cast<std::uint32_t>(budget));
      c.decay = budget % 3 * 0.5;
      c.margin = budget % 2 * 0.25;
      c.min_dwell = budget % 4;
      ExpertPool pool(c), twin(c);
      for (int step = 0; step < 60; ++step) {
        Ids ids(static_cast<std::size_t>(1 + random.below(7)));
        for (std::int32_t& id : ids) {
          id = random.below(kExperts + 1) - 1;
        }
        const Ids before = pool.slot_map();
        std::vector<SlotLoad> loads;
        const bool staged = random.below(2) == 0;
        if (staged) {
          loads = pool.stage(ids);
          EXPECT_EQ(twin.stage(ids), loads);
        } else {
          const RefreshResult result = pool.refresh_from_indices(ids);
          loads = result.promotions;
          EXPECT_EQ(twin.refresh_from_indices(ids).promotions, loads);
          EXPECT_EQ(result.demotions.size(), loads.size());
          EXPECT_LE(result.target.size(), static_cast<std::size_t>(budget));
        }
        const Ids after = pool.slot_map();
        EXPECT_EQ(twin.slot_map(), after);
        EXPECT_EQ(pool.residents().size(), static_cast<std::size_t>(budget));
        std::set<std::int32_t> slots;
        Ids expected = before;
        for (const SlotLoad& load : loads) {
          EXPECT_EQ(before[static_cast<std::size_t>(load.evicted)], load.slot);
          expected[static_cast<std::size_t>(load.evicted)] = -1;
          if (staged) {
            EXPECT_EQ(std::ranges::count(ids, load.evicted), 0);
          }
        }
        for (const SlotLoad& load : loads) {
          expected[static_cast<std::size_t>(load.expert)] = load.slot;
        }
        EXPECT_EQ(after, expected);  // who stays keeps its slot
        for (const std::int32_t slot : after) {
          if (slot < 0) continue;
          EXPECT_LT(slot, budget);
          EXPECT_TRUE(slots.insert(slot).second);
        }
      }
      const PoolStats stats = pool.stats();
      EXPECT_EQ(stats.promotions, stats.demotions);
    }
  }
}

}  // namespace
}  // namespace moesaic

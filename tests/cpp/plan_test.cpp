#include "moesaic/plan.hpp"

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "count_allocations.hpp"
#include "gtest/gtest.h"
#include "moesaic/error.hpp"
#include "moesaic/tuning.hpp"
#include "random.hpp"

namespace moesaic {
namespace {

using Ids = std::vector<std::int32_t>;
using ::moesaic::test::count_allocations;

Ids to_vector(std::span<const std::int32_t> values) { return {values.begin(), values.end()}; }

Routing make_routing(const Ids& ids, std::int32_t top_k) {
  Routing routing(static_cast<std::int64_t>(ids.size()) / top_k, top_k);
  std::ranges::copy(ids, routing.topk_ids().begin());
  return routing;
}

struct Case {
  std::int32_t num_tokens, num_experts, top_k;
  int skip_percent;
};

/// Shapes that break plans: no tokens, one expert, all experts, many experts, few pairs.
const Case kCases[] = {
    {0, 8, 2, 0},    {1, 1, 1, 0},   {5, 1, 1, 0},      {1, 4, 4, 0},    {7, 4, 4, 0},
    {3, 8, 2, 50},   {9, 8, 2, 100}, {64, 128, 8, 0},   {2, 2048, 8, 0}, {70, 2048, 8, 10},
    {200, 16, 3, 5}, {33, 7, 5, 30}, {16, 2048, 64, 0},
};

Routing random_routing(const Case& c, std::uint32_t seed) {
  testing::Random random(seed);
  Routing routing(c.num_tokens, c.top_k);
  Ids experts(static_cast<std::size_t>(c.num_experts));
  for (std::int32_t t = 0; t < c.num_tokens; ++t) {
    for (std::size_t e = 0; e < experts.size(); ++e) experts[e] = static_cast<std::int32_t>(e);
    random.shuffle(experts);
    for (std::int32_t s = 0; s < c.top_k; ++s) {
      const bool skip = random.below(100) < c.skip_percent;
      routing.topk_ids()[static_cast<std::size_t>(t * c.top_k + s)] =
          skip ? -1 : experts[static_cast<std::size_t>(s)];
    }
  }
  return routing;
}

TEST(BucketPlan, WorkedExample) {
  const BucketPlan plan = BucketPlan::build(make_routing({1, 2, 0, 3, 2, 3}, 2), 4);
  EXPECT_EQ(to_vector(plan.expert_offsets()), (Ids{0, 1, 2, 4, 6}));
  EXPECT_EQ(to_vector(plan.row_token()), (Ids{1, 0, 0, 2, 1, 2}));
  EXPECT_EQ(to_vector(plan.row_pair()), (Ids{2, 0, 1, 4, 3, 5}));
  EXPECT_EQ(to_vector(plan.pair_row()), (Ids{1, 2, 0, 4, 3, 5}));
}

TEST(BucketPlan, Properties) {
  for (const Case& c : kCases) {
    for (std::uint32_t seed = 0; seed < 5; ++seed) {
      const Routing routing = random_routing(c, seed);
      const BucketPlan plan = BucketPlan::build(routing, c.num_experts);
      SCOPED_TRACE(::testing::Message() << "T=" << c.num_tokens << " E=" << c.num_experts
                                        << " k=" << c.top_k << " seed=" << seed);
      const auto ids = routing.topk_ids();
      const auto offsets = plan.expert_offsets();
      const std::int64_t used = std::ranges::count_if(ids, [](auto id) { return id >= 0; });
      ASSERT_EQ(plan.num_rows(), used);
      ASSERT_EQ(offsets.size(), static_cast<std::size_t>(c.num_experts) + 1);
      ASSERT_EQ(offsets[0], 0);
      std::int64_t rows = 0;
      for (std::int32_t e = 0; e < c.num_experts; ++e) {
        const std::int32_t begin = offsets[static_cast<std::size_t>(e)];
        const std::int32_t end = offsets[static_cast<std::size_t>(e) + 1];
        ASSERT_LE(begin, end);
        for (std::int32_t row = begin; row < end; ++row, ++rows) {
          const std::int32_t pair = plan.row_pair()[static_cast<std::size_t>(row)];
          ASSERT_EQ(ids[static_cast<std::size_t>(pair)], e);
          ASSERT_EQ(plan.pair_row()[static_cast<std::size_t>(pair)], row);
          ASSERT_EQ(plan.row_token()[static_cast<std::size_t>(row)], pair / c.top_k);
          if (row > begin) {  // stable
            ASSERT_GT(pair, plan.row_pair()[static_cast<std::size_t>(row) - 1]);
          }
        }
      }
      ASSERT_EQ(rows, used);
      for (std::size_t p = 0; p < ids.size(); ++p) {
        ASSERT_EQ(plan.pair_row()[p] == -1, ids[p] == -1);
      }
      for (auto row = static_cast<std::size_t>(used); row < ids.size(); ++row) {
        ASSERT_EQ(plan.row_pair()[row], -1);
        ASSERT_EQ(plan.row_token()[row], -1);
      }
    }
  }
}

TEST(BucketPlan, RebuildEqualsBuildAndDoesNotAllocate) {
  const Case big{64, 32, 4, 10};
  BucketPlan plan = BucketPlan::build(random_routing(big, 1), 32);
  for (const Case& c : {Case{64, 32, 4, 0}, Case{3, 32, 4, 20}, Case{0, 32, 4, 0}}) {
    const Routing routing = random_routing(c, 2);
    EXPECT_EQ(count_allocations([&] { plan.rebuild(routing); }), 0);
    const BucketPlan fresh = BucketPlan::build(routing, 32);
    EXPECT_EQ(to_vector(plan.expert_offsets()), to_vector(fresh.expert_offsets()));
    EXPECT_EQ(to_vector(plan.row_token()), to_vector(fresh.row_token()));
    EXPECT_EQ(to_vector(plan.row_pair()), to_vector(fresh.row_pair()));
    EXPECT_EQ(to_vector(plan.pair_row()), to_vector(fresh.pair_row()));
    EXPECT_EQ(plan.num_tokens(), c.num_tokens);
  }
}

TEST(BucketPlan, RejectsBadIds) {
  EXPECT_THROW(BucketPlan::build(make_routing({0, 4}, 2), 4), ShapeError);
  EXPECT_THROW(BucketPlan::build(make_routing({0, -2}, 2), 4), ShapeError);
  EXPECT_THROW(BucketPlan::build(make_routing({0}, 1), 0), ShapeError);
}

TEST(Align, WorkedExample) {
  const Routing routing = make_routing({1, 2, 0, 3, 2, 3}, 2);
  const auto packed = AlignedRouting::build(routing, 4, 4, RowSpace::PackedRows);
  EXPECT_EQ(to_vector(packed.sorted_ids()), (Ids{0, 6, 6, 6, 1, 6, 6, 6, 2, 3, 6, 6, 4, 5, 6, 6}));
  const auto pairs = AlignedRouting::build(routing, 4, 4, RowSpace::TokenPairs);
  EXPECT_EQ(to_vector(pairs.sorted_ids()), (Ids{2, 6, 6, 6, 0, 6, 6, 6, 1, 4, 6, 6, 3, 5, 6, 6}));
  for (const auto* aligned : {&packed, &pairs}) {
    EXPECT_EQ(aligned->num_post_pad(), 16);
    EXPECT_EQ(aligned->num_blocks(), 4);
    const Ids blocks = to_vector(aligned->block_experts());
    EXPECT_EQ(Ids(blocks.begin(), blocks.begin() + 4), (Ids{0, 1, 2, 3}));
    EXPECT_TRUE(std::all_of(blocks.begin() + 4, blocks.end(), [](auto e) { return e == -1; }));
  }
}

TEST(Align, ExampleOfVllm) {
  const Routing routing = make_routing({2, 3, 4, 1, 2, 4, 1, 3, 4, 1, 2, 3}, 3);
  const auto aligned = AlignedRouting::build(routing, 5, 4, RowSpace::TokenPairs);
  EXPECT_EQ(to_vector(aligned.sorted_ids()),
            (Ids{3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12}));
  const Ids blocks = to_vector(aligned.block_experts());
  EXPECT_EQ(Ids(blocks.begin(), blocks.begin() + 4), (Ids{1, 2, 3, 4}));
}

TEST(Align, Properties) {
  for (const Case& c : kCases) {
    for (const std::int32_t block : {1, 4, 8, 16, 32, 48, 64}) {
      for (const RowSpace space : {RowSpace::TokenPairs, RowSpace::PackedRows}) {
        SCOPED_TRACE(::testing::Message() << "T=" << c.num_tokens << " E=" << c.num_experts
                                          << " k=" << c.top_k << " block=" << block);
        const Routing routing = random_routing(c, 7);
        const BucketPlan plan = BucketPlan::build(routing, c.num_experts);
        const std::int64_t pairs = plan.num_pairs();
        const auto capacity = aligned_capacity(pairs, c.num_experts, block);
        const auto blocks = aligned_block_capacity(pairs, c.num_experts, block);
        ASSERT_EQ(capacity, blocks * block);

        // Guarded and poisoned memory of exactly the capacity.
        Ids sorted(static_cast<std::size_t>(capacity) + 1, -99);
        Ids experts(static_cast<std::size_t>(blocks) + 1, -99);
        std::int32_t post_pad = -99;
        BucketPlanView view;
        view.expert_offsets = const_cast<std::int32_t*>(plan.expert_offsets().data());
        view.row_pair = const_cast<std::int32_t*>(plan.row_pair().data());
        align_block_size({.plan = view,
                          .num_pairs = pairs,
                          .num_experts = c.num_experts,
                          .block_size = block,
                          .block_capacity = blocks,
                          .row_space = space,
                          .out = {sorted.data(), experts.data(), &post_pad}});
        ASSERT_EQ(sorted.back(), -99);
        ASSERT_EQ(experts.back(), -99);
        ASSERT_LE(post_pad, capacity);
        ASSERT_EQ(post_pad % block, 0);

        std::vector<int> seen(static_cast<std::size_t>(pairs));
        std::int32_t last_expert = 0;
        for (std::int32_t b = 0; b < static_cast<std::int32_t>(blocks); ++b) {
          const std::int32_t expert = experts[static_cast<std::size_t>(b)];
          bool padding = false;
          for (std::int32_t i = b * block; i < (b + 1) * block; ++i) {
            const std::int32_t id = sorted[static_cast<std::size_t>(i)];
            padding |= id == pairs;
            if (padding) {  // exactly P, and trailing in its block
              ASSERT_EQ(id, pairs);
              continue;
            }
            const std::int32_t pair =
                space == RowSpace::TokenPairs ? id : plan.row_pair()[static_cast<std::size_t>(id)];
            ASSERT_EQ(routing.topk_ids()[static_cast<std::size_t>(pair)], expert);
            ++seen[static_cast<std::size_t>(pair)];
          }
          if (b * block < post_pad) {
            ASSERT_GE(expert, last_expert);
            ASSERT_NE(sorted[static_cast<std::size_t>(b * block)], pairs);  // no empty block
            last_expert = expert;
          } else {
            ASSERT_EQ(expert, -1);
          }
        }
        for (std::size_t p = 0; p < seen.size(); ++p) {
          ASSERT_EQ(seen[p], routing.topk_ids()[p] >= 0 ? 1 : 0);
        }

        const auto owned = AlignedRouting::build(routing, c.num_experts, block, space);
        ASSERT_EQ(owned.num_post_pad(), post_pad);
        sorted.resize(static_cast<std::size_t>(post_pad));
        experts.pop_back();
        ASSERT_EQ(to_vector(owned.sorted_ids()), sorted);
        ASSERT_EQ(to_vector(owned.block_experts()), experts);
      }
    }
  }
}

TEST(Align, Capacity) {
  EXPECT_EQ(aligned_capacity(0, 8, 16), 0);
  EXPECT_EQ(aligned_capacity(6, 4, 4), 20);            // 6 + 4 * 3, rounded up
  EXPECT_EQ(aligned_capacity(8, 2048, 64), 8 * 64);    // capped at P blocks
  EXPECT_EQ(aligned_capacity(16384, 128, 64), 24448);  // 16384 + 128 * 63
  EXPECT_EQ(aligned_block_capacity(16384, 128, 8), 2160);
}

TEST(Align, RejectsBadCalls) {
  const Routing routing = make_routing({0, 1}, 2);
  EXPECT_THROW(AlignedRouting::build(routing, 2, 0, RowSpace::TokenPairs), ConfigError);
  EXPECT_THROW(AlignedRouting::build(routing, 1, 8, RowSpace::TokenPairs), ShapeError);
}

TEST(Plan, BuildersDoNotAllocate) {
  const Case c{64, 32, 4, 10};
  Routing routing = random_routing(c, 3);
  const std::int64_t pairs = 256;
  Ids offsets(33), row_token(256), row_pair(256), pair_row(256);
  Ids sorted(static_cast<std::size_t>(aligned_capacity(pairs, 32, 16)));
  Ids experts(static_cast<std::size_t>(aligned_block_capacity(pairs, 32, 16)));
  std::int32_t post_pad = 0;
  const BucketPlanView view{offsets.data(), row_token.data(), row_pair.data(), pair_row.data()};
  EXPECT_EQ(count_allocations([&] {
              build_bucket_plan({.routing = routing.view(), .num_experts = 32, .out = view});
              align_block_size({.plan = view,
                                .num_pairs = pairs,
                                .num_experts = 32,
                                .block_size = 16,
                                .block_capacity = aligned_block_capacity(pairs, 32, 16),
                                .row_space = RowSpace::TokenPairs,
                                .out = {sorted.data(), experts.data(), &post_pad}});
              (void)pick_block_size(offsets, false, pairs, Tuning{});
            }),
            0);
}

Ids offsets_of(const std::vector<std::int32_t>& counts) {
  Ids offsets{0};
  for (const std::int32_t count : counts) offsets.push_back(offsets.back() + count);
  return offsets;
}

std::int32_t pick(const std::vector<std::int32_t>& counts, const Tuning& tuning = {}) {
  const Ids offsets = offsets_of(counts);
  return pick_block_size(offsets, false, offsets.back(), tuning);
}

TEST(PickBlockSize, HostCounts) {
  EXPECT_EQ(pick({0, 0, 0}), 16);
  EXPECT_EQ(pick_block_size({}, false, 1000, Tuning{}), 16);
  EXPECT_EQ(pick({64, 64}), 64);
  EXPECT_EQ(pick({256, 0, 0, 0}), 64);  // the same prompt for everyone
  EXPECT_EQ(pick({32, 32, 32}), 32);
  EXPECT_EQ(pick({16, 16}), 16);
  EXPECT_EQ(pick({1, 1, 1, 1}), 16);  // nothing fits: the default
  EXPECT_EQ(pick({50, 50}), 64);      // 128 of 100 rows
  EXPECT_EQ(pick({49, 49}), 16);      // 64: 1.306; 32: 1.306; 16: 1.306
  EXPECT_EQ(pick({40, 60, 30}), 32);  // 64: 192 rows of 130 wanted; 32: 160
}

TEST(PickBlockSize, BoundaryIsInclusive) {
  // 10 blocks of 64 for 640 / 1.3 = 492.3 rows: 493 rows fit, 492 do not.
  EXPECT_EQ(pick({64, 64, 64, 64, 64, 64, 64, 43, 1, 1}), 64);
  EXPECT_NE(pick({64, 64, 64, 64, 64, 64, 64, 42, 1, 1}), 64);
  // Exactly 1.30: 13 blocks of 64 for 640 rows.
  EXPECT_EQ(pick({64, 64, 64, 64, 64, 64, 64, 64, 64, 60, 1, 1, 2}), 64);
}

TEST(PickBlockSize, DeviceRoute) {
  Tuning tuning;
  EXPECT_EQ(pick_block_size({}, true, 1 << 20, tuning), 16);
  tuning.large_m_block_size = 48;
  EXPECT_EQ(pick_block_size({}, true, 1024, tuning), 48);
  EXPECT_EQ(pick_block_size({}, true, 1023, tuning), 16);
  tuning.large_m_min_pairs = 10;
  EXPECT_EQ(pick_block_size({}, true, 10, tuning), 48);
  // Counts on the host are not looked at on the device route, nor large_m on the host route.
  EXPECT_EQ(pick_block_size(offsets_of({64}), true, 9, tuning), 16);
  EXPECT_EQ(pick({64}, tuning), 64);
}

TEST(PickBlockSize, TuningWins) {
  Tuning tuning;
  tuning.large_m_block_size = 64;
  for (const std::int32_t size : kBlockSizes) {
    tuning.block_size = size;
    EXPECT_EQ(pick({64, 64}, tuning), size);
    EXPECT_EQ(pick({0}, tuning), size);
    EXPECT_EQ(pick_block_size({}, true, 1 << 20, tuning), size);
  }
}

}  // namespace
}  // namespace moesaic

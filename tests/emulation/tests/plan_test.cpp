// Plans on the device against the host's builders, bit for bit.
#include "moesaic/plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "launch.h"
#include "plan/tile.h"
#include "random.hpp"
#include "runtime/emulator.hpp"
#include "seeds.hpp"

namespace moesaic {
namespace {

constexpr std::int32_t kPoison = -77;
using Ints = std::vector<std::int32_t>;

Ints poisoned(std::int64_t count) { return Ints(static_cast<std::size_t>(count), kPoison); }

struct Plan {
  Ints expert_offsets, row_token, row_pair, pair_row;

  Plan(std::int64_t pairs, std::int32_t experts)
      : expert_offsets(poisoned(experts + 1)),
        row_token(poisoned(pairs)),
        row_pair(poisoned(pairs)),
        pair_row(poisoned(pairs)) {}
  BucketPlanView view() {
    return {expert_offsets.data(), row_token.data(), row_pair.data(), pair_row.data()};
  }
  bool operator==(const Plan&) const = default;
};

enum class Spread { Uniform, Skewed, OneExpert, NoneAtAll, FewSkipped };

Ints ids_of(std::int64_t pairs, std::int32_t experts, Spread spread, unsigned seed) {
  testing::Random random(seed);
  Ints ids(static_cast<std::size_t>(pairs));
  for (std::int32_t& id : ids) {
    switch (spread) {
      case Spread::Uniform:
        id = random.below(experts);
        break;
      case Spread::Skewed:
        id = std::min({random.below(experts), random.below(experts), random.below(experts)});
        break;
      case Spread::OneExpert:
        id = experts / 2;
        break;
      case Spread::NoneAtAll:
        id = -1;
        break;
      case Spread::FewSkipped:
        id = random.below(3) == 0 ? -1 : random.below(experts);
        break;
    }
  }
  return ids;
}

// The pairs of a plan, which reads their ids alone.
RoutingView routing_of(const Ints& ids, std::int32_t top_k) {
  return {const_cast<std::int32_t*>(ids.data()), nullptr,
          static_cast<std::int64_t>(ids.size()) / top_k, top_k};
}

Plan plan_on_host(const Ints& ids, std::int32_t top_k, std::int32_t experts) {
  Plan plan(static_cast<std::int64_t>(ids.size()), experts);
  build_bucket_plan(
      {.routing = routing_of(ids, top_k), .num_experts = experts, .out = plan.view()});
  return plan;
}

Plan plan_on_device(const Ints& ids, std::int32_t top_k, std::int32_t experts, std::uint64_t seed) {
  const auto pairs = static_cast<std::int64_t>(ids.size());
  Plan plan(pairs, experts);
  std::vector<std::byte> scratch(static_cast<std::size_t>(cuda::plan_scratch_bytes(pairs, experts)),
                                 std::byte{0xEE});
  op::BucketPlan args{
      .routing = routing_of(ids, top_k), .num_experts = experts, .out = plan.view()};
  args.out.scratch = scratch.data();
  emulation::options().seed = seed;
  EXPECT_EQ(cuda::launch_bucket_plan(args, nullptr), cuda::kOk);
  return plan;
}

struct Case {
  std::int64_t tokens;
  std::int32_t top_k, experts;
  Spread spread;
};

const Case kCases[] = {
    {0, 1, 1, Spread::Uniform},         {0, 8, 128, Spread::Uniform},
    {1, 1, 1, Spread::Uniform},         {1, 8, 128, Spread::Uniform},
    {7, 1, 3, Spread::NoneAtAll},       {33, 3, 5, Spread::FewSkipped},
    {64, 8, 128, Spread::Skewed},       {100, 8, 60, Spread::FewSkipped},
    {129, 4, 257, Spread::Uniform},     {300, 8, 128, Spread::OneExpert},
    {64, 64, 64, Spread::Uniform},      {5, 8, 4096, Spread::Uniform},
    {200, 6, 4096, Spread::FewSkipped}, {500, 2, 1000, Spread::Skewed},
    {4096, 1, 8, Spread::Uniform},
};
// More pairs than one block sorts.
const Case kLargeCases[] = {
    {4097, 1, 16, Spread::FewSkipped}, {1500, 8, 128, Spread::Skewed},
    {1100, 8, 4096, Spread::Uniform},  {2100, 3, 60, Spread::OneExpert},
    {5000, 1, 1, Spread::FewSkipped},  {4500, 1, 256, Spread::NoneAtAll},
};

std::vector<Case> all_cases() {
  std::vector<Case> cases(std::begin(kCases), std::end(kCases));
  cases.insert(cases.end(), std::begin(kLargeCases), std::end(kLargeCases));
  return cases;
}

TEST(BucketPlanOnDevice, EqualsTheHosts) {
  for (const Case& c : all_cases()) {
    const Ints ids = ids_of(c.tokens * c.top_k, c.experts, c.spread, 3);
    const Plan host = plan_on_host(ids, c.top_k, c.experts);
    for (const std::uint64_t seed : emulation::seeds()) {
      const Plan device = plan_on_device(ids, c.top_k, c.experts, seed);
      EXPECT_EQ(device.expert_offsets, host.expert_offsets) << "E " << c.experts;
      EXPECT_EQ(device.row_token, host.row_token) << "P " << ids.size() << " E " << c.experts;
      EXPECT_EQ(device.row_pair, host.row_pair) << "P " << ids.size() << " E " << c.experts;
      EXPECT_EQ(device.pair_row, host.pair_row) << "P " << ids.size() << " E " << c.experts;
    }
  }
}

TEST(BucketPlanOnDevice, StrangeIdsCountAsSkipped) {
  Ints ids = {3, -2, 0, 4, 1000000, -2147483647 - 1, 2147483647, 1};
  const Plan device = plan_on_device(ids, 2, 4, 0);
  for (std::int32_t& id : ids) id = id < 0 || id >= 4 ? -1 : id;
  EXPECT_EQ(device, plan_on_host(ids, 2, 4));
}

TEST(BucketPlanOnDevice, ScratchIsBounded) {
  EXPECT_EQ(cuda::plan_scratch_bytes(4096, 4096), 0);
  EXPECT_EQ(cuda::plan_scratch_bytes(8192 * 8, 128), 32 * 128 * 4);
  EXPECT_LE(cuda::plan_scratch_bytes(std::int64_t{1} << 30, 4096), 512 * 4096 * 4);
}

struct Aligned {
  Ints sorted_ids, block_experts, num_post_pad;
  AlignedRoutingView view() {
    return {sorted_ids.data(), block_experts.data(), num_post_pad.data()};
  }
  bool operator==(const Aligned&) const = default;
};

TEST(AlignOnDevice, EqualsTheHosts) {
  for (const Case& c : all_cases()) {
    const std::int64_t pairs = c.tokens * c.top_k;
    const Ints ids = ids_of(pairs, c.experts, c.spread, 5);
    Plan plan = plan_on_host(ids, c.top_k, c.experts);
    for (const std::int32_t block_size : {1, 8, 48, 64}) {
      if (c.experts > 1000 && block_size > 8) continue;  // the padding alone would take seconds
      for (const RowSpace space : {RowSpace::TokenPairs, RowSpace::PackedRows}) {
        const std::int64_t capacity = aligned_capacity(pairs, c.experts, block_size);
        const std::int64_t blocks = aligned_block_capacity(pairs, c.experts, block_size);
        Aligned host{poisoned(capacity), poisoned(blocks), poisoned(1)};
        Aligned device = host;
        op::Align args{.plan = plan.view(),
                       .num_pairs = pairs,
                       .num_experts = c.experts,
                       .block_size = block_size,
                       .block_capacity = blocks,
                       .row_space = space,
                       .out = host.view()};
        align_block_size(args);

        args.out = device.view();
        emulation::options().seed = static_cast<std::uint64_t>(block_size) % 5;
        ASSERT_EQ(cuda::launch_align(args, nullptr), cuda::kOk);
        EXPECT_EQ(device, host) << "P " << pairs << " E " << c.experts << " block " << block_size;
      }
    }
  }
}

// --- tiles

std::vector<cuda::Tile> tiles_on_device(const RowMap& map, std::int32_t width, std::int32_t experts,
                                        std::uint64_t seed) {
  const std::int64_t bound = cuda::tiles_bound(map, width);
  std::vector<cuda::Tile> tiles(static_cast<std::size_t>(bound),
                                {kPoison, kPoison, kPoison, kPoison});
  std::int32_t count = kPoison;
  emulation::options().seed = seed;
  EXPECT_EQ(
      cuda::launch_tiles(
          {map, tiles.data(), &count, static_cast<std::int32_t>(bound), width, experts}, nullptr),
      cuda::kOk);
  EXPECT_GE(count, 0);
  EXPECT_LE(count, bound);
  for (std::size_t i = static_cast<std::size_t>(count); i < tiles.size(); ++i) {
    EXPECT_EQ(tiles[i].expert, kPoison) << "a tile behind the last";
  }
  tiles.resize(static_cast<std::size_t>(count));
  return tiles;
}

/// What the list should be, segment by segment, entry by entry.
std::vector<cuda::Tile> tiles_on_host(const RowMap& map, std::int32_t width, std::int32_t experts) {
  std::vector<cuda::Tile> tiles;
  for (std::int32_t s = 0; s < map.num_segments; ++s) {
    const std::int32_t expert = map.expert != nullptr ? map.expert[s] : s;
    if (expert < 0 || expert >= experts) continue;
    std::int32_t entry = map.offsets != nullptr ? map.offsets[s] : s * map.width;
    const std::int32_t end = map.offsets != nullptr ? map.offsets[s + 1] : entry + map.width;
    for (std::int32_t in_tile = 0; entry < end; ++entry) {
      const std::int32_t to = map.destination != nullptr ? map.destination[entry] : entry;
      if (to < 0 || to >= map.limit) break;
      if (in_tile == 0) tiles.push_back({expert, entry, 0, s});
      ++tiles.back().count;
      in_tile = in_tile + 1 == width ? 0 : in_tile + 1;
    }
  }
  return tiles;
}

bool same(const cuda::Tile& a, const cuda::Tile& b) {
  return a.expert == b.expert && a.first == b.first && a.count == b.count && a.segment == b.segment;
}

void expect_tiles(const RowMap& map, std::int32_t experts, const char* what) {
  for (const std::int32_t width : {1, 16, 64}) {
    const auto expected = tiles_on_host(map, width, experts);
    for (const std::uint64_t seed : emulation::seeds()) {
      const auto tiles = tiles_on_device(map, width, experts, seed);
      ASSERT_EQ(tiles.size(), expected.size()) << what << ", width " << width;
      for (std::size_t i = 0; i < tiles.size(); ++i) {
        ASSERT_TRUE(same(tiles[i], expected[i])) << what << ", tile " << i << ", width " << width;
      }
    }
  }
}

TEST(TilesOnDevice, Buckets) {
  for (const Case& c : kCases) {
    const Ints ids = ids_of(c.tokens * c.top_k, c.experts, c.spread, 7);
    const Plan plan = plan_on_host(ids, c.top_k, c.experts);
    RowMap map{};
    map.offsets = plan.expert_offsets.data();
    map.source = plan.row_token.data();
    map.num_segments = c.experts;
    map.source_divisor = 1;
    map.limit = static_cast<std::int32_t>(ids.size());
    expect_tiles(map, c.experts, "buckets");
  }
}

TEST(TilesOnDevice, AlignedBlocksWithPadding) {
  for (const Case& c : kCases) {
    const std::int64_t pairs = c.tokens * c.top_k;
    Routing routing(c.tokens, c.top_k);
    std::ranges::copy(ids_of(pairs, c.experts, c.spread, 9), routing.topk_ids().begin());
    for (const std::int32_t block_size : {8, 64}) {
      const auto aligned =
          AlignedRouting::build(routing, c.experts, block_size, RowSpace::TokenPairs);
      const std::int64_t capacity = aligned_capacity(pairs, c.experts, block_size);
      Ints sorted(aligned.sorted_ids().begin(), aligned.sorted_ids().end());
      sorted.resize(static_cast<std::size_t>(capacity), static_cast<std::int32_t>(pairs));
      RowMap map{};
      map.expert = aligned.block_experts().data();
      map.destination = sorted.data();
      map.source = sorted.data();
      map.num_segments = static_cast<std::int32_t>(aligned.block_experts().size());
      map.width = block_size;
      map.source_divisor = c.top_k;
      map.limit = static_cast<std::int32_t>(pairs);
      expect_tiles(map, c.experts, "blocks");
    }
  }
}

TEST(TilesOnDevice, PairsAndOneSharedExpert) {
  const Ints ids = ids_of(3000, 16, Spread::FewSkipped, 13);
  RowMap pairs{};
  pairs.expert = ids.data();
  pairs.num_segments = 3000;
  pairs.width = 1;
  pairs.source_divisor = 2;
  pairs.limit = 3000;
  expect_tiles(pairs, 16, "pairs");

  RowMap shared{};
  shared.num_segments = 1;
  shared.width = 77;
  shared.source_divisor = 1;
  shared.limit = 77;
  expect_tiles(shared, 1, "shared");
  shared.limit = 50;  // the rest is padding
  expect_tiles(shared, 1, "shared with padding");
}

}  // namespace
}  // namespace moesaic

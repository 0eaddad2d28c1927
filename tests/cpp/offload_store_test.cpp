// Layers on a store against the same layers with everything resident: bit for bit, whoever is
// resident and whatever a miss does.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <thread>

#include "count_allocations.hpp"
#include "moesaic/offload.hpp"
#include "offload_file.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

using Pools = std::vector<std::shared_ptr<ExpertPool>>;

constexpr OffloadSpec kSpecs[] = {
    {"q4_k", QuantType::Q4_K, QuantType::Q6_K},
    {"fused", QuantType::Q4_K, QuantType::Q6_K, Storage::Fused},
    {"per_expert", QuantType::Q8_0, QuantType::Q5_0, Storage::PerExpert},
    {"odd_rows", QuantType::Q4_0, QuantType::Q8_0, Storage::Split, 5, 2, 2, 96, 160},
    {"f32", QuantType::F32, QuantType::F16, Storage::Split, 4, 4, 2, 48, 40},
    {"nvfp4", QuantType::NVFP4, QuantType::NVFP4, Storage::Split, 6, 2, 2, 128, 64},
};

std::shared_ptr<ExpertPool> make_pool(std::int32_t experts, std::int32_t budget,
                                      Ranking ranking = Ranking::Recency) {
  ExpertPoolConfig config;
  config.num_experts = experts;
  config.budget = budget;
  config.ranking = ranking;
  return std::make_shared<ExpertPool>(config);
}

Pools make_pools(const MoeExpertStore& store, std::int32_t budget) {
  Pools pools;
  for (std::int32_t i = 0; i < store.num_layers(); ++i) {
    pools.push_back(make_pool(store.layer(i).stack->num_experts(), budget));
  }
  return pools;
}

/// The layer's output for `x`, with a routing or by its own router.
Floats run(Context& context, const MoeLayer& layer, const Floats& x, Routing* routing = nullptr) {
  LayerCase c{.layer = layer, .x = rows_of(x, layer.config().hidden_size)};
  if (routing != nullptr) c.routing = routing->view();
  return run_case(context, c).values();
}

LoadOptions on_cpu() {
  LoadOptions options;
  options.backend = &backend_for(Device{});
  return options;
}

/// A limit that holds everything, and some experts in staging.
StoreOptions disk(const MoeExpertStore& mapped, std::int32_t staging) {
  StoreOptions options;
  options.memory_limit = std::int64_t{1} << 30;
  options.staging = staging;
  options.io_threads = 3;
  options.read_ahead = mapped.num_layers();
  return options;
}

struct Knobs {
  GemmMode gemm;
  RowSpaceMode rows;
  Precision precision;
};
constexpr Knobs kKnobs[] = {
    {GemmMode::Auto, RowSpaceMode::Auto, Precision::Auto},
    {GemmMode::Bucketed, RowSpaceMode::PackedRows, Precision::Fast},
    {GemmMode::Aligned, RowSpaceMode::TokenPairs, Precision::Exact},
};

class Layers : public ::testing::TestWithParam<OffloadSpec> {};

TEST_P(Layers, AreBitwiseThoseOfAFullStack) {
  const OffloadSpec& spec = GetParam();
  const OffloadFile file(spec);
  const auto gguf = file.open();
  const MoeLayer whole = MoeLayer::from_gguf(gguf, 1, on_cpu());
  const auto mapped = MoeExpertStore::from_gguf(gguf);
  const std::int64_t most = 40;
  const Floats x = random_values(most * spec.hidden, 5);
  for (const Knobs& knobs : kKnobs) {
    Tuning tuning;
    tuning.gemm = knobs.gemm;
    tuning.row_space = knobs.rows;
    tuning.precision = knobs.precision;
    Context context(Device{}, tuning);
    for (const bool from_disk : {false, true}) {
      const auto store = from_disk ? MoeExpertStore::from_gguf(gguf, disk(*mapped, 3)) : mapped;
      for (const std::int32_t budget : {0, 1, spec.experts / 2, spec.experts}) {
        for (const OnMiss on_miss : {OnMiss::Compute, OnMiss::Stage}) {
          const Pools pools = make_pools(*store, budget);
          const MoeLayer layer = store->make_layer(1, pools[1], on_miss, on_cpu());
          for (const std::int64_t tokens : {std::int64_t{1}, std::int64_t{3}, most}) {
            const Floats rows(x.begin(), x.begin() + tokens * spec.hidden);
            EXPECT_EQ(run(context, layer, rows), run(context, whole, rows))
                << spec.name << ", budget " << budget << ", " << tokens << " tokens, "
                << (from_disk ? "disk" : "mapped") << ", on_miss " << static_cast<int>(on_miss);
            store->apply(context, pools);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Layers, ::testing::ValuesIn(kSpecs),
                         [](const auto& info) { return std::string(info.param.name); });

class Store : public ::testing::Test {
 protected:
  OffloadSpec spec{"q4_k", QuantType::Q4_K, QuantType::Q6_K};
  OffloadFile file{spec};
  std::shared_ptr<GgufFile> gguf = file.open();
  std::shared_ptr<MoeExpertStore> store = MoeExpertStore::from_gguf(gguf);
  Context context;
};

TEST_F(Store, ShowsItsRoles) {
  ASSERT_EQ(store->num_layers(), 2);
  const LayerMoeWeights& layer = store->layer(1);
  EXPECT_EQ(layer.layer_index, 1);
  EXPECT_EQ(layer.gate.k(), 256);
  EXPECT_EQ(layer.down.n(), 256);
  EXPECT_EQ(layer.gate.expert_stride(), 256 * 144);
  EXPECT_EQ(layer.expert_bytes, 256 * (144 + 144 + 210));
  EXPECT_EQ(layer.up.expert_slice(2).data(), layer.up.as_slice().data() + 2 * 256 * 144);
  EXPECT_EQ(layer.up.as_slice().size(), 8U * 256 * 144);
  EXPECT_THROW(layer.up.expert_slice(8), ShapeError);
  EXPECT_THROW(layer.up.expert_slice(-1), ShapeError);
  EXPECT_THROW(store->layer(2), ShapeError);
  const OffloadFile fused(kSpecs[1]);
  EXPECT_THROW(MoeExpertStore::from_gguf(fused.open())->layer(0).up.as_slice(), UnsupportedError);
}

TEST_F(Store, ApplyMovesOnlyWhatChanged) {
  const Pools pools = make_pools(*store, 3);
  const std::int64_t expert = store->layer(0).expert_bytes;
  EXPECT_EQ(store->apply(context, pools), 2 * 3 * expert);
  EXPECT_EQ(store->slot_map(0), pools[0]->slot_map());
  EXPECT_EQ(store->apply(context, pools), 0);

  const std::vector<std::int32_t> ids = {6, 7, 6, 0}, none = {0, 1, 2};
  const std::span<const std::int32_t> captured[] = {ids, none};
  const std::vector<RefreshResult> results = store->refresh_pools(pools, captured, 0, false);
  EXPECT_TRUE(results[0].refreshed);
  EXPECT_EQ(results[0].bytes, 2 * expert);
  EXPECT_EQ(results[1].bytes, 0);
  EXPECT_EQ(store->apply(context, pools), 2 * expert);
  EXPECT_EQ(store->slot_map(0), pools[0]->slot_map());
  EXPECT_EQ(pools[0]->stats().bytes, 5 * expert);
  EXPECT_EQ(store->memory().staging, 0);
  EXPECT_GT(store->memory().slots, 0);
}

TEST_F(Store, EachPoolDecidesForItself) {
  Pools pools = make_pools(*store, 3);
  ExpertPoolConfig manual = pools[1]->config();
  manual.refresh = RefreshPolicy::manual();
  pools[1] = std::make_shared<ExpertPool>(manual);
  const std::vector<std::int32_t> ids = {5, 6, 7};
  const std::span<const std::int32_t> captured[] = {ids, ids};
  auto results = store->refresh_pools(pools, captured, 1, false);
  EXPECT_TRUE(results[0].refreshed);
  EXPECT_FALSE(results[1].refreshed);
  EXPECT_TRUE(store->refresh_pools(pools, captured, 1, true)[1].refreshed);
}

TEST_F(Store, RejectsListsThatDoNotFit) {
  const Pools pools = make_pools(*store, 3);
  const std::vector<std::int32_t> ids = {5}, bad = {8};
  const std::span<const std::int32_t> one[] = {ids};
  const std::span<const std::int32_t> wrong[] = {ids, bad};
  EXPECT_THROW(store->refresh_pools(pools, one, 0, false), ShapeError);
  EXPECT_THROW(store->refresh_pools(pools, wrong, 0, false), ShapeError);
  EXPECT_EQ(pools[0]->stats().refreshes, 0);  // nothing was done to the first
  const Pools few = {pools[0]};
  EXPECT_THROW(store->refresh_pools(few, one, 0, false), ShapeError);
  EXPECT_THROW(store->apply(context, few), ShapeError);
  const Pools small = {pools[0], make_pool(7, 3)};
  EXPECT_THROW(store->apply(context, small), ShapeError);
  const MoeLayer layer = store->make_layer(0, pools[0], OnMiss::Compute, on_cpu());
  const Pools others = make_pools(*store, 2);
  EXPECT_THROW(store->apply(context, others), ConfigError);
}

TEST_F(Store, CountsAForwardOnce) {
  const auto pool = make_pool(8, 4);
  const MoeLayer layer = store->make_layer(0, pool, OnMiss::Compute, on_cpu());
  store->apply(context, Pools{pool, make_pool(8, 4)});
  Routing routing(2, 3);
  std::ranges::copy(std::vector<std::int32_t>{0, 1, 6, 1, 6, -1}, routing.topk_ids().begin());
  std::ranges::fill(routing.topk_weights(), 0.5F);
  run(context, layer, random_values(2 * 256, 1), &routing);
  const PoolStats stats = pool->stats();
  EXPECT_EQ(stats.forwards, 1);
  EXPECT_EQ(stats.hit_experts, 2);
  EXPECT_EQ(stats.miss_experts, 1);
  EXPECT_EQ(stats.hit_pairs, 3);
  EXPECT_EQ(stats.miss_pairs, 2);
  EXPECT_DOUBLE_EQ(stats.hit_rate(), 0.6);
  EXPECT_EQ(pool->usage().counts()[6], 2);
}

TEST_F(Store, AMissCanBeAnError) {
  const auto pool = make_pool(8, 4);
  const MoeLayer layer = store->make_layer(0, pool, OnMiss::Error, on_cpu());
  const Floats x = random_values(256, 1);
  Tensor out(DType::F32, 1, 256);
  Routing routing(1, 2);
  routing.topk_ids()[0] = 1;
  routing.topk_ids()[1] = 5;
  const LayerCase c{.layer = layer, .x = rows_of(x, 256), .routing = routing.view()};
  const ForwardIo io = c.io(out.view());
  Workspace workspace(workspace_bytes(context, layer, 2, 1));
  const auto poisoned = out.bytes;
  EXPECT_THROW(moe_forward(context, layer, io, workspace), DeviceError);
  store->apply(context, Pools{pool, make_pool(8, 4)});
  EXPECT_THROW(moe_forward(context, layer, io, workspace), DeviceError);
  EXPECT_EQ(out.bytes, poisoned);
  routing.topk_ids()[1] = 3;
  moe_forward(context, layer, io, workspace);
  EXPECT_NE(out.bytes, poisoned);
}

TEST_F(Store, SkippedPairsNeedNoExpert) {
  const MoeLayer layer = store->make_layer(0, make_pool(8, 0), OnMiss::Error, on_cpu());
  Routing routing(2, 3);
  std::ranges::fill(routing.topk_ids(), -1);
  EXPECT_EQ(run(context, layer, random_values(512, 1), &routing), Floats(512, 0.0F));
}

TEST_F(Store, AResidentForwardDoesNotAllocate) {
  const auto pool = make_pool(8, 8);
  const MoeLayer layer = store->make_layer(0, pool, OnMiss::Stage, on_cpu());
  const Floats x = random_values(4 * 256, 1);
  Tensor out(DType::F32, 4, 256);
  const LayerCase c{.layer = layer, .x = rows_of(x, 256)};
  const ForwardIo io = c.io(out.view());
  Workspace workspace(workspace_bytes(context, layer, 3, 4));
  moe_forward(context, layer, io, workspace);
  EXPECT_EQ(test::count_allocations([&] { moe_forward(context, layer, io, workspace); }), 0);
}

TEST_F(Store, KeepsItsLimit) {
  const std::int64_t expert = store->layer(0).expert_bytes;
  StoreOptions options;
  options.memory_limit = 12 * expert;
  options.staging = 4;
  const auto limited = MoeExpertStore::from_gguf(gguf, options);
  EXPECT_LE(limited->memory().staging, 5 * expert);
  EXPECT_THROW(limited->apply(context, make_pools(*limited, 5)), ConfigError);
  EXPECT_THROW(limited->apply(context, make_pools(*limited, 8)), ConfigError);
  limited->apply(context, make_pools(*limited, 3));
  const StoreMemory memory = limited->memory();
  EXPECT_LE(memory.slots + memory.staging, memory.limit);
  options.memory_limit = expert;
  EXPECT_THROW(MoeExpertStore::from_gguf(gguf, options), ConfigError);
  options = {};
  options.io_threads = 0;
  EXPECT_THROW(MoeExpertStore::from_gguf(gguf, options), ConfigError);
  options = {};
  options.memory_limit = 100 * expert;
  EXPECT_THROW(MoeExpertStore::from_gguf(file.open(false), options), UnsupportedError);
  EXPECT_EQ(MoeExpertStore::from_gguf(file.open(false))->num_layers(), 2);
}

TEST_F(Store, BudgetsFitBelowTheLimitAndFillIt) {
  const std::int64_t expert = store->layer(0).expert_bytes;
  const Backend& backend = backend_for(Device{});
  EXPECT_EQ(store->fitting_budgets(backend, 0), (std::vector<std::int32_t>{8, 8}));
  for (const std::int64_t reserve : {std::int64_t{0}, expert}) {
    for (std::int64_t experts = 6; experts < 26; ++experts) {
      StoreOptions options;
      options.memory_limit = experts * expert + 4096 * 16;
      options.staging = 3;
      const auto limited = MoeExpertStore::from_gguf(gguf, options);
      const auto budgets = limited->fitting_budgets(backend, reserve);
      Pools pools;
      for (const std::int32_t budget : budgets) pools.push_back(make_pool(8, budget));
      limited->apply(context, pools);  // does not throw
      const StoreMemory memory = limited->memory();
      const std::int64_t left = memory.limit - memory.slots - memory.staging - reserve;
      EXPECT_GE(left, 0) << experts;
      EXPECT_LE(budgets[1], budgets[0]);
      EXPECT_LE(budgets[0], budgets[1] + 1);
      // Another expert, as panels a little larger than it is stored, would not have fit.
      if (budgets[1] < 8) {
        EXPECT_LT(left, expert * 11 / 10) << experts;
      }
    }
  }
  StoreOptions options;
  options.memory_limit = 8 * expert;
  options.staging = 2;
  const auto limited = MoeExpertStore::from_gguf(gguf, options);
  EXPECT_THROW(limited->fitting_budgets(backend, 8 * expert), ConfigError);
  EXPECT_THROW(limited->fitting_budgets(backend, -1), ConfigError);
}

// A store without a limit has no buffers; what slots of panels take is all that is counted.
TEST_F(Store, BudgetsFitIntoMemoryThatIsNamed) {
  const Backend& backend = backend_for(Device{});
  for (const std::int32_t budget : {0, 1, 3, 8}) {
    const std::vector<std::int32_t> each(2, budget);
    const std::int64_t bytes = store->slot_bytes(backend, each);
    EXPECT_EQ(store->fitting_budgets(backend, 5, bytes + 5), each);
    if (budget > 0) {
      EXPECT_LT(store->fitting_budgets(backend, 0, bytes - 1)[1], budget);
    }
  }
  EXPECT_THROW(store->fitting_budgets(backend, 0, -1), ConfigError);
  EXPECT_THROW(store->fitting_budgets(backend, 2, 1), ConfigError);
  EXPECT_THROW(store->slot_bytes(backend, std::vector<std::int32_t>{1}), ShapeError);
}

TEST_F(Store, SaysHowItReads) {
  EXPECT_EQ(store->reading(), "mapped");
  StoreOptions options;
  options.memory_limit = 1 << 28;
  options.direct_io = false;
  EXPECT_EQ(MoeExpertStore::from_gguf(gguf, options)->reading(), "page cache (asked for)");
  options.direct_io.reset();
  const std::string reading = MoeExpertStore::from_gguf(gguf, options)->reading();
  EXPECT_TRUE(reading == "O_DIRECT" || reading.starts_with("page cache (")) << reading;
  options.direct_io = true;
  if (reading == "O_DIRECT") {
    EXPECT_EQ(MoeExpertStore::from_gguf(gguf, options)->reading(), reading);
  } else {
    EXPECT_THROW(MoeExpertStore::from_gguf(gguf, options), UnsupportedError);
  }
}

TEST_F(Store, ReadsPastThePageCacheAndThroughItAreTheSame) {
  const Floats x = random_values(3 * 256, 3);
  const Floats want = run(context, MoeLayer::from_gguf(gguf, 1, on_cpu()), x);
  for (const bool direct : {false, true}) {
    StoreOptions options;
    options.memory_limit = 1 << 28;
    if (!direct) options.direct_io = false;
    const auto disk_store = MoeExpertStore::from_gguf(gguf, options);
    const MoeLayer layer = disk_store->make_layer(1, make_pool(8, 2), OnMiss::Stage, on_cpu());
    EXPECT_EQ(run(context, layer, x), want);
  }
}

TEST_F(Store, PrefetchReadsWhatHasNoSlot) {
  const auto disk_store = MoeExpertStore::from_gguf(gguf, disk(*store, 8));
  const Pools pools = make_pools(*disk_store, 3);
  disk_store->apply(context, pools);
  const std::int64_t before = disk_store->io_stats().ahead;
  const std::vector<std::int32_t> ids = {1, 5, 5, -1, 6};  // 1 has a slot
  disk_store->prefetch(1, ids);
  EXPECT_EQ(disk_store->io_stats().ahead, before + 2);
  store->prefetch(1, ids);  // of a mapped file, the system reads
  EXPECT_THROW(disk_store->prefetch(1, std::vector<std::int32_t>{8}), ShapeError);
  EXPECT_THROW(disk_store->prefetch(2, ids), ShapeError);
}

// Of what a pool wants, a forward loads what it needs: the rest would be read in vain.
TEST_F(Store, AForwardLoadsNothingThatItDoesNotNeed) {
  const auto pool = make_pool(8, 4);
  const MoeLayer layer = store->make_layer(0, pool, OnMiss::Stage, on_cpu());
  Routing routing(1, 2);
  std::ranges::copy(std::vector<std::int32_t>{2, 6}, routing.topk_ids().begin());
  std::ranges::fill(routing.topk_weights(), 0.5F);
  const Floats x = random_values(256, 1);
  run(context, layer, x, &routing);
  const std::vector<std::int32_t> map = store->slot_map(0);
  for (const std::int32_t e : {0, 1, 3, 4, 5, 7}) EXPECT_EQ(map[static_cast<std::size_t>(e)], -1);
  EXPECT_EQ(map[2], pool->slot_map()[2]);
  EXPECT_EQ(map[6], pool->slot_map()[6]);
  EXPECT_GE(map[6], 0);
  EXPECT_EQ(pool->stats().staged, 2);
  EXPECT_EQ(pool->stats().streamed, 0);
  EXPECT_EQ(pool->stats().bytes, 2 * store->layer(0).expert_bytes);
  run(context, layer, x, &routing);
  EXPECT_EQ(pool->stats().hit_experts, 2);
}

TEST_F(Store, AFileThatShrinksIsAnErrorAndNoMore) {
  StoreOptions options;
  options.memory_limit = 1 << 28;
  options.read_ahead = 0;
  const auto disk_store = MoeExpertStore::from_gguf(gguf, options);
  const MoeLayer layer = disk_store->make_layer(1, make_pool(8, 2), OnMiss::Stage, on_cpu());
  const Floats x = random_values(256, 3);
  const Floats want = run(context, MoeLayer::from_gguf(gguf, 1, on_cpu()), x);
  const auto copy = file.path().string() + ".copy";
  std::filesystem::copy_file(file.path(), copy);
  std::filesystem::resize_file(file.path(), 4096);
  EXPECT_THROW(run(context, layer, x), FormatError);
  // The bytes go back into that inode, which the store still has open.
  std::ifstream in(copy, std::ios::binary);
  std::ofstream(file.path(), std::ios::binary) << in.rdbuf();
  EXPECT_EQ(run(context, layer, x), want);
}

/// Forwards that compute and stage in three threads, while a fourth moves experts.
int wrong_while_moving(const std::shared_ptr<GgufFile>& gguf, MoeExpertStore& store) {
  Context context;
  const Pools pools = make_pools(store, 3);
  const MoeLayer whole = MoeLayer::from_gguf(gguf, 0, on_cpu());
  const MoeLayer compute = store.make_layer(0, pools[0], OnMiss::Compute, on_cpu());
  const MoeLayer stage = store.make_layer(0, pools[0], OnMiss::Stage, on_cpu());
  std::vector<Floats> inputs, answers;
  for (std::uint32_t i = 0; i < 6; ++i) {
    inputs.push_back(random_values(2 * 256, i));
    answers.push_back(run(context, whole, inputs.back()));
  }
  std::atomic<int> wrong{0};
  std::atomic<bool> done{false};
  std::thread mover([&] {
    Context own;
    for (std::int32_t e = 0; !done; e = (e + 1) % 8) {
      pools[0]->refresh_from_indices(std::vector<std::int32_t>{e, (e + 3) % 8});
      store.apply(own, pools);
    }
  });
  std::vector<std::thread> threads;
  for (const MoeLayer* layer : {&compute, &stage, &stage}) {
    threads.emplace_back([&, layer] {
      Context own;
      for (std::size_t i = 0; i < 40; ++i) {
        const std::size_t at = i % inputs.size();
        if (run(own, *layer, inputs[at]) != answers[at]) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  mover.join();
  return wrong;
}

TEST_F(Store, ForwardsRunWhileExpertsMove) {
  EXPECT_EQ(wrong_while_moving(gguf, *store), 0);
  const auto limited = MoeExpertStore::from_gguf(gguf, disk(*store, 3));
  EXPECT_EQ(wrong_while_moving(gguf, *limited), 0);
}

TEST(StoreOfArrays, TransposesOnce) {
  const std::int64_t experts = 3, hidden = 8, intermediate = 12;
  const Floats gate = random_values(experts * hidden * intermediate, 1);
  const Floats up = random_values(experts * hidden * intermediate, 2);
  const Floats down = random_values(experts * hidden * intermediate, 3);
  const auto view = [&](const Floats& values, std::int64_t k, std::int64_t n) {
    return ConstTensorView(values.data(), DType::F32, {experts, k, n});
  };
  MoeExpertStore::ArrayLayer layer{7, view(gate, hidden, intermediate),
                                   view(up, hidden, intermediate),
                                   view(down, intermediate, hidden)};
  const auto store = MoeExpertStore::from_arrays({&layer, 1});
  const LayerMoeWeights& weights = store->layer(0);
  EXPECT_EQ(weights.layer_index, 7);
  EXPECT_EQ(weights.gate.k(), hidden);
  EXPECT_EQ(weights.gate.n(), intermediate);
  EXPECT_EQ(weights.gate.expert_stride(), hidden * intermediate);
  const auto* slice = reinterpret_cast<const float*>(weights.up.expert_slice(2).data());
  for (std::int64_t k = 0; k < hidden; ++k) {
    for (std::int64_t n = 0; n < intermediate; ++n) {
      EXPECT_EQ(slice[n * hidden + k],
                up[static_cast<std::size_t>((2 * hidden + k) * intermediate + n)]);
    }
  }
  EXPECT_THROW(store->make_layer(0, make_pool(3, 1), OnMiss::Compute, on_cpu()), UnsupportedError);

  const auto refused = [&](MoeExpertStore::ArrayLayer bad) {
    EXPECT_THROW(MoeExpertStore::from_arrays({&bad, 1}), ShapeError);
  };
  MoeExpertStore::ArrayLayer bad = layer;
  bad.down = view(down, hidden, intermediate);
  refused(bad);
  bad = layer;
  bad.gate = view(gate, intermediate, hidden);
  refused(bad);
  bad = layer;
  bad.up = {};
  refused(bad);
  EXPECT_THROW(MoeExpertStore::from_arrays({}), ShapeError);
}

}  // namespace
}  // namespace moesaic::testing

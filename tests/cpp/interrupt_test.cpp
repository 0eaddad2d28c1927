// An interrupt ends every long operation between two units of work, and what it ended works when it
// is called again.

#include "moesaic/interrupt.hpp"

#include <gtest/gtest.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "cpu/ops/ranges.hpp"
#include "gptq_checkpoint.hpp"
#include "moesaic/offload.hpp"
#include "moesaic/quant_matrix.hpp"
#include "offload/source.hpp"
#include "offload_file.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

constexpr std::int32_t kExperts = 6, kTopK = 2;
constexpr std::int64_t kHidden = 96, kWidth = 64, kTokens = 40;

struct World {
  OffloadFile file{{"q4_0", QuantType::Q4_0, QuantType::Q8_0, Storage::Split, kExperts, kTopK, 1,
                    kHidden, kWidth}};
  std::shared_ptr<GgufFile> open = file.open();
  std::shared_ptr<ThreadPool> pool;
  Context context;
  LoadOptions options;
  Floats x = random_values(kTokens * kHidden, 3), out = x;
  Floats logits = random_values(kTokens * kExperts, 4);
  Floats pairs = random_values(kTokens * kTopK * kHidden, 5);
  Floats wide = random_values(kTokens * kTopK * 2 * kWidth, 6);
  Floats half = Floats(static_cast<std::size_t>(kTokens * kTopK * kWidth));
  Floats gate = random_values(kExperts * kWidth * kHidden, 7);
  QuantMatrix matrix =
      QuantMatrix::from_dense({gate.data(), DType::F32, {kWidth, kHidden}}, QuantType::Q8_0);
  Checkpoint checkpoint = make_checkpoint({.experts = 2});
  Routing routing;
  BucketPlan plan = BucketPlan::build(Routing(0, 1), kExperts);
  std::unique_ptr<MoeLayer> layer;
  std::shared_ptr<MoeExpertStore> store = MoeExpertStore::from_gguf(open);

  explicit World(int threads)
      : pool(std::make_shared<ThreadPool>(threads)), context(backend_for(Device{}), {}, pool) {
    options.backend = &backend_for(Device{});
    options.pool = pool.get();
    layer = std::make_unique<MoeLayer>(MoeLayer::from_gguf(open, 0, options));
    route(rows_of(logits, kExperts), layer->config().router, routing);
    plan = BucketPlan::build(routing, kExperts);
  }
  ForwardIo io() {
    LayerCase c{.layer = *layer, .x = rows_of(x, kHidden)};
    return c.io(rows_of(out, kHidden));
  }
  ConstTensorView stacked(std::int64_t rows, std::int64_t cols) const {
    return {gate.data(), DType::F32, {kExperts, rows, cols}};
  }
};

const std::pair<const char*, std::function<void(World&)>> kOperations[] = {
    {"moe_forward",
     [](World& w) {
       Workspace workspace(workspace_bytes(w.context, *w.layer, kTopK, kTokens));
       moe_forward(w.context, *w.layer, w.io(), workspace);
     }},
    {"moe_forward_cpu", [](World& w) { moe_forward_cpu(*w.layer, w.io()); }},
    {"expert_gemm",
     [](World& w) {
       expert_gemm(w.context, w.layer->stack(), Role::Up, rows_of(std::as_const(w.x), kHidden),
                   w.plan, rows_of(w.half, kWidth));
     }},
    {"expert_gemv",
     [](World& w) {
       expert_gemv(w.context, w.layer->stack(), Role::Up, rows_of(std::as_const(w.x), kHidden),
                   {w.routing.topk_ids().data(), DType::I32, {kTokens, kTopK}},
                   {w.half.data(), DType::F32, {kTokens, kTopK, kWidth}});
     }},
    {"gather_rows",
     [](World& w) {
       gather_rows(w.context, rows_of(std::as_const(w.x), kHidden), w.plan,
                   rows_of(w.pairs, kHidden));
     }},
    {"silu_mul",
     [](World& w) {
       silu_mul(w.context, rows_of(std::as_const(w.wide), 2 * kWidth), rows_of(w.half, kWidth));
     }},
    {"combine",
     [](World& w) {
       combine(w.context, rows_of(std::as_const(w.pairs), kHidden), w.plan, w.routing,
               rows_of(w.out, kHidden));
     }},
    {"weighted_sum",
     [](World& w) {
       weighted_sum(w.context, rows_of(std::as_const(w.pairs), kHidden), w.routing,
                    rows_of(w.out, kHidden));
     }},
    {"route",
     [](World& w) { route(rows_of(w.logits, kExperts), w.layer->config().router, w.routing); }},
    {"BucketPlan.build", [](World& w) { BucketPlan::build(w.routing, kExperts); }},
    {"BucketPlan.rebuild", [](World& w) { w.plan.rebuild(w.routing); }},
    {"align_block_size",
     [](World& w) { AlignedRouting::build(w.routing, kExperts, 16, RowSpace::TokenPairs); }},
    {"from_gguf", [](World& w) { MoeLayer::from_gguf(w.open, 0, w.options); }},
    {"from_gguf, decoded",
     [](World& w) {
       LoadOptions options = w.options;
       options.dequantize = QuantType::F16;
       ExpertStack::load_from_gguf(w.open, 0, options);
     }},
    {"from_dense_stacks",
     [](World& w) {
       ExpertStack::from_dense_stacks(w.stacked(kWidth, kHidden), w.stacked(kWidth, kHidden),
                                      w.stacked(kHidden, kWidth), w.options);
     }},
    {"multiply",
     [](World& w) {
       Workspace workspace(workspace_bytes(w.context, w.matrix, kTokens));
       Floats y(static_cast<std::size_t>(kTokens * kWidth));
       multiply(w.context, w.matrix, rows_of(std::as_const(w.x), kHidden), rows_of(y, kWidth),
                workspace);
     }},
    {"QuantMatrix.from_dense",
     [](World& w) {
       QuantMatrix::from_dense({w.gate.data(), DType::F32, {kWidth, kHidden}}, QuantType::Q8_0, {},
                               w.options);
     }},
    {"QuantMatrix.from_gguf",
     [](World& w) { QuantMatrix::from_gguf(w.open, "blk.0.ffn_gate_inp.weight", {}, w.options); }},
    {"from_gptq",
     [](World& w) { MarlinExpertStack::from_gptq(w.checkpoint.tensors(), w.pool.get()); }},
    {"store of arrays",
     [](World& w) {
       const MoeExpertStore::ArrayLayer one{0, w.stacked(kHidden, kWidth),
                                            w.stacked(kHidden, kWidth), w.stacked(kWidth, kHidden)};
       MoeExpertStore::from_arrays({&one, 1});
     }},
    {"store.apply",
     [](World& w) {
       const auto pool =
           std::make_shared<ExpertPool>(ExpertPoolConfig{.num_experts = kExperts, .budget = 3});
       w.store->apply(w.context, 0, pool);
     }},
};

class Interrupts : public ::testing::TestWithParam<int> {};

TEST_P(Interrupts, EndEveryLongOperation) {
  World world(GetParam());
  for (const auto& [name, run] : kOperations) {
    SCOPED_TRACE(name);
    {
      const Interrupt interrupt([] { return true; });
      std::this_thread::sleep_for(Interrupt::kInterval);  // then the next look asks
      EXPECT_THROW(run(world), OperationCancelled);
    }
    EXPECT_NO_THROW(run(world));
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, Interrupts, ::testing::Values(1, 3));

TEST(Interruption, AnInterruptedPlanIsOneOfNoTokens) {
  World world(1);
  const Interrupt interrupt([] { return true; });
  std::this_thread::sleep_for(Interrupt::kInterval);
  EXPECT_THROW(world.plan.rebuild(world.routing), OperationCancelled);
  EXPECT_EQ(world.plan.num_tokens(), 0);
  EXPECT_EQ(world.plan.num_rows(), 0);
}

// However few threads there are, no chunk of the small operations takes much longer than 10 ms.
TEST(Interruption, ComeBetweenChunksOfBoundedWork) {
  for (const int threads : {1, 2, 64}) {
    EXPECT_GE(cpu::chunk_count(std::int64_t{1} << 24, 1 << 12, threads), 1 << 10);
    EXPECT_EQ(cpu::chunk_count(7, std::int64_t{1} << 40, threads), 7);
    EXPECT_EQ(cpu::chunk_count(1, 1, threads), 1);
  }
}

// A read that does not end holds up nobody who was interrupted.
TEST(Interruption, EndAWaitForTheDisk) {
  std::mutex mutex;
  std::condition_variable changed;
  bool open = false;
  const offload::ReadFn read = [&](std::uint32_t, std::uint64_t, std::span<std::byte>) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return open; });
  };
  const std::vector<std::vector<offload::ExpertRanges>> ranges(
      1, std::vector<offload::ExpertRanges>(
             4, offload::ExpertRanges{{0, 0, 64}, {0, 64, 64}, {0, 128, 64}}));
  const auto source = offload::make_disk_source(ranges, read, {2, 1});
  const std::int32_t first[] = {0, 1}, second[] = {2};
  const auto batch = source->open(0, first);
  {
    const Interrupt interrupt([] { return true; });
    EXPECT_THROW(batch->wait(0), OperationCancelled);
    EXPECT_THROW(source->open(0, second), OperationCancelled);  // for a buffer
  }
  {
    const std::lock_guard lock(mutex);
    open = true;
  }
  changed.notify_all();
  batch->wait(0);
  batch->wait(1);
}

}  // namespace
}  // namespace moesaic::testing

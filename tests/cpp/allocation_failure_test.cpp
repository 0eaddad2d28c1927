// Every operation with each of its allocations failing in turn: the caller sees out of memory,
// nothing is leaked, and the same objects work afterwards. Bodies on a thread pool and destructors
// must not allocate, or the program would end here.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <string_view>
#include <utility>
#include <vector>

#include "gptq_checkpoint.hpp"
#include "moesaic/offload.hpp"
#include "moesaic/quant_matrix.hpp"
#include "offload_file.hpp"
#include "run_case.hpp"

namespace {

/// Allocations until one fails; negative: none does.
std::atomic<long> until_failure{-1};
/// Whether those behind it fail too.
std::atomic<bool> all_behind{false};
std::atomic<long> live{0};
std::atomic<bool> failed{false};

bool fails() {
  long left = until_failure.load();
  do {
    if (left < 0) return false;
    if (left == 0 && all_behind.load()) break;
  } while (!until_failure.compare_exchange_weak(left, left - 1));
  if (left > 0) return false;
  failed = true;
  return true;
}

void* take(std::size_t bytes, std::size_t alignment) noexcept {
  if (fails()) return nullptr;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory != nullptr) ++live;
  return memory;
}

void* take_or_throw(std::size_t bytes, std::size_t alignment) {
  void* const memory = take(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void give(void* memory) noexcept {
  if (memory != nullptr) --live;
  std::free(memory);
}

}  // namespace

// Not inlined, because GCC takes an inlined free() for a mismatch with operator new.
#define MOESAIC_REPLACE [[gnu::noinline]]
MOESAIC_REPLACE void* operator new(std::size_t bytes) {
  return take_or_throw(bytes, alignof(std::max_align_t));
}
MOESAIC_REPLACE void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return take_or_throw(bytes, static_cast<std::size_t>(alignment));
}
MOESAIC_REPLACE void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return take(bytes, alignof(std::max_align_t));
}
MOESAIC_REPLACE void* operator new(std::size_t bytes, std::align_val_t alignment,
                                   const std::nothrow_t&) noexcept {
  return take(bytes, static_cast<std::size_t>(alignment));
}
MOESAIC_REPLACE void operator delete(void* memory) noexcept { give(memory); }
MOESAIC_REPLACE void operator delete(void* memory, std::size_t) noexcept { give(memory); }
MOESAIC_REPLACE void operator delete(void* memory, std::align_val_t) noexcept { give(memory); }
MOESAIC_REPLACE void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  give(memory);
}
#undef MOESAIC_REPLACE

namespace moesaic::testing {
namespace {

constexpr std::int32_t kExperts = 6, kTopK = 2;
constexpr std::int64_t kHidden = 96, kWidth = 64, kTokens = 9;

/// What the operations work on, made while nothing fails.
struct World {
  OffloadFile file{{"q4_0", QuantType::Q4_0, QuantType::Q8_0, Storage::Split, kExperts, kTopK, 2,
                    kHidden, kWidth}};
  std::shared_ptr<GgufFile> open = file.open();
  std::shared_ptr<ThreadPool> pool = std::make_shared<ThreadPool>(2);
  Tuning tuning;
  Context context{backend_for(Device{}), tuning, pool};
  LoadOptions options = [this] {
    LoadOptions o;
    o.backend = &backend_for(Device{});
    o.pool = pool.get();
    return o;
  }();
  MoeLayer layer = MoeLayer::from_gguf(open, 0, options);
  Floats x = random_values(kTokens * kHidden, 3);
  Floats logits = random_values(kTokens * kExperts, 4);
  Floats out = Floats(static_cast<std::size_t>(kTokens * kHidden));
  Floats pairs = random_values(kTokens * kTopK * kHidden, 5);
  Floats wide = random_values(kTokens * kTopK * 2 * kWidth, 6);
  Floats half = Floats(static_cast<std::size_t>(kTokens * kTopK * kWidth));
  Routing routing = routed();
  BucketPlan plan = BucketPlan::build(routing, kExperts);
  Floats gate = random_values(kExperts * kWidth * kHidden, 7);
  Floats down = random_values(kExperts * kHidden * kWidth, 8);
  Checkpoint checkpoint = make_checkpoint({.experts = 2, .order = Order::Random});
  std::shared_ptr<ExpertPool> residents = make_pool();
  std::vector<std::int32_t> ids = {5, 4, 4, 3, 0, -1};

  static StoreOptions limited() {
    StoreOptions o;
    o.memory_limit = std::int64_t{1} << 26;
    o.staging = 4;
    o.io_threads = 2;
    return o;
  }
  static std::shared_ptr<ExpertPool> make_pool() {
    ExpertPoolConfig config;
    config.num_experts = kExperts;
    config.budget = 3;
    return std::make_shared<ExpertPool>(config, true);
  }
  Routing routed() {
    Routing made;
    route(rows_of(logits, kExperts), layer.config().router, made);
    return made;
  }
  ForwardIo io() {
    LayerCase c{.layer = layer, .x = rows_of(x, kHidden)};
    return c.io(rows_of(out, kHidden));
  }
  ConstTensorView stacked(const Floats& values, std::int64_t rows, std::int64_t cols) const {
    return {values.data(), DType::F32, {kExperts, rows, cols}};
  }
};

using Operation = std::function<void(World&)>;
struct Named {
  const char* name;
  Operation run;
};

void forward(World& w, const MoeLayer& layer, const char* mode = "auto") {
  Tuning tuning = w.tuning;
  if (std::string_view(mode) == "bucketed") tuning.gemm = GemmMode::Bucketed;
  if (std::string_view(mode) == "aligned") tuning.gemm = GemmMode::Aligned;
  Context context(backend_for(Device{}), tuning, w.pool);
  Workspace workspace(workspace_bytes(context, layer, kTopK, kTokens));
  moe_forward(context, layer, w.io(), workspace);
}

void on_store(World& w, const StoreOptions& options, OnMiss on_miss) {
  const auto store = MoeExpertStore::from_gguf(w.open, options);
  const auto pool = World::make_pool();
  const MoeLayer layer = store->make_layer(0, pool, on_miss, w.options);
  store->apply(w.context, 0, pool);
  forward(w, layer);
  forward(w, layer);
}

const Named kOperations[] = {
    {"open", [](World& w) { w.file.open(); }},
    {"read", [](World& w) { w.file.open(false)->bytes(w.open->tensors().front()); }},
    {"load", [](World& w) { MoeLayer::from_gguf(w.open, 1, w.options); }},
    {"load in the file",
     [](World& w) {
       LoadOptions options = w.options;
       options.layout = StackLayout::File;
       ExpertStack::load_from_gguf(w.open, 1, options);
     }},
    {"load decoded",
     [](World& w) {
       LoadOptions options = w.options;
       options.dequantize = QuantType::BF16;
       ExpertStack::load_from_gguf(w.open, 1, options);
     }},
    {"load dense",
     [](World& w) {
       ExpertStack::from_dense_stacks(w.stacked(w.gate, kWidth, kHidden),
                                      w.stacked(w.gate, kWidth, kHidden),
                                      w.stacked(w.down, kHidden, kWidth), w.options);
     }},
    {"load int4",
     [](World& w) { MarlinExpertStack::from_gptq(w.checkpoint.tensors(), w.pool.get()); }},
    {"forward", [](World& w) { forward(w, w.layer); }},
    {"forward bucketed", [](World& w) { forward(w, w.layer, "bucketed"); }},
    {"forward aligned", [](World& w) { forward(w, w.layer, "aligned"); }},
    {"reference", [](World& w) { moe_forward_cpu(w.layer, w.io()); }},
    {"route", [](World& w) { w.routed(); }},
    {"plan", [](World& w) { BucketPlan::build(w.routing, kExperts); }},
    {"rebuild",
     [](World& w) {
       BucketPlan plan = BucketPlan::build(Routing(1, 1), kExperts);
       plan.rebuild(w.routing);
     }},
    {"align",
     [](World& w) { AlignedRouting::build(w.routing, kExperts, 16, RowSpace::TokenPairs); }},
    {"gather_rows",
     [](World& w) {
       gather_rows(w.context, rows_of(w.x, kHidden), w.plan, rows_of(w.pairs, kHidden));
     }},
    {"silu_mul",
     [](World& w) { silu_mul(w.context, rows_of(w.wide, 2 * kWidth), rows_of(w.half, kWidth)); }},
    {"combine",
     [](World& w) {
       combine(w.context, rows_of(std::as_const(w.pairs), kHidden), w.plan, w.routing,
               rows_of(w.out, kHidden), false);
     }},
    {"expert_gemm",
     [](World& w) {
       Floats y(static_cast<std::size_t>(kTokens * kTopK * kWidth));
       expert_gemm(w.context, w.layer.stack(), Role::Up, rows_of(w.x, kHidden), w.plan,
                   rows_of(y, kWidth), Precision::Auto);
     }},
    {"matrix of a file",
     [](World& w) { QuantMatrix::from_gguf(w.open, "blk.0.ffn_gate_inp.weight", {}, w.options); }},
    {"matrix",
     [](World& w) {
       const QuantMatrix matrix =
           QuantMatrix::from_dense({w.gate.data(), DType::F32, {kWidth, kHidden}}, QuantType::Q8_0,
                                   {}, w.options, Floats(kWidth));
       Workspace workspace(workspace_bytes(w.context, matrix, kTokens));
       Floats y(static_cast<std::size_t>(kTokens * kWidth));
       multiply(w.context, matrix, rows_of(w.x, kHidden), rows_of(y, kWidth), workspace);
       explain(w.context, matrix, kTokens);
     }},
    {"pool", [](World&) { World::make_pool(); }},
    {"pool refresh",
     [](World& w) {
       w.residents->observe(w.ids);
       w.residents->refresh();
       w.residents->refresh_from_indices(w.ids);
       w.residents->stage(std::vector<std::int32_t>{0, 1, 2});
       w.residents->apply_target(std::vector<std::int32_t>{1, 2});
       w.residents->warm(std::vector<double>(kExperts, 1.0));
     }},
    {"pool facts",
     [](World& w) {
       w.residents->usage();
       w.residents->slot_map();
       w.residents->residents();
       w.residents->target();
       const ExpertPool* const pools[] = {w.residents.get()};
       merged_resident_mask(pools);
     }},
    {"store", [](World& w) { MoeExpertStore::from_gguf(w.open); }},
    {"store on disk", [](World& w) { MoeExpertStore::from_gguf(w.open, World::limited()); }},
    {"store of arrays",
     [](World& w) {
       const MoeExpertStore::ArrayLayer layer{0, w.stacked(w.gate, kHidden, kWidth),
                                              w.stacked(w.gate, kHidden, kWidth),
                                              w.stacked(w.down, kWidth, kHidden)};
       MoeExpertStore::from_arrays({&layer, 1});
     }},
    {"compute from a store", [](World& w) { on_store(w, {}, OnMiss::Compute); }},
    {"stage from a store", [](World& w) { on_store(w, {}, OnMiss::Stage); }},
    {"compute from disk", [](World& w) { on_store(w, World::limited(), OnMiss::Compute); }},
    {"stage from disk", [](World& w) { on_store(w, World::limited(), OnMiss::Stage); }},
    {"workspace",
     [](World&) {
       Workspace workspace(100);
       workspace.reserve(1000);
     }},
    {"profile",
     [](World& w) {
       Profiler profiler(true);
       w.context.attach(&profiler);
       struct Detach {
         Context& context;
         ~Detach() { context.attach(nullptr); }
       } const detach{w.context};
       Workspace workspace(workspace_bytes(w.context, w.layer, kTopK, kTokens));
       moe_forward(w.context, w.layer, w.io(), workspace);
       profiler.events();
       profiler.chrome_trace();
     }},
    {"context", [](World&) { Context{Device{}}; }},
    {"threads", [](World&) { ThreadPool{3}; }},
    {"facts of backends", [](World&) { backend_for(Device{}).kernels(); }},
};

class AllocationFailure : public ::testing::TestWithParam<bool> {};

TEST_P(AllocationFailure, IsAnErrorThatLeavesEverythingUsable) {
  World world;
  forward(world, world.layer);
  const Floats want = world.out;
  for (const Named& operation : kOperations) {
    SCOPED_TRACE(operation.name);
    // Twice, for what is made once and kept.
    for (int i = 0; i < 2; ++i) operation.run(world);
    const long before = live.load();
    long allocations = 0;
    for (; allocations < 20000; ++allocations) {
      bool error = false;
      failed = false;
      all_behind = GetParam();
      until_failure = allocations;
      try {
        operation.run(world);
      } catch (const OutOfMemoryError&) {
        error = true;
      } catch (const std::bad_alloc&) {
        error = true;
      } catch (const std::exception& other) {
        until_failure = -1;
        ADD_FAILURE() << "allocation " << allocations << ": " << other.what();
      }
      until_failure = -1;
      // A hint or a trace may do without its memory.
      const bool done = !failed;
      ASSERT_EQ(live.load(), before) << "leaked by a failure of allocation " << allocations;
      if (done) {
        EXPECT_FALSE(error);
        break;
      }
    }
    ASSERT_LT(allocations, 20000);
    operation.run(world);
    std::ranges::fill(world.out, kPoison);
    forward(world, world.layer);
    EXPECT_EQ(world.out, want);
  }
}

INSTANTIATE_TEST_SUITE_P(Each, AllocationFailure, ::testing::Bool(),
                         [](const auto& p) { return p.param ? "AndAllBehind" : "Alone"; });

}  // namespace
}  // namespace moesaic::testing

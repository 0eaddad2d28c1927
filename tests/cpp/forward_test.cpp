// The forwards against f64 and against each other, on the CPU backend and on the fake one.

#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <thread>

#include "fake_backend.hpp"
#include "layers.hpp"

// Allocations are counted where the C library hands them out (operator new asks it too); sanitizers
// bring their own.
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MOESAIC_COUNT_ALLOCATIONS 1
namespace {
std::atomic<std::int64_t> allocations{0};
}
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void* malloc(std::size_t n) noexcept {
  ++allocations;
  return __libc_malloc(n);
}
void* calloc(std::size_t n, std::size_t size) noexcept {
  ++allocations;
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t n) noexcept {
  ++allocations;
  return __libc_realloc(p, n);
}
void* memalign(std::size_t alignment, std::size_t n) noexcept {
  ++allocations;
  return __libc_memalign(alignment, n);
}
void* aligned_alloc(std::size_t alignment, std::size_t n) noexcept {
  ++allocations;
  return __libc_memalign(alignment, n);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t n) noexcept {
  ++allocations;
  *out = __libc_memalign(alignment, n);
  return *out != nullptr ? 0 : ENOMEM;
}
}
#endif

namespace moesaic::testing {
namespace {

constexpr double kReferenceBound = 1e-5;
constexpr double kExactBound = 2e-3;
constexpr double kFastBound = 2e-2;

struct Way {
  const char* name;
  bool forced;  ///< moe_forward_bucketed instead of moe_forward
  GemmMode gemm;
  RowSpaceMode row_space;
};
constexpr Way kWays[] = {
    {"auto", false, GemmMode::Auto, RowSpaceMode::Auto},
    {"bucketed_pairs", true, GemmMode::Bucketed, RowSpaceMode::TokenPairs},
    {"bucketed_packed", true, GemmMode::Bucketed, RowSpaceMode::PackedRows},
    {"aligned_pairs", true, GemmMode::Aligned, RowSpaceMode::TokenPairs},
    {"aligned_packed", true, GemmMode::Aligned, RowSpaceMode::PackedRows},
};

std::vector<const Backend*> test_backends() {
  static FakeBackend fake;
  return {&backend_for(Device{}), &fake};
}

Tuning quiet_tuning() {
  Tuning tuning;
  tuning.poison = true;
  return tuning;
}

void forward(Context& context, const LayerRef& layer, const ForwardIo& io, const Way& way) {
  const std::int32_t top_k = io.routing.top_k > 0 ? io.routing.top_k : layer.router->top_k;
  Workspace workspace(workspace_bytes(context, layer, top_k, io.x.dim(0)));
  if (way.forced) {
    moe_forward_bucketed(context, layer, io, workspace, way.gemm, way.row_space);
  } else {
    moe_forward(context, layer, io, workspace);
  }
}

struct Problem1 {
  TestLayer layer;
  Floats x;
  Routing routing;
  explicit Problem1(const Case& c)
      : layer(c), x(random_values(c.tokens * c.hidden, 3)), routing(make_routing(c)) {}
  LayerRef ref(const ExpertStack& stack) const {
    LayerRef ref;
    ref.stack = &stack;
    ref.activation = layer.activation;
    return ref;
  }
};

Case case_named(const std::string& name) {
  for (const Case& c : cases::kCases) {
    if (name == c.name) return c;
  }
  throw std::runtime_error("no case " + name);
}

class ForwardCase : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, ForwardCase, ::testing::ValuesIn(cases::kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(ForwardCase, ReferenceAgreesWithF64) {
  Problem1 p(GetParam());
  const ExpertStack stack = p.layer.stack();
  Tensor x(DType::F32, p.layer.shape.tokens, p.layer.shape.hidden, p.x);
  Tensor y(DType::F32, x.rows, x.cols);
  ForwardIo io;
  io.x = x.view();
  io.out = y.view();
  io.routing = p.routing.view();
  moe_forward_cpu(p.ref(stack), io);
  EXPECT_LE(rel_l2(y.values(), forward_f64(p.layer, p.x, p.routing)), kReferenceBound);
}

TEST_P(ForwardCase, EveryWayAgreesWithF64) {
  Problem1 p(GetParam());
  const Doubles expected = forward_f64(p.layer, p.x, p.routing);
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      Tuning tuning = quiet_tuning();
      tuning.precision = precision;
      Context context(*backend, tuning, ThreadPool::shared(2));
      for (const Way& way : kWays) {
        Tensor x(DType::F32, p.layer.shape.tokens, p.layer.shape.hidden, p.x);
        Tensor y(DType::F32, x.rows, x.cols);
        ForwardIo io;
        io.x = x.view();
        io.out = y.view();
        io.routing = p.routing.view();
        forward(context, p.ref(stack), io, way);
        EXPECT_LE(rel_l2(y.values(), expected),
                  precision == Precision::Exact ? kExactBound : kFastBound)
            << backend->info().name << " " << way.name << " precision "
            << static_cast<int>(precision);
      }
    }
  }
}

TEST_P(ForwardCase, EveryDtypeAndAccumulate) {
  Problem1 p(GetParam());
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Tuning tuning = quiet_tuning();
    tuning.precision = Precision::Exact;
    Context context(*backend, tuning, ThreadPool::shared(2));
    for (const DType in : {DType::F32, DType::F16, DType::BF16}) {
      Tensor x(in, p.layer.shape.tokens, p.layer.shape.hidden, p.x);
      const Doubles expected = forward_f64(p.layer, x.values(), p.routing);
      for (const DType out : {DType::F32, DType::F16, DType::BF16}) {
        for (const bool accumulate : {false, true}) {
          const Floats old = random_values(x.rows * x.cols, 11);
          Tensor y(out, x.rows, x.cols);
          if (accumulate) y = Tensor(out, x.rows, x.cols, old);
          Doubles sum = expected;
          if (accumulate) {
            const Floats before = y.values();
            for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(before[i]);
          }
          ForwardIo io;
          io.x = x.view();
          io.out = y.view();
          io.routing = p.routing.view();
          io.accumulate = accumulate;
          forward(context, p.ref(stack), io, kWays[0]);
          const double bound = out == DType::BF16 ? 5e-3 : kExactBound;
          EXPECT_LE(rel_l2(y.values(), sum), bound)
              << backend->info().name << " " << name_of(in) << " -> " << name_of(out)
              << " accumulate " << accumulate;
        }
      }
    }
  }
}

TEST_P(ForwardCase, PermutedTokensPermuteOutputs) {
  Problem1 p(GetParam());
  const std::int64_t tokens = p.layer.shape.tokens, hidden = p.layer.shape.hidden;
  const std::int32_t top_k = p.layer.shape.top_k;
  Floats reversed(p.x.size());
  Routing routing(tokens, top_k);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t from = tokens - 1 - t;
    std::copy_n(p.x.begin() + from * hidden, hidden, reversed.begin() + t * hidden);
    for (std::int32_t s = 0; s < top_k; ++s) {
      routing.topk_ids()[static_cast<std::size_t>(t * top_k + s)] =
          p.routing.topk_ids()[static_cast<std::size_t>(from * top_k + s)];
      routing.topk_weights()[static_cast<std::size_t>(t * top_k + s)] =
          p.routing.topk_weights()[static_cast<std::size_t>(from * top_k + s)];
    }
  }
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Tuning tuning = quiet_tuning();
    tuning.precision = Precision::Fast;
    Context context(*backend, tuning, ThreadPool::shared(2));
    for (const Way& way : kWays) {
      Tensor x(DType::F32, tokens, hidden, p.x), xr(DType::F32, tokens, hidden, reversed);
      Tensor y(DType::F32, tokens, hidden), yr(DType::F32, tokens, hidden);
      ForwardIo io;
      io.x = x.view();
      io.out = y.view();
      io.routing = p.routing.view();
      forward(context, p.ref(stack), io, way);
      io.x = xr.view();
      io.out = yr.view();
      io.routing = routing.view();
      forward(context, p.ref(stack), io, way);
      for (std::int64_t t = 0; t < tokens; ++t) {
        EXPECT_EQ(std::memcmp(y.bytes.data() + t * hidden * 4,
                              yr.bytes.data() + (tokens - 1 - t) * hidden * 4,
                              static_cast<std::size_t>(hidden) * 4),
                  0)
            << backend->info().name << " " << way.name << " token " << t;
      }
    }
  }
}

TEST_P(ForwardCase, BatchInvariantSplitsBitwise) {
  Problem1 p(GetParam());
  const std::int64_t tokens = p.layer.shape.tokens, hidden = p.layer.shape.hidden;
  const std::int32_t top_k = p.layer.shape.top_k;
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Tuning tuning = quiet_tuning();
    tuning.batch_invariant = true;
    Context context(*backend, tuning, ThreadPool::shared(2));
    Tensor x(DType::F32, tokens, hidden, p.x);
    Tensor whole(DType::F32, tokens, hidden), split(DType::F32, tokens, hidden);
    ForwardIo io;
    io.x = x.view();
    io.out = whole.view();
    io.routing = p.routing.view();
    forward(context, p.ref(stack), io, kWays[0]);
    for (std::int64_t t = 0; t < tokens;) {
      const std::int64_t n = std::min<std::int64_t>(t % 3 + 1, tokens - t);
      io.x = TensorView(x.bytes.data() + t * hidden * 4, DType::F32, {n, hidden});
      io.out = TensorView(split.bytes.data() + t * hidden * 4, DType::F32, {n, hidden});
      io.routing = {p.routing.view().topk_ids + t * top_k,
                    p.routing.view().topk_weights + t * top_k, n, top_k};
      forward(context, p.ref(stack), io, kWays[0]);
      t += n;
    }
    EXPECT_EQ(whole.bytes, split.bytes) << backend->info().name;
  }
}

TEST_P(ForwardCase, StridedRows) {
  Problem1 p(GetParam());
  const std::int64_t tokens = p.layer.shape.tokens, hidden = p.layer.shape.hidden;
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context(*backend, quiet_tuning(), ThreadPool::shared(2));
    Tensor x(DType::F32, tokens, hidden, p.x), wide_x(DType::F32, tokens, hidden + 5);
    Tensor y(DType::F32, tokens, hidden), wide_y(DType::F32, tokens, hidden + 3);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::memcpy(wide_x.bytes.data() + t * (hidden + 5) * 4, x.bytes.data() + t * hidden * 4,
                  static_cast<std::size_t>(hidden) * 4);
    }
    ForwardIo io;
    io.x = x.view();
    io.out = y.view();
    io.routing = p.routing.view();
    forward(context, p.ref(stack), io, kWays[0]);
    TensorView narrow_x = wide_x.view(), narrow_y = wide_y.view();
    narrow_x.shape[1] = narrow_y.shape[1] = hidden;
    io.x = narrow_x;
    io.out = narrow_y;
    forward(context, p.ref(stack), io, kWays[0]);
    for (std::int64_t t = 0; t < tokens; ++t) {
      EXPECT_EQ(std::memcmp(wide_y.bytes.data() + t * (hidden + 3) * 4,
                            y.bytes.data() + t * hidden * 4, static_cast<std::size_t>(hidden) * 4),
                0);
      EXPECT_TRUE(std::isnan(wide_y.get(static_cast<std::size_t>(t * (hidden + 3) + hidden))));
    }
  }
}

TEST_P(ForwardCase, WorkspaceIsExact) {
  Problem1 p(GetParam());
  const std::int64_t tokens = p.layer.shape.tokens;
  if (tokens == 0) return;
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context(*backend, quiet_tuning(), ThreadPool::shared(2));
    const LayerRef layer = p.ref(stack);
    const std::size_t bytes = workspace_bytes(context, layer, p.layer.shape.top_k, tokens);
    for (const Way& way : kWays) {
      Tensor x(DType::F32, tokens, p.layer.shape.hidden, p.x);
      Tensor y(DType::F32, tokens, p.layer.shape.hidden);
      const std::vector<std::byte> poisoned = y.bytes;
      ForwardIo io;
      io.x = x.view();
      io.out = y.view();
      io.routing = p.routing.view();
      GuardedMemory memory(bytes);
      Workspace small(memory.data(), bytes - 1), exact(memory.data(), bytes);
      const auto run = [&](Workspace& workspace) {
        if (way.forced) {
          moe_forward_bucketed(context, layer, io, workspace, way.gemm, way.row_space);
        } else {
          moe_forward(context, layer, io, workspace);
        }
      };
      EXPECT_THROW(run(small), WorkspaceError) << way.name;
      EXPECT_EQ(y.bytes, poisoned) << way.name;
      run(exact);
      EXPECT_TRUE(memory.guard_untouched()) << backend->info().name << " " << way.name;
      const std::vector<std::byte> first = y.bytes;
      run(exact);
      EXPECT_EQ(y.bytes, first) << backend->info().name << " " << way.name;
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      EXPECT_LE(workspace_bytes(context, layer, p.layer.shape.top_k, t), bytes) << t;
    }
  }
}

#if defined(MOESAIC_COUNT_ALLOCATIONS)
/// Every way of a case with its own router.
void expect_no_allocation(const Case& c) {
  Problem1 p(c);
  RouterConfig router;
  router.num_experts = c.experts;
  router.top_k = c.top_k;
  const Floats weight = random_values(router.num_experts * c.hidden, 21);
  for (const Backend* backend : test_backends()) {
    for (const StackLayout layout : {StackLayout::Auto, StackLayout::File}) {
      const ExpertStack stack = p.layer.stack(layout == StackLayout::Auto ? backend : nullptr);
      Context context(*backend, quiet_tuning(), ThreadPool::shared(2));
      LayerRef layer = p.ref(stack);
      layer.router = &router;
      layer.router_weight = &weight;
      Workspace workspace(workspace_bytes(context, layer, router.top_k, c.tokens));
      Tensor x(DType::F32, c.tokens, c.hidden, p.x), y(DType::F32, c.tokens, c.hidden);
      ForwardIo io;
      io.x = x.view();
      io.out = y.view();
      for (const Way& way : kWays) {
        std::int64_t counted = 0;
        for (int repeat = 0; repeat < 2; ++repeat) {  // the first call may set up threads
          const std::int64_t before = allocations;
          if (way.forced) {
            moe_forward_bucketed(context, layer, io, workspace, way.gemm, way.row_space);
          } else {
            moe_forward(context, layer, io, workspace);
          }
          counted = allocations - before;
        }
        EXPECT_EQ(counted, 0) << backend->info().name << " " << way.name << " "
                              << traits(c.up).name;
      }
    }
  }
}

TEST_P(ForwardCase, NoAllocation) { expect_no_allocation(GetParam()); }

TEST(Forward, NoAllocationForAnyType) {
  for (const QuantTraits& type : quant_table()) {
    if (!backend_for(Device{}).supports({.type = type.type}).ok) continue;
    const Case c{"", 5, 256, 256, 3, 2, type.type, type.type, type.type};
    expect_no_allocation(c);
  }
}
#endif

/// A layer with its own router and shared experts.
struct FullLayer {
  TestLayer layer, shared_layer;
  ExpertStack stack;
  RouterConfig router;
  Floats router_weight;
  SharedExperts shared;

  static Case shared_case(Case c) {
    c.experts = c.top_k = 1;
    c.intermediate = 96;
    c.gate = c.up = c.down = QuantType::F32;
    return c;
  }
  FullLayer(const Case& c, const Backend* backend, bool sigmoid)
      : layer(c),
        shared_layer(shared_case(c), 31),
        stack(layer.stack(backend)),
        router_weight(random_values(c.experts * c.hidden, 41, 0.1F)),
        shared{shared_layer.stack(backend), {}} {
    router.num_experts = c.experts;
    router.top_k = c.top_k;
    if (sigmoid) shared.gate = random_values(c.hidden, 43, 0.1F);
  }
  LayerRef ref() const {
    LayerRef ref;
    ref.stack = &stack;
    ref.router = &router;
    ref.activation = layer.activation;
    ref.router_weight = &router_weight;
    ref.shared = &shared;
    return ref;
  }
  Doubles expected(const Floats& x, const Routing& routing) const {
    Doubles y = forward_f64(layer, x, routing);
    const std::int64_t hidden = layer.shape.hidden;
    Routing one(routing.num_tokens(), 1);
    for (std::int64_t t = 0; t < routing.num_tokens(); ++t) {
      double logit = 0.0;
      for (std::size_t h = 0; h < shared.gate.size(); ++h) {
        logit += static_cast<double>(shared.gate[h]) *
                 static_cast<double>(x[static_cast<std::size_t>(t * hidden) + h]);
      }
      one.topk_ids()[static_cast<std::size_t>(t)] = 0;
      one.topk_weights()[static_cast<std::size_t>(t)] =
          shared.gate.empty() ? 1.0F : static_cast<float>(1.0 / (1.0 + std::exp(-logit)));
    }
    const Doubles more = forward_f64(shared_layer, x, one);
    for (std::size_t i = 0; i < y.size(); ++i) y[i] += more[i];
    return y;
  }
};

TEST(Forward, OwnRouterAndSharedExperts) {
  for (const char* name : {"one_token", "odd_sizes", "all_to_one"}) {
    const Case c = case_named(name);
    const Floats values = random_values(c.tokens * c.hidden, 3);
    for (const bool sigmoid : {false, true}) {
      const FullLayer full(c, nullptr, sigmoid);
      for (const Backend* backend : test_backends()) {
        const ExpertStack stack = full.layer.stack(backend);
        const SharedExperts shared{full.shared_layer.stack(backend), full.shared.gate};
        LayerRef layer = full.ref();
        layer.stack = &stack;
        layer.shared = &shared;
        Tuning tuning = quiet_tuning();
        tuning.precision = Precision::Exact;
        Context context(*backend, tuning, ThreadPool::shared(2));
        for (const DType dtype : {DType::F32, DType::F16}) {
          for (const bool accumulate : {false, true}) {
            Tensor x(DType::F32, c.tokens, c.hidden, values);
            Tensor y(dtype, c.tokens, c.hidden), reference(dtype, c.tokens, c.hidden);
            if (accumulate) {
              const Floats old = random_values(c.tokens * c.hidden, 5);
              y = reference = Tensor(dtype, c.tokens, c.hidden, old);
            }
            Routing routing(c.tokens, c.top_k), reference_routing(c.tokens, c.top_k);
            ForwardIo io;
            io.x = x.view();
            io.out = reference.view();
            io.accumulate = accumulate;
            io.routing_out = reference_routing.view();
            Doubles expected(values.size());
            if (accumulate) {
              const Floats before = y.values();
              expected.assign(before.begin(), before.end());
            }
            moe_forward_cpu(full.ref(), io);
            io.out = y.view();
            io.routing_out = routing.view();
            forward(context, layer, io, kWays[0]);
            const Doubles sum = full.expected(values, routing);
            for (std::size_t i = 0; i < sum.size(); ++i) expected[i] += sum[i];
            const double bound = dtype == DType::F16 ? 1e-3 : kReferenceBound;
            EXPECT_LE(rel_l2(reference.values(), expected), bound) << name;
            EXPECT_LE(rel_l2(y.values(), expected), kExactBound)
                << backend->info().name << " " << name << " sigmoid " << sigmoid;
            EXPECT_TRUE(std::equal(routing.topk_ids().begin(), routing.topk_ids().end(),
                                   reference_routing.topk_ids().begin()));
          }
        }
      }
    }
  }
}

TEST(Forward, GivenLogitsAndStridedLogits) {
  const Case c = case_named("odd_sizes");
  Problem1 p(c);
  const Backend& backend = backend_for(Device{});
  const ExpertStack stack = p.layer.stack(&backend);
  Tuning tuning = quiet_tuning();
  tuning.precision = Precision::Exact;
  Context context(backend, tuning, ThreadPool::shared(2));
  RouterConfig router;
  router.num_experts = c.experts;
  router.top_k = c.top_k;
  LayerRef layer = p.ref(stack);
  layer.router = &router;
  const Floats logits = random_values(c.tokens * (c.experts + 2), 9);
  ConstTensorView view(logits.data(), DType::F32, {c.tokens, c.experts + 2});
  view.shape[1] = c.experts;
  Routing expected_routing;
  route(view, router, expected_routing);
  Tensor x(DType::F32, c.tokens, c.hidden, p.x), y(DType::F32, c.tokens, c.hidden);
  Routing routing(c.tokens, c.top_k);
  ForwardIo io;
  io.x = x.view();
  io.out = y.view();
  io.logits = view;
  io.routing_out = routing.view();
  forward(context, layer, io, kWays[0]);
  EXPECT_TRUE(std::equal(routing.topk_ids().begin(), routing.topk_ids().end(),
                         expected_routing.topk_ids().begin()));
  EXPECT_LE(rel_l2(y.values(), forward_f64(p.layer, p.x, expected_routing)), kExactBound);
}

TEST(Forward, StrictRefusesNonfiniteLogits) {
  const Case c = case_named("odd_sizes");
  Problem1 p(c);
  FakeBackend backend;
  const ExpertStack stack = p.layer.stack();
  RouterConfig router;
  router.num_experts = c.experts;
  router.top_k = c.top_k;
  LayerRef layer = p.ref(stack);
  layer.router = &router;
  Floats logits = random_values(c.tokens * c.experts, 9);
  logits[2] = kPoison;
  Tensor x(DType::F32, c.tokens, c.hidden, p.x), y(DType::F32, c.tokens, c.hidden);
  const std::vector<std::byte> poisoned = y.bytes;
  ForwardIo io;
  io.x = x.view();
  io.out = y.view();
  io.logits = ConstTensorView(logits.data(), DType::F32, {c.tokens, c.experts});
  Tuning tuning = quiet_tuning();
  tuning.strict = true;
  Context strict(backend, tuning, ThreadPool::shared(1));
  EXPECT_THROW(forward(strict, layer, io, kWays[0]), ConfigError);
  EXPECT_EQ(y.bytes, poisoned);
  Context lenient(backend, quiet_tuning(), ThreadPool::shared(1));
  Profiler profiler;
  lenient.attach(&profiler);
  forward(lenient, layer, io, kWays[0]);
  EXPECT_EQ(profiler.counter(Counter::NonfiniteRows), 1);
  for (const float v : y.values()) ASSERT_TRUE(std::isfinite(v));
}

TEST(Forward, EightThreadsAtOnce) {
  const Case c = case_named("wide_batch");
  Problem1 p(c);
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context(*backend, quiet_tuning(), ThreadPool::shared(2));
    Tensor x(DType::F32, c.tokens, c.hidden, p.x);
    Tensor expected(DType::F32, c.tokens, c.hidden);
    ForwardIo io;
    io.x = x.view();
    io.routing = p.routing.view();
    io.out = expected.view();
    forward(context, p.ref(stack), io, kWays[0]);
    std::vector<Tensor> outputs(8, Tensor(DType::F32, c.tokens, c.hidden));
    std::vector<std::thread> threads;
    for (Tensor& y : outputs) {
      threads.emplace_back([&] {
        ForwardIo own = io;
        own.out = y.view();
        forward(context, p.ref(stack), own, kWays[0]);
      });
    }
    for (std::thread& t : threads) t.join();
    for (const Tensor& y : outputs) EXPECT_EQ(y.bytes, expected.bytes) << backend->info().name;
  }
}

TEST(Forward, ZonesAddUpToWallTime) {
  Case c = case_named("wide_batch");
  c.hidden = c.intermediate = 512;
  // The CPU backend; the fake one's own time would dwarf the steps between the zones.
  const Backend* backend = &backend_for(Device{});
  const FullLayer full(c, backend, true);
  const Floats values = random_values(c.tokens * c.hidden, 3);
  for (const Way& way : kWays) {
    Tuning tuning;
    tuning.gemm = way.gemm;
    tuning.row_space = way.row_space;
    Context context(*backend, tuning, ThreadPool::shared(1));
    const LayerRef layer = full.ref();
    Workspace workspace(workspace_bytes(context, layer, c.top_k, c.tokens));
    Tensor x(DType::F32, c.tokens, c.hidden, values), y(DType::F32, c.tokens, c.hidden);
    ForwardIo io;
    io.x = x.view();
    io.out = y.view();
    moe_forward(context, layer, io, workspace);
    double best = 0.0;  // the share of the wall time inside zones; 1 is all of it
    for (int repeat = 0; repeat < 5 && best < 0.9; ++repeat) {
      Profiler profiler;
      context.attach(&profiler);
      const auto start = std::chrono::steady_clock::now();
      moe_forward(context, layer, io, workspace);
      const std::chrono::duration<double, std::nano> wall =
          std::chrono::steady_clock::now() - start;
      double sum = 0.0;
      for (std::size_t z = 0; z < static_cast<std::size_t>(Zone::Count); ++z) {
        sum += static_cast<double>(profiler.zone(static_cast<Zone>(z)).nanoseconds);
      }
      EXPECT_LE(sum, wall.count()) << way.name << ": a zone was counted twice";
      best = std::max(best, sum / wall.count());
      for (const Zone z : {Zone::Router, Zone::Route, Zone::Plan, Zone::Shared}) {
        EXPECT_EQ(profiler.zone(z).calls, 1) << way.name << " " << name_of(z);
      }
      EXPECT_EQ(profiler.zone(Zone::Gather).calls, way.row_space == RowSpaceMode::PackedRows);
      EXPECT_EQ(profiler.zone(Zone::Align).calls, way.gemm == GemmMode::Aligned);
      EXPECT_EQ(profiler.zone(Zone::GateUp).calls, 1) << way.name;
      EXPECT_EQ(profiler.zone(Zone::Activate).calls, 0) << way.name << ": part of gate_up";
      EXPECT_EQ(profiler.zone(Zone::Down).calls, 1) << way.name;
      EXPECT_EQ(profiler.counter(Counter::Calls), 1);
      EXPECT_EQ(profiler.counter(Counter::Tokens), c.tokens);
      EXPECT_EQ(profiler.counter(Counter::Pairs), c.tokens * c.top_k);
      EXPECT_GT(profiler.counter(Counter::ExpertsTouched), 0);
      if (way.gemm == GemmMode::Aligned) {
        EXPECT_GT(profiler.counter(Counter::PaddedRows), 0);
      }
      context.attach(nullptr);
    }
    EXPECT_GE(best, 0.9) << backend->info().name << " " << way.name;
  }
}

TEST(Forward, DefaultPhasesOpenTheirZones) {
  const Case c = case_named("odd_sizes");
  const FakeBackend backend;
  const FullLayer full(c, &backend, true);
  for (const Way& way : kWays) {
    Context context(backend, quiet_tuning(), ThreadPool::shared(1));
    Profiler profiler;
    context.attach(&profiler);
    Tensor x(DType::F32, c.tokens, c.hidden, random_values(c.tokens * c.hidden, 3));
    Tensor y(DType::F32, c.tokens, c.hidden);
    ForwardIo io;
    io.x = x.view();
    io.out = y.view();
    forward(context, full.ref(), io, way);
    for (const Zone z : {Zone::GateUp, Zone::Activate, Zone::Down, Zone::Combine, Zone::Shared}) {
      EXPECT_EQ(profiler.zone(z).calls, 1) << way.name << " " << name_of(z);
    }
  }
}

TEST(ChoosePath, IsAPureFunctionOfSizesAndTuning) {
  const StackShape shape{32, 256, 256};
  Tuning tuning;
  EXPECT_EQ(choose_path(1, 8, shape, tuning).path, Path::Gemv);
  EXPECT_EQ(choose_path(2, 8, shape, tuning).path, Path::Bucketed);
  EXPECT_EQ(choose_path(2, 8, shape, tuning).row_space, RowSpace::TokenPairs);
  EXPECT_EQ(choose_path(8, 8, shape, tuning).precision, Precision::Exact);  // 64 = 2 * 32 pairs
  EXPECT_EQ(choose_path(9, 8, shape, tuning).precision, Precision::Fast);
  tuning.batch_invariant = true;
  EXPECT_EQ(choose_path(512, 8, shape, tuning).precision, Precision::Exact);
  tuning.precision = Precision::Fast;
  EXPECT_EQ(choose_path(1, 8, shape, tuning).precision, Precision::Fast);
  tuning.gemm = GemmMode::Aligned;
  tuning.row_space = RowSpaceMode::PackedRows;
  EXPECT_EQ(choose_path(512, 8, shape, tuning).path, Path::Aligned);
  EXPECT_EQ(choose_path(1, 8, shape, tuning).path, Path::Aligned);
  EXPECT_EQ(choose_path(512, 8, shape, tuning).row_space, RowSpace::PackedRows);
  EXPECT_FALSE(choose_path(512, 8, shape, tuning).reason.empty());
}

TEST(Explain, NamesPathKernelsAndSizes) {
  const Case c = case_named("wide_batch");
  const Backend& backend = backend_for(Device{});
  const FullLayer full(c, &backend, true);
  Context context(backend, Tuning{}, ThreadPool::shared(1));
  const Explanation explanation = explain(context, full.ref(), c.top_k, 1);
  const auto fact = [&](const std::string& name) -> std::string {
    for (const auto& [key, value] : explanation.facts) {
      if (key == name) return value;
    }
    return "absent";
  };
  EXPECT_EQ(fact("path"), "gemv");
  EXPECT_EQ(fact("precision"), "exact");
  EXPECT_EQ(fact("gate type"), "Q4_K");
  EXPECT_EQ(fact("down type"), "Q6_K");
  EXPECT_EQ(fact("down kernel"), backend.kernel_name(full.stack.down().ref, context.tuning()));
  EXPECT_EQ(fact("workspace bytes"),
            std::to_string(workspace_bytes(context, full.ref(), c.top_k, 1)));
  EXPECT_EQ(fact("experts touched (uniform routing)"), "4 of 16");
}

/// Every bad call says what is wrong and leaves the output alone.
class BadCall : public ::testing::Test {
 protected:
  Case shape = case_named("odd_sizes");
  Problem1 p{shape};
  ExpertStack stack = p.layer.stack();
  FakeBackend backend;
  Context context{backend, quiet_tuning(), ThreadPool::shared(1)};
  LayerRef layer = p.ref(stack);
  Tensor x{DType::F32, shape.tokens, shape.hidden, p.x};
  Tensor y{DType::F32, shape.tokens, shape.hidden};
  ForwardIo io;
  Workspace workspace{workspace_bytes(context, layer, shape.top_k, shape.tokens)};

  void SetUp() override {
    io.x = x.view();
    io.out = y.view();
    io.routing = p.routing.view();
  }
  template <class E>
  void expect(const std::string& part) {
    const std::vector<std::byte> before = y.bytes;
    for (const bool reference : {false, true}) {
      try {
        if (reference) {
          moe_forward_cpu(layer, io);
        } else {
          moe_forward(context, layer, io, workspace);
        }
        ADD_FAILURE() << "no error for " << part;
      } catch (const E& error) {
        const std::string text = error.what();
        EXPECT_NE(text.find(part), std::string::npos) << text;
        EXPECT_NE(text.find("moe_forward"), std::string::npos) << text;
        EXPECT_NE(text.find("expected"), std::string::npos) << text;
      }
    }
    EXPECT_EQ(y.bytes, before);
  }
};

TEST_F(BadCall, ShapesAndStrides) {
  io.x = TensorView(x.bytes.data(), DType::F32, {shape.tokens, shape.hidden - 1});
  expect<ShapeError>("x.shape");
  io.x = x.view();
  io.out = TensorView(y.bytes.data(), DType::F32, {shape.tokens - 1, shape.hidden});
  expect<ShapeError>("out.shape");
  TensorView flipped = y.view();
  flipped.strides = {1, shape.tokens};
  io.out = flipped;
  expect<ShapeError>("out.strides");
  TensorView onto_itself = y.view();
  onto_itself.strides[0] = 0;
  io.out = onto_itself;
  expect<ShapeError>("out.strides");
  io.out = TensorView(nullptr, DType::F32, {shape.tokens, shape.hidden});
  expect<ShapeError>("out.data");
  io.out = y.view();
  io.x = y.view();
  expect<ShapeError>("out");
}

TEST_F(BadCall, DTypesAndDevices) {
  io.x.dtype = DType::F64;
  expect<DTypeError>("x.dtype");
  io.x = x.view();
  io.out.dtype = DType::I32;
  expect<DTypeError>("out.dtype");
  io.out = y.view();
  io.out.device = {DeviceType::Cuda, 0};
  expect<DeviceError>("out.device");
}

TEST_F(BadCall, Routing) {
  p.routing.topk_ids()[4] = shape.experts;
  expect<ShapeError>(std::to_string(shape.experts));
  p.routing.topk_ids()[4] = -2;
  expect<ShapeError>("-2");
  io.routing = {};
  expect<ConfigError>("router");
  RouterConfig router;
  router.num_experts = shape.experts;
  router.top_k = shape.top_k;
  layer.router = &router;
  expect<ShapeError>("router weight");
  const Floats logits = random_values(shape.tokens * shape.experts, 5);
  io.logits = ConstTensorView(logits.data(), DType::F32, {shape.tokens, shape.experts - 1});
  expect<ShapeError>("logits.shape");
  io.logits = ConstTensorView(logits.data(), DType::F16, {shape.tokens, shape.experts});
  expect<DTypeError>("logits.dtype");
  io.logits = ConstTensorView(logits.data(), DType::F32, {shape.tokens, shape.experts});
  router.num_experts += 1;
  expect<ShapeError>("router.num_experts");
}

TEST_F(BadCall, ActivationWithoutItsTensor) {
  layer.activation.kind = ActivationKind::ReluSquared;
  expect<ShapeError>("gate tensor");
}

TEST_F(BadCall, UnsupportedWeights) {
  backend.refused = shape.down;
  try {
    moe_forward(context, layer, io, workspace);
    ADD_FAILURE();
  } catch (const UnsupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("down"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(std::isnan(y.get(0)));
}

}  // namespace
}  // namespace moesaic::testing

// Products over Marlin stacks and operations over host plans on the emulated CUDA backend: against
// f64 and the CPU, in memory that is poisoned, guarded and given back; what a capture refuses.

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "gptq_checkpoint.hpp"
#include "gpu_forward.hpp"
#include "moesaic/error.hpp"
#include "runtime/emulator.hpp"
#include "seeds.hpp"

namespace moesaic::testing {
namespace {

constexpr double kExactBound = 1e-5;  ///< f32 x in two bf16 planes
constexpr double kFastBound = 5e-3;   ///< in one
constexpr double kCpuBound = 1e-4;  ///< between the GPU and the CPU, which rounds x to int8 planes
MarlinExpertStack on_gpu(const MarlinExpertStack& stack) {
  LoadOptions options;
  options.backend = &gpu_backend();
  return stack.to(options);
}

DeviceTensor rows_on_gpu(const Floats& values, std::int64_t cols, DType dtype = DType::F32) {
  return DeviceTensor(Tensor(dtype, static_cast<std::int64_t>(values.size()) / cols, cols, values));
}
DeviceTensor poisoned_on_gpu(std::int64_t rows, std::int64_t cols) {
  return DeviceTensor(DType::F32, rows, cols);
}

Doubles row_f64(const Floats& x, std::int64_t row, std::int64_t cols) {
  return {x.begin() + row * cols, x.begin() + (row + 1) * cols};
}

/// x of each dispatch times its expert, one behind the other.
Doubles dispatched_f64(const Checkpoint& c, const std::vector<MarlinDispatch>& dispatches,
                       const Floats& x) {
  Doubles all;
  for (const MarlinDispatch& d : dispatches) {
    for (std::int64_t i = 0; i < d.rows; ++i) {
      const Doubles row = row_f64(x, d.in_row + i, c.k);
      const Doubles y = apply_f64(c.matrices[static_cast<std::size_t>(d.expert)], row.data());
      all.insert(all.end(), y.begin(), y.end());
    }
  }
  return all;
}
Floats dispatched_rows(const Checkpoint& c, const std::vector<MarlinDispatch>& dispatches,
                       const Floats& out) {
  Floats all;
  for (const MarlinDispatch& d : dispatches) {
    all.insert(all.end(), out.begin() + d.out_row * c.n, out.begin() + (d.out_row + d.rows) * c.n);
  }
  return all;
}

/// Nothing that a GPU would have refused, and all arrays within their bounds.
class CudaPhases : public ::testing::Test {
 protected:
  void SetUp() override {
    gpu_backend();
    live_ = EmulatedGpu::get().live_bytes();
  }
  void TearDown() override {
    EXPECT_EQ(std::exchange(EmulatedGpu::get().refused, ""), "");
    EXPECT_TRUE(EmulatedGpu::get().guards_untouched());
    EXPECT_EQ(EmulatedGpu::get().live_bytes(), live_);
    emulation::options().seed = 0;
  }

 private:
  std::int64_t live_ = 0;
};

/// Rows of the experts lie apart in x and in out, not in their order; some experts have none.
const std::vector<MarlinDispatch> kDispatches = {{2, 0, 11, 9}, {1, 5, 20, 0}, {0, 12, 2, 1},
                                                 {1, 14, 4, 3}, {0, 0, 0, 0},  {1, 2, 0, 2}};

TEST_F(CudaPhases, BatchedAgreesWithF64AndTheCpu) {
  for (const Recipe& r : recipes()) {
    SCOPED_TRACE(describe_recipe(r));
    const Checkpoint c = make_checkpoint(r);
    const MarlinExpertStack host = MarlinExpertStack::from_gptq(c.tensors());
    const MarlinExpertStack stack = on_gpu(host);
    EXPECT_EQ(stack.device(), kGpu);
    const Floats x = random_values(20 * c.k, 5);
    const Doubles want = dispatched_f64(c, kDispatches, x);
    Floats from = x, cpu = poisoned(21 * c.n);
    Context cpu_context;
    host.gemm_phase_batched(cpu_context, rows_of(from, c.k), kDispatches, rows_of(cpu, c.n),
                            Precision::Exact);
    const DeviceTensor in = rows_on_gpu(x, c.k);
    Context context = gpu_context();
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      const DeviceTensor out = poisoned_on_gpu(21, c.n);
      stack.gemm_phase_batched(context, in.view(), kDispatches, out.view(), precision);
      const Floats all = out.values();
      const Floats got = dispatched_rows(c, kDispatches, all);
      EXPECT_LE(rel_l2(got, want), precision == Precision::Exact ? kExactBound : kFastBound);
      if (precision == Precision::Exact) {
        EXPECT_LE(rel_l2(got, dispatched_rows(c, kDispatches, cpu)), kCpuBound);
      }
      for (const std::int64_t row : {3, 7, 10, 20}) {
        EXPECT_TRUE(std::isnan(all[static_cast<std::size_t>(row * c.n)])) << row;
      }
    }
  }
}

TEST_F(CudaPhases, ManyRowsInEveryInputType) {
  const Checkpoint c = make_checkpoint({.experts = 2,
                                        .k = 256,
                                        .n = 80,
                                        .group_size = 64,
                                        .order = Order::Permuted,
                                        .shared_order = false});
  const MarlinExpertStack stack = on_gpu(MarlinExpertStack::from_gptq(c.tensors()));
  const std::vector<MarlinDispatch> dispatches = {{1, 0, 0, 131}, {0, 131, 131, 19}};
  Context context = gpu_context();
  for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
    const DeviceTensor in = rows_on_gpu(random_values(150 * c.k, 6), c.k, dtype);
    const DeviceTensor out = poisoned_on_gpu(150, c.n);
    stack.gemm_phase_batched(context, in.view(), dispatches, out.view(), Precision::Exact);
    EXPECT_LE(rel_l2(out.values(), dispatched_f64(c, dispatches, in.values())), kExactBound)
        << name_of(dtype);
  }
}

TEST_F(CudaPhases, NothingToDoLaunchesNothing) {
  const Checkpoint c = make_checkpoint({});
  const MarlinExpertStack stack = on_gpu(MarlinExpertStack::from_gptq(c.tensors()));
  const DeviceTensor in = rows_on_gpu(random_values(2 * c.k, 5), c.k);
  const DeviceTensor out = poisoned_on_gpu(2, c.n);
  const DeviceTensor none = poisoned_on_gpu(0, c.n), no_rows = poisoned_on_gpu(0, c.k);
  Context context = gpu_context();
  const EmulatedGpu::Counts before = EmulatedGpu::get().counts;
  stack.gemm_phase_batched(context, in.view(), {}, out.view());
  stack.gemm_phase_batched(context, in.view(), std::vector<MarlinDispatch>{{1, 0, 0, 0}},
                           out.view());
  const AlignedRouting empty =
      AlignedRouting::build(Routing(0, 2), c.experts, 16, RowSpace::TokenPairs);
  stack.gemm_phase_vllm(context, no_rows.view(), empty, 2, none.view());
  EXPECT_EQ(EmulatedGpu::get().counts, before);
  EXPECT_TRUE(std::isnan(out.values()[0]));
}

TEST_F(CudaPhases, VllmWritesEveryRow) {
  constexpr std::int32_t kTopK = 3;
  constexpr std::int64_t kTokens = 21;
  for (const Recipe& r : {Recipe{.experts = 4,
                                 .k = 128,
                                 .n = 64,
                                 .group_size = 32,
                                 .order = Order::Permuted,
                                 .shared_order = false},
                          Recipe{.experts = 4, .k = 256, .n = 70, .group_size = 128},
                          Recipe{.experts = 3, .k = 136, .n = 24, .group_size = -1, .zeros = false},
                          Recipe{.experts = 1, .k = 64, .n = 40, .group_size = 64}}) {
    SCOPED_TRACE(describe_recipe(r));
    const Checkpoint c = make_checkpoint(r);
    const MarlinExpertStack stack = on_gpu(MarlinExpertStack::from_gptq(c.tensors()));
    const std::int32_t top_k = std::min(kTopK, c.experts);
    Routing routing =
        make_routing(int4_case(kTokens, c.k, c.n, c.experts, top_k, RoutingShape::Skipped));
    const std::int64_t pairs = kTokens * top_k;
    const Floats x = random_values(kTokens * c.k, 8);
    const DeviceTensor in = rows_on_gpu(x, c.k);
    Context context = gpu_context();
    for (const bool skip_all : {false, true}) {
      if (skip_all) std::ranges::fill(routing.topk_ids(), -1);
      const BucketPlan plan = BucketPlan::build(routing, c.experts);
      Doubles by_pair(static_cast<std::size_t>(pairs * c.n)), by_row = by_pair;
      Floats packed(static_cast<std::size_t>(pairs * c.k));
      for (std::int64_t row = 0; row < plan.num_rows(); ++row) {
        const std::int64_t pair = plan.row_pair()[static_cast<std::size_t>(row)];
        const Doubles from = row_f64(x, pair / top_k, c.k);
        const std::int32_t expert = routing.topk_ids()[static_cast<std::size_t>(pair)];
        const Doubles y = apply_f64(c.matrices[static_cast<std::size_t>(expert)], from.data());
        std::ranges::copy(y, by_pair.begin() + pair * c.n);
        std::ranges::copy(y, by_row.begin() + row * c.n);
        std::ranges::copy(from, packed.begin() + row * c.k);
      }
      const DeviceTensor in_packed = rows_on_gpu(packed, c.k);
      const auto check = [&](const DeviceTensor& from, RowSpace space, std::int32_t divisor,
                             const Doubles& want, std::int32_t block) {
        const AlignedRouting aligned = AlignedRouting::build(routing, c.experts, block, space);
        const DeviceTensor out = poisoned_on_gpu(pairs, c.n);
        stack.gemm_phase_vllm(context, from.view(), aligned, divisor, out.view(), Precision::Exact);
        const Floats got = out.values();
        EXPECT_LE(rel_l2(got, want), kExactBound) << block;
        for (std::size_t i = 0; i < got.size(); ++i) {
          if (want[i] == 0.0) {
            ASSERT_EQ(got[i], 0.0F) << block << " " << i;
          }
        }
      };
      for (const std::int32_t block : {4, 8, 16, 48, 64}) {
        check(in, RowSpace::TokenPairs, top_k, by_pair, block);
        check(in_packed, RowSpace::PackedRows, 1, by_row, block);
      }
    }
  }
}

TEST_F(CudaPhases, ExpertLinearsTakeColumnsAndBias) {
  const Checkpoint c = make_checkpoint({.experts = 2,
                                        .k = 128,
                                        .n = 200,
                                        .group_size = 32,
                                        .order = Order::Permuted,
                                        .shared_order = false});
  const MarlinExpertStack stack = on_gpu(MarlinExpertStack::from_gptq(c.tensors()));
  Context context = gpu_context();
  const Floats x = random_values(5 * c.k, 9);
  const DeviceTensor in = rows_on_gpu(x, c.k);
  const std::pair<std::int64_t, std::int64_t> pieces[] = {{0, 64}, {64, 128}, {192, 8}, {0, 200}};
  for (const auto& [first, cols] : pieces) {
    const Floats bias = random_values(cols, 10);
    const MarlinLinear linear = stack.make_expert_linear(1, first, cols, bias);
    EXPECT_EQ(linear.device(), kGpu);
    const DeviceTensor out = poisoned_on_gpu(5, cols);
    const DeviceTensor none = poisoned_on_gpu(0, cols), no_rows = poisoned_on_gpu(0, c.k);
    linear.forward(context, in.view(), out.view(), Precision::Exact);
    linear.forward(context, no_rows.view(), none.view());
    Doubles want;
    for (std::int64_t row = 0; row < 5; ++row) {
      const Doubles y = apply_f64(c.matrices[1], row_f64(x, row, c.k).data());
      for (std::int64_t n = 0; n < cols; ++n) {
        want.push_back(y[static_cast<std::size_t>(first + n)] +
                       static_cast<double>(bias[static_cast<std::size_t>(n)]));
      }
    }
    EXPECT_LE(rel_l2(out.values(), want), kExactBound) << first;
  }
}

TEST_F(CudaPhases, SchedulesDoNotChangeABit) {
  const Checkpoint c = make_checkpoint({.k = 256, .n = 72, .group_size = 64});
  const MarlinExpertStack stack = on_gpu(MarlinExpertStack::from_gptq(c.tensors()));
  const DeviceTensor in = rows_on_gpu(random_values(20 * c.k, 5), c.k);
  Context context = gpu_context();
  Floats first;
  for (const std::uint64_t seed : emulation::seeds()) {
    emulation::options().seed = seed;
    const DeviceTensor out = poisoned_on_gpu(21, c.n);
    stack.gemm_phase_batched(context, in.view(), kDispatches, out.view());
    const Floats got = dispatched_rows(c, kDispatches, out.values());
    if (first.empty()) first = got;
    EXPECT_EQ(got, first) << seed;
  }
}

TEST_F(CudaPhases, StacksMoveThereAndBack) {
  const Checkpoint c = make_checkpoint({});
  const MarlinExpertStack host = MarlinExpertStack::from_gptq(c.tensors());
  const MarlinExpertStack there = on_gpu(host), back = there.to({});
  EXPECT_EQ(host.device(), Device{});
  EXPECT_EQ(back.device(), Device{});
  EXPECT_EQ(back.nbytes(), host.nbytes());
  EXPECT_EQ(there.unpack(1), host.unpack(1));
  EXPECT_GT(there.nbytes(), 0);
  Floats x = random_values(20 * c.k, 5), a = poisoned(21 * c.n), b = a;
  Context cpu;
  host.gemm_phase_batched(cpu, rows_of(x, c.k), kDispatches, rows_of(a, c.n));
  back.gemm_phase_batched(cpu, rows_of(x, c.k), kDispatches, rows_of(b, c.n));
  EXPECT_EQ(dispatched_rows(c, kDispatches, a), dispatched_rows(c, kDispatches, b));
}

/// Calls that need the host, over one small layer: weights, tensors and plans of their own.
struct Calls {
  Checkpoint c = make_checkpoint({.experts = 4, .k = 64, .n = 64});
  MarlinExpertStack marlin = on_gpu(MarlinExpertStack::from_gptq(c.tensors()));
  MarlinLinear linear = marlin.make_expert_linear(2);
  Case shape = {"calls",
                5,
                64,
                32,
                4,
                2,
                QuantType::Q8_0,
                QuantType::Q8_0,
                QuantType::Q8_0,
                RoutingShape::Skipped};
  TestLayer layer{shape};
  ExpertStack stack = layer.stack(&gpu_backend());
  Routing routing = make_routing(shape);
  BucketPlan plan = BucketPlan::build(routing, 4);
  AlignedRouting aligned = AlignedRouting::build(routing, 4, 8, RowSpace::TokenPairs);
  std::vector<MarlinDispatch> dispatches = {{3, 0, 2, 3}};
  DeviceTensor x = rows_on_gpu(random_values(5 * 64, 3), 64);
  DeviceTensor wide = rows_on_gpu(random_values(10 * 64, 4), 64);
  DeviceTensor pairs = poisoned_on_gpu(10, 64), narrow = poisoned_on_gpu(10, 32);
  DeviceTensor tokens = poisoned_on_gpu(5, 64);

  /// Each with the array that it writes.
  std::vector<std::pair<const DeviceTensor*, std::function<void(Context&)>>> all() const {
    return {
        {&pairs,
         [&](Context& k) { marlin.gemm_phase_batched(k, x.view(), dispatches, pairs.view()); }},
        {&pairs,
         [&](Context& k) { marlin.gemm_phase_vllm(k, x.view(), aligned, 2, pairs.view()); }},
        {&tokens, [&](Context& k) { linear.forward(k, x.view(), tokens.view()); }},
        {&narrow,
         [&](Context& k) { expert_gemm(k, stack, Role::Up, x.view(), plan, narrow.view()); }},
        {&pairs, [&](Context& k) { gather_rows(k, x.view(), plan, pairs.view()); }},
        {&tokens, [&](Context& k) { combine(k, wide.view(), plan, routing, tokens.view()); }},
        {&tokens, [&](Context& k) { weighted_sum(k, wide.view(), routing, tokens.view()); }},
    };
  }
};

TEST_F(CudaPhases, CapturesAreRefusedBeforeAnyLaunch) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const Calls calls;
  int index = 0;
  for (const auto& [out, call] : calls.all()) {
    SCOPED_TRACE(index++);
    Context context = gpu_context();
    call(context);
    const Floats want = out->values();
    const EmulatedGpu::Counts before = gpu.counts;
    context.set_stream(EmulatedGpu::capture_stream());
    gpu.begin_capture();
    EXPECT_THROW(call(context), CaptureError);
    EXPECT_TRUE(gpu.end_capture().empty());
    EXPECT_EQ(gpu.counts, before);
    context.set_stream(nullptr);
    gpu_backend().fill(context, {.data = out->bytes.data(),
                                 .bytes = static_cast<std::int64_t>(out->bytes.size()),
                                 .value = 0xFF});
    call(context);  // still usable
    const Floats again = out->values();
    EXPECT_EQ(std::memcmp(again.data(), want.data(), want.size() * sizeof(float)), 0);
  }
}

TEST_F(CudaPhases, WhatNeedsNoHostCanBeCaptured) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const Calls calls;
  const DeviceRouting there(calls.routing);
  const auto call = [&](Context& context) {
    silu_mul(context, calls.wide.view(), calls.narrow.view());
    weighted_sum(context, calls.wide.view(), there.view(), calls.tokens.view());
  };
  Context context = gpu_context();
  call(context);
  const Floats narrow = calls.narrow.values(), tokens = calls.tokens.values();
  const EmulatedGpu::Counts before = gpu.counts;
  context.set_stream(EmulatedGpu::capture_stream());
  gpu.begin_capture();
  call(context);
  const auto graph = gpu.end_capture();
  context.set_stream(nullptr);
  EXPECT_EQ(graph.size(), 2U);
  EXPECT_EQ(gpu.counts.allocations, before.allocations);
  EXPECT_EQ(gpu.counts.waits, before.waits);
  gpu_backend().fill(context, {.data = calls.narrow.bytes.data(),
                               .bytes = static_cast<std::int64_t>(calls.narrow.bytes.size()),
                               .value = 0xFF});
  gpu_backend().fill(context, {.data = calls.tokens.bytes.data(),
                               .bytes = static_cast<std::int64_t>(calls.tokens.bytes.size()),
                               .value = 0xFF});
  for (const auto& launch : graph) launch();
  EXPECT_EQ(calls.narrow.values(), narrow);
  EXPECT_EQ(calls.tokens.values(), tokens);
}

TEST_F(CudaPhases, MemoryThatRunsOutIsAnErrorAndGivenBack) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const Calls calls;
  const std::int64_t live = gpu.live_bytes();
  for (const auto& [out, call] : calls.all()) {
    Context context = gpu_context();
    // Room for the first piece alone, or for nothing.
    for (const std::int64_t room : {0, 60}) {
      gpu.memory_limit = live + room;
      EXPECT_THROW(call(context), OutOfMemoryError);
      EXPECT_EQ(gpu.live_bytes(), live);
    }
    gpu.memory_limit = std::int64_t{1} << 40;
    const int waits = gpu.counts.waits;
    call(context);
    EXPECT_EQ(gpu.live_bytes(), live);
    EXPECT_GT(gpu.counts.waits, waits);  // for the launches that read it
  }
  gpu.memory_limit = live + 100;
  EXPECT_THROW(calls.marlin.make_expert_linear(0), OutOfMemoryError);
  EXPECT_THROW(on_gpu(calls.marlin), OutOfMemoryError);
  gpu.memory_limit = std::int64_t{1} << 40;
  EXPECT_EQ(gpu.live_bytes(), live);
}

TEST_F(CudaPhases, TensorsAndWeightsElsewhere) {
  const Calls calls;
  const MarlinExpertStack host = calls.marlin.to({});
  Context context = gpu_context(), cpu;
  Floats x = random_values(5 * 64, 3), y = poisoned(10 * 64);
  const auto batched = [&](const MarlinExpertStack& stack, Context& where, const TensorView& in,
                           const TensorView& out) {
    stack.gemm_phase_batched(where, in, calls.dispatches, out);
  };
  const TensorView on_host = rows_of(x, 64), y_host = rows_of(y, 64);
  EXPECT_THROW(batched(host, context, calls.x.view(), calls.pairs.view()), DeviceError);
  EXPECT_THROW(batched(calls.marlin, cpu, on_host, y_host), DeviceError);
  EXPECT_THROW(batched(calls.marlin, context, on_host, calls.pairs.view()), DeviceError);
  EXPECT_THROW(batched(calls.marlin, context, calls.x.view(), y_host), DeviceError);
  TensorView other = calls.pairs.view();
  other.device.index = 1;
  EXPECT_THROW(batched(calls.marlin, context, calls.x.view(), other), DeviceError);
  EXPECT_THROW(gather_rows(context, calls.x.view(), calls.plan, other), DeviceError);
  EXPECT_THROW(gather_rows(context, on_host, calls.plan, calls.pairs.view()), DeviceError);
  EXPECT_THROW(combine(context, other, calls.plan, calls.routing, calls.tokens.view()),
               DeviceError);
  EXPECT_THROW(
      expert_gemm(context, calls.stack, Role::Up, on_host, calls.plan, calls.narrow.view()),
      DeviceError);
  EXPECT_THROW(expert_gemm(cpu, calls.stack, Role::Up, on_host, calls.plan, y_host), DeviceError);
  EXPECT_THROW(batched(calls.marlin, context, calls.narrow.view(), calls.pairs.view()), ShapeError);
  EXPECT_THROW(gather_rows(context, calls.wide.view(), calls.plan, calls.pairs.view()), ShapeError);
  batched(calls.marlin, context, calls.x.view(), calls.pairs.view());
}

TEST_F(CudaPhases, GateAndUpMayBePackedToDifferentWidths) {
  // Random groups pad the columns of one role, as act-order of a checkpoint of its own would.
  const Recipe plain{.experts = 3, .k = 256, .n = 64, .group_size = 32};
  Recipe random = plain, down_recipe = plain;
  random.order = Order::Random;
  random.shared_order = false;
  std::swap(down_recipe.k, down_recipe.n);
  const Checkpoint down = make_checkpoint(down_recipe, 3);
  const Case shape = {"widths",
                      9,
                      256,
                      64,
                      3,
                      2,
                      QuantType::INT4,
                      QuantType::INT4,
                      QuantType::INT4,
                      RoutingShape::Skipped};
  const Routing routing = make_routing(shape);
  const Floats x = random_values(9 * 256, 5);
  for (const bool wide_gate : {false, true}) {
    const Checkpoint gate = make_checkpoint(wide_gate ? random : plain, 1);
    const Checkpoint up = make_checkpoint(wide_gate ? plain : random, 2);
    const auto load = [](const Checkpoint& c) { return MarlinExpertStack::from_gptq(c.tensors()); };
    ExpertStack::Parts parts;
    parts.shape = {3, 256, 64};
    parts.gate = load(gate).weights();
    parts.up = load(up).weights();
    parts.down = load(down).weights();
    EXPECT_GT((wide_gate ? parts.gate : parts.up).ref.int4.packed_cols, 256);
    LoadOptions options;
    options.backend = &gpu_backend();
    gpu_backend().prepare(parts, options);
    const ExpertStack stack(std::move(parts));

    Doubles want(x.size());
    for (std::size_t pair = 0; pair < 18; ++pair) {
      const std::int32_t id = routing.topk_ids()[pair];
      if (id < 0) continue;
      const auto e = static_cast<std::size_t>(id);
      const Doubles row = row_f64(x, static_cast<std::int64_t>(pair) / 2, 256);
      const Doubles g = apply_f64(gate.matrices[e], row.data());
      Doubles h = apply_f64(up.matrices[e], row.data());
      for (std::size_t i = 0; i < h.size(); ++i) h[i] *= g[i] / (1.0 + std::exp(-g[i]));
      const Doubles y = apply_f64(down.matrices[e], h.data());
      for (std::size_t i = 0; i < y.size(); ++i) {
        want[pair / 2 * 256 + i] += static_cast<double>(routing.topk_weights()[pair]) * y[i];
      }
    }
    Tuning tuning = exact();
    tuning.poison = true;
    Context context = gpu_context(tuning);
    const DeviceTensor in = rows_on_gpu(x, 256), out = poisoned_on_gpu(9, 256);
    const DeviceRouting given(routing);
    LayerRef layer;
    layer.stack = &stack;
    const ForwardIo io = LayerCase{layer, in.view(), given.view()}.io(out.view());
    // Exactly what is asked for, so that the guards are right behind it.
    Workspace workspace(workspace_bytes(context, layer, 2, 9), gpu_backend());
    for (const GemmMode gemm : {GemmMode::Auto, GemmMode::Bucketed, GemmMode::Aligned}) {
      moe_forward_bucketed(context, layer, io, workspace, gemm);
      EXPECT_LE(rel_l2(out.values(), want), kCpuBound) << wide_gate;
    }
  }
}

}  // namespace
}  // namespace moesaic::testing

// Whole forwards on the emulated CUDA backend: every path, row space and stack against f64;
// captures and their replays; what is refused, and that the library stays usable afterwards.

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <thread>

#include "gpu_forward.hpp"
#include "moesaic/error.hpp"
#include "runtime/emulator.hpp"
#include "seeds.hpp"

namespace moesaic::testing {
namespace {

std::optional<ExpertStack> stack_on_gpu(const TestLayer& layer) {
  try {
    return layer.stack(&gpu_backend());
  } catch (const UnsupportedError&) {
    return std::nullopt;
  }
}

Floats row_floats(const Floats& all, std::size_t row, std::int64_t cols) {
  const auto first = all.begin() + static_cast<std::ptrdiff_t>(row) * cols;
  return Floats(first, first + cols);
}

class CudaForward : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, CudaForward, ::testing::ValuesIn(cases::kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(CudaForward, FastTakesEightBitsOfF32) {
  const Case& c = GetParam();
  const TestLayer layer(c);
  const auto stack = stack_on_gpu(layer);
  if (!stack) GTEST_SKIP() << "a weight type without CUDA kernels";
  LayerRef ref;
  ref.stack = &*stack;
  ref.activation = layer.activation;
  const Routing routing = make_routing(c);
  const DeviceRouting on_gpu(routing);
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const DeviceTensor in(Tensor(DType::F32, c.tokens, c.hidden, x));
  Tuning tuning;
  tuning.precision = Precision::Fast;
  Context context = gpu_context(tuning);
  const DeviceTensor out = run_case(context, {ref, in.view(), on_gpu.view()});
  EXPECT_LE(rel_l2(out.values(), forward_f64(layer, x, routing)), kSixteenBound);
}

TEST_P(CudaForward, EveryWayAgreesWithF64) {
  const Case& c = GetParam();
  const TestLayer layer(c);
  const auto stack = stack_on_gpu(layer);
  if (!stack) GTEST_SKIP() << "a weight type without CUDA kernels";
  LayerRef ref;
  ref.stack = &*stack;
  ref.activation = layer.activation;
  const Routing routing = make_routing(c);
  const DeviceRouting on_gpu(routing);
  Tuning tuning = exact();
  tuning.poison = true;
  Context context = gpu_context(tuning);
  for (const DType dtype : {DType::F32, DType::BF16, DType::F16}) {
    const Tensor host(dtype, c.tokens, c.hidden, random_values(c.tokens * c.hidden, 3));
    const Doubles want = forward_f64(layer, host.values(), routing);
    const DeviceTensor x(host);
    for (const Way& way : kWays) {
      // 16-bit rows differ in the staging alone: once per kind of map.
      if (dtype != DType::F32 && way.row_space == RowSpaceMode::PackedRows) continue;
      SCOPED_TRACE(std::string(name_of(dtype)) + " " + way.name);
      const LayerCase call{.layer = ref, .x = x.view(), .routing = on_gpu.view(), .out = dtype};
      EXPECT_LE(rel_l2(run_case(context, call, way).values(), want),
                dtype == DType::F32 ? kSingleBound : kSixteenBound);
    }
  }
  EXPECT_TRUE(EmulatedGpu::get().guards_untouched());
}

/// A layer with router, biases and a gated shared expert, on the CPU and on the GPU.
struct WholeLayer {
  Case c = {"whole", 13, 128, 64, 8, 3, QuantType::Q4_0, QuantType::Q4_0, QuantType::Q8_0};
  TestLayer experts{c};
  Case one = {"shared", 13, 128, 96, 1, 1, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  TestLayer shared{one, 40};

  MoeLayer make(const Backend* backend) const {
    MoeConfig config;
    config.hidden_size = c.hidden;
    config.intermediate_size = c.intermediate;
    config.num_experts = c.experts;
    config.top_k = c.top_k;
    config.shared = SharedKind::SigmoidGated;
    config.shared_intermediate_size = one.intermediate;
    config.router.num_experts = c.experts;
    config.router.top_k = c.top_k;
    config.router.score = ScoreFunction::Sigmoid;
    config.router.selection_bias = random_values(c.experts, 21, 0.1F);
    MoeLayer::Parts parts;
    parts.stack = std::make_shared<const ExpertStack>(experts.stack(backend));
    parts.router_weight = random_values(c.experts * c.hidden, 22, 0.1F);
    parts.shared.emplace(
        SharedExperts{.stack = shared.stack(backend), .gate = random_values(c.hidden, 23, 0.1F)});
    return MoeLayer(config, std::move(parts));
  }
  Floats expected(const Floats& x) const {
    const MoeLayer layer = make(nullptr);
    return reference_of({layer, rows_of(x, c.hidden)});
  }
};

TEST(CudaLayer, RouterAndSharedExpertsAgreeWithTheCpu) {
  const WholeLayer whole;
  gpu_backend();
  const MoeLayer layer = whole.make(&gpu_backend());
  const Floats x = random_values(whole.c.tokens * whole.c.hidden, 5);
  const Floats want = whole.expected(x);
  const DeviceTensor in(Tensor(DType::F32, whole.c.tokens, whole.c.hidden, x));
  Context context = gpu_context();
  Routing chosen(whole.c.tokens, whole.c.top_k);
  const DeviceRouting received(chosen);
  LayerCase call{layer, in.view()};
  const DeviceTensor out = run_case(context, call, kWays[0], received.view());
  EXPECT_LE(rel_l2(out.values(), want), kSingleBound);
  for (const std::int32_t id : received.ids.host()) {
    EXPECT_GE(id, 0);
    EXPECT_LT(id, whole.c.experts);
  }
  // A narrow output is summed in f32 and rounded once.
  call.out = DType::BF16;
  EXPECT_LE(rel_l2(run_case(context, call).values(), want), kSixteenBound);
}

TEST(CudaLayer, SchedulesDoNotChangeABit) {
  const WholeLayer whole;
  const MoeLayer layer = whole.make(&gpu_backend());
  const DeviceTensor in(Tensor(DType::BF16, whole.c.tokens, whole.c.hidden,
                               random_values(whole.c.tokens * whole.c.hidden, 5)));
  std::optional<Floats> first;
  for (const std::uint64_t seed : emulation::seeds()) {
    emulation::options().seed = seed;
    Context context = gpu_context();
    const Floats got =
        run_case(context, {.layer = layer, .x = in.view(), .out = DType::BF16}).values();
    if (!first) first = got;
    EXPECT_EQ(got, *first) << seed;
  }
  emulation::options().seed = 0;
}

TEST(CudaGraph, ReplaysFollowNewInputs) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const WholeLayer whole;
  const MoeLayer layer = whole.make(&gpu_backend());
  const auto make_input = [&](std::uint32_t seed) {
    return Tensor(DType::F32, whole.c.tokens, whole.c.hidden,
                  random_values(whole.c.tokens * whole.c.hidden, seed));
  };
  const DeviceTensor in(make_input(1)), out(DType::F32, whole.c.tokens, whole.c.hidden);
  Context context = gpu_context();
  Workspace workspace(workspace_bytes(context, layer, whole.c.top_k, whole.c.tokens),
                      gpu_backend());
  const ForwardIo io = LayerCase{layer, in.view()}.io(out.view());

  const EmulatedGpu::Counts before = gpu.counts;
  context.set_stream(EmulatedGpu::capture_stream());
  gpu.begin_capture();
  moe_forward(context, layer, io, workspace);
  const auto graph = gpu.end_capture();
  context.set_stream(nullptr);
  EXPECT_EQ(gpu.refused, "");
  EXPECT_EQ(gpu.counts.allocations, before.allocations);
  EXPECT_EQ(gpu.counts.copies, before.copies);
  EXPECT_EQ(gpu.counts.waits, before.waits);
  EXPECT_GT(graph.size(), 4U);

  for (const std::uint32_t seed : {7U, 8U, 9U}) {
    const Tensor next = make_input(seed);
    gpu_backend().copy(in.bytes.data(), next.bytes.data(), next.bytes.size());
    moe_forward(context, layer, io, workspace);
    const Floats eager = out.values();
    gpu_backend().fill(context, {.data = out.bytes.data(),
                                 .bytes = static_cast<std::int64_t>(out.bytes.size()),
                                 .value = 0xFF});
    for (const auto& launch : graph) launch();
    EXPECT_EQ(out.values(), eager) << seed;
  }
}

TEST(CudaGraph, AnotherThreadLoadsWhileOneRecords) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const WholeLayer whole;
  const MoeLayer layer = whole.make(&gpu_backend());
  const DeviceTensor in(Tensor(DType::F32, whole.c.tokens, whole.c.hidden,
                               random_values(whole.c.tokens * whole.c.hidden, 1)));
  const DeviceTensor out(DType::F32, whole.c.tokens, whole.c.hidden);
  Context context = gpu_context();
  Workspace workspace(workspace_bytes(context, layer, whole.c.top_k, whole.c.tokens),
                      gpu_backend());
  const ForwardIo io = LayerCase{layer, in.view()}.io(out.view());
  context.set_stream(EmulatedGpu::capture_stream());
  gpu.begin_capture();
  moe_forward(context, layer, io, workspace);
  std::optional<MoeLayer> loaded;
  std::thread([&] { loaded.emplace(whole.make(&gpu_backend())); }).join();
  const auto graph = gpu.end_capture();
  EXPECT_EQ(gpu.refused, "");
  ASSERT_GT(graph.size(), 4U);
  for (const auto& launch : graph) launch();
  const Floats want = out.values();
  context.set_stream(nullptr);
  EXPECT_EQ(run_case(context, {*loaded, in.view()}).values(), want);
}

TEST(CudaGraph, WhatNeedsTheHostIsRefusedBeforeAnyLaunch) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const WholeLayer whole;
  MoeLayer layer = whole.make(&gpu_backend());
  const DeviceTensor in(Tensor(DType::F32, whole.c.tokens, whole.c.hidden,
                               random_values(whole.c.tokens * whole.c.hidden, 1)));
  const DeviceTensor out(DType::F32, whole.c.tokens, whole.c.hidden);
  Tuning strict;
  strict.strict = true;
  const Routing host = make_routing(whole.c);
  const DeviceRouting given(host);
  RouterConfig unseen = layer.config().router;
  unseen.selection_bias = random_values(whole.c.experts, 77);
  LayerRef with_unseen(layer);
  with_unseen.router = &unseen;

  const auto refused = [&](const LayerRef& ref, const Tuning& tuning, bool with_routing) {
    Context context = gpu_context(tuning);
    Workspace workspace(workspace_bytes(context, ref, whole.c.top_k, whole.c.tokens),
                        gpu_backend());
    LayerCase call{ref, in.view()};
    if (with_routing) call.routing = given.view();
    const ForwardIo io = call.io(out.view());
    context.set_stream(EmulatedGpu::capture_stream());
    const int launches = gpu.counts.launches;
    gpu.begin_capture();
    EXPECT_THROW(moe_forward(context, ref, io, workspace), CaptureError);
    gpu.end_capture();
    EXPECT_EQ(gpu.counts.launches, launches);
    EXPECT_EQ(gpu.refused, "");
    context.set_stream(nullptr);
    moe_forward(context, ref, io, workspace);  // still usable
  };
  refused(layer, strict, false);
  refused(layer, strict, true);
  refused(with_unseen, exact(), false);
}

TEST(CudaIds, OutOfRangeOnesAreSkippedAndStrictSaysSo) {
  const Case c = {"ids", 6, 64, 32, 4, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const ExpertStack stack = layer.stack(&gpu_backend());
  LayerRef ref;
  ref.stack = &stack;
  Routing skipped = make_routing(c);
  skipped.topk_ids()[3] = -1;
  skipped.topk_ids()[8] = -1;
  Routing wild = skipped;
  wild.topk_ids()[3] = 4;
  wild.topk_ids()[8] = -1'000'000'000;
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Doubles want = forward_f64(layer, x, skipped);
  const DeviceTensor in(Tensor(DType::F32, c.tokens, c.hidden, x));
  const DeviceRouting routing(wild);
  for (const Way& way : kWays) {
    const LayerCase call{ref, in.view(), routing.view()};
    Context context = gpu_context();
    EXPECT_LE(rel_l2(run_case(context, call, way).values(), want), kSingleBound) << way.name;
    Tuning strict;
    strict.strict = true;
    Context checked = gpu_context(strict);
    EXPECT_THROW(run_case(checked, call, way), ShapeError) << way.name;
  }
}

TEST(CudaGemv, BroadcastPerSlotAndBatched) {
  const Case c = {"gemv", 5, 96, 64, 6, 3, QuantType::Q4_0, QuantType::Q4_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const ExpertStack stack = layer.stack(&gpu_backend());
  Context context = gpu_context();
  const std::vector<std::int32_t> ids = {2, -1, 5, 0, 0, 1, 4, 3, -7, 2, 6, 1, 5, 5, 5};
  const DeviceArray<std::int32_t> chosen(gpu_backend(), ids);
  const auto row_of = [](const Floats& x, std::int64_t row, std::int64_t cols) {
    return Doubles(x.begin() + row * cols, x.begin() + (row + 1) * cols);
  };
  const auto matches = [&](const TestRole& role, std::int32_t id, const Doubles& x,
                           const Floats& got) {
    const Doubles want = id >= 0 && id < c.experts ? apply_f64(role, id, x.data())
                                                   : Doubles(static_cast<std::size_t>(got.size()));
    EXPECT_LE(rel_l2(got, want), kSingleBound) << id;
  };

  // One row to all slots, a row for each token, a row for each slot.
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const DeviceArray<float> in(gpu_backend(), x);
  const DeviceArray<float> up(gpu_backend(), c.tokens * c.top_k * c.intermediate);
  const auto up_row = [&](const Floats& all, std::size_t pair) {
    return row_floats(all, pair, c.intermediate);
  };
  expert_gemv(context, stack, Role::Up, ConstTensorView(in.data(), DType::F32, {c.hidden}, kGpu),
              ConstTensorView(chosen.data(), DType::I32, {c.top_k}, kGpu),
              TensorView(up.data(), DType::F32, {c.top_k, c.intermediate}, kGpu));
  for (std::size_t s = 0; s < 3; ++s) {
    matches(layer.up, ids[s], row_of(x, 0, c.hidden), up_row(up.host(), s));
  }
  expert_gemv(context, stack, Role::Gate,
              ConstTensorView(in.data(), DType::F32, {c.tokens, c.hidden}, kGpu),
              ConstTensorView(chosen.data(), DType::I32, {c.tokens, c.top_k}, kGpu),
              TensorView(up.data(), DType::F32, {c.tokens, c.top_k, c.intermediate}, kGpu));
  for (std::size_t p = 0; p < ids.size(); ++p) {
    matches(layer.gate, ids[p], row_of(x, static_cast<std::int64_t>(p) / c.top_k, c.hidden),
            up_row(up.host(), p));
  }
  const Floats h = random_values(c.tokens * c.top_k * c.intermediate, 4);
  const DeviceArray<float> hidden(gpu_backend(), h);
  const DeviceArray<float> down(gpu_backend(), c.tokens * c.top_k * c.hidden);
  expert_gemv(context, stack, Role::Down,
              ConstTensorView(hidden.data(), DType::F32, {c.tokens, c.top_k, c.intermediate}, kGpu),
              ConstTensorView(chosen.data(), DType::I32, {c.tokens, c.top_k}, kGpu),
              TensorView(down.data(), DType::F32, {c.tokens, c.top_k, c.hidden}, kGpu));
  for (std::size_t p = 0; p < ids.size(); ++p) {
    matches(layer.down, ids[p], row_of(h, static_cast<std::int64_t>(p), c.intermediate),
            row_floats(down.host(), p, c.hidden));
  }
  expert_gemv_gate_up(context, stack, layer.activation,
                      ConstTensorView(in.data(), DType::F32, {c.tokens, c.hidden}, kGpu),
                      ConstTensorView(chosen.data(), DType::I32, {c.tokens, c.top_k}, kGpu),
                      TensorView(up.data(), DType::F32, {c.tokens, c.top_k, c.intermediate}, kGpu));
  for (std::size_t p = 0; p < ids.size(); ++p) {
    const Doubles row = row_of(x, static_cast<std::int64_t>(p) / c.top_k, c.hidden);
    const Doubles want = ids[p] >= 0 && ids[p] < c.experts
                             ? hidden_f64(layer, ids[p], row.data())
                             : Doubles(static_cast<std::size_t>(c.intermediate));
    EXPECT_LE(rel_l2(up_row(up.host(), p), want), kSingleBound) << p;
  }

  EmulatedGpu::get().begin_capture();
  context.set_stream(EmulatedGpu::capture_stream());
  EXPECT_THROW(expert_gemv(context, stack, Role::Up,
                           ConstTensorView(in.data(), DType::F32, {c.hidden}, kGpu),
                           ConstTensorView(chosen.data(), DType::I32, {c.top_k}, kGpu),
                           TensorView(up.data(), DType::F32, {c.top_k, c.intermediate}, kGpu)),
               CaptureError);
  EmulatedGpu::get().end_capture();
}

TEST(CudaErrors, TensorsAndWeightsElsewhere) {
  const Case c = {"where", 3, 64, 32, 4, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const ExpertStack on_gpu = layer.stack(&gpu_backend()), on_host = layer.stack();
  Tensor host(DType::F32, c.tokens, c.hidden, random_values(c.tokens * c.hidden, 3));
  const DeviceTensor in(host), out(DType::F32, c.tokens, c.hidden);
  const Routing routing = make_routing(c);
  const DeviceRouting given(routing);
  Context context = gpu_context();
  LayerRef ref;
  ref.stack = &on_gpu;
  ForwardIo io = LayerCase{ref, host.view(), given.view()}.io(out.view());
  EXPECT_THROW(run(context, ref, io, c.top_k), DeviceError);
  io.x = in.view();
  TensorView other = out.view();
  other.device.index = 1;
  io.out = other;
  EXPECT_THROW(run(context, ref, io, c.top_k), DeviceError);
  io.out = out.view();
  ref.stack = &on_host;
  EXPECT_THROW(run(context, ref, io, c.top_k), DeviceError);
  ref.stack = &on_gpu;
  run(context, ref, io, c.top_k);

  Context cpu;
  Tensor y(DType::F32, c.tokens, c.hidden);
  Routing own = routing;
  io.routing = own.view();
  io.x = host.view();
  io.out = y.view();
  Workspace workspace(1 << 20);
  EXPECT_THROW(moe_forward(cpu, ref, io, workspace), DeviceError);
  EXPECT_THROW(moe_forward_cpu(ref, io), Error);
}

TEST(CudaLoad, RefusalsLeaveNothingBehind) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const Case c = {"load", 3, 256, 256, 4, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::IQ2_XS};
  const TestLayer layer(c);
  gpu_backend();
  const std::int64_t live = gpu.live_bytes();
  try {
    layer.stack(&gpu_backend());
    FAIL();
  } catch (const UnsupportedError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("IQ2_XS"), std::string::npos) << text;
    EXPECT_NE(text.find("dequantize"), std::string::npos) << text;
  }
  EXPECT_EQ(gpu.live_bytes(), live);

  Case fits = c;
  fits.down = QuantType::Q8_0;
  const TestLayer whole(fits);
  gpu.memory_limit = live + 300'000;
  EXPECT_THROW(whole.stack(&gpu_backend()), OutOfMemoryError);
  gpu.memory_limit = std::int64_t{1} << 40;
  EXPECT_EQ(gpu.live_bytes(), live);

  ExpertStack::Parts parts = whole.parts();
  LoadOptions file;
  file.layout = StackLayout::File;
  EXPECT_THROW(gpu_backend().prepare(parts, file), UnsupportedError);
  LoadOptions cancelled;
  cancelled.progress = [](const Progress&) { return false; };
  EXPECT_THROW(gpu_backend().prepare(parts, cancelled), OperationCancelled);
  EXPECT_EQ(parts.device, Device{});
  EXPECT_EQ(gpu.live_bytes(), live);
  {
    const ExpertStack stack = whole.stack(&gpu_backend());
    EXPECT_EQ(stack.device(), kGpu);
    EXPECT_GT(gpu.live_bytes(), live);
  }
  EXPECT_EQ(gpu.live_bytes(), live);
}

TEST(CudaDevice, TheCallersContextIsKeptAndNoOtherMade) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const auto other = std::make_shared<const cuda::CudaBackend>(gpu.table(), 2);
  gpu.contexts.clear();
  for (const std::int32_t callers : {-1, 3}) {
    gpu.current_context = callers;
    void* const memory = other->allocate(64);
    Context context(*other, Tuning{}, ThreadPool::shared(1));
    other->fill(context, {.data = memory, .bytes = 64, .value = 1});
    other->deallocate(memory, 64);
    EXPECT_EQ(gpu.current_context, callers);
  }
  gpu.current_context = -1;
  EXPECT_EQ(gpu.contexts, std::set<std::int32_t>{2});
}

TEST(CudaDevice, HostAddressesAreRefusedByTheEmulatedGpu) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  Context context = gpu_context();
  float host = 0.0F;
  EXPECT_THROW(gpu_backend().fill(context, {.data = &host, .bytes = sizeof(host), .value = 0}),
               DeviceError);
  EXPECT_EQ(std::exchange(gpu.refused, ""), "a host address in a launch");
}

TEST(CudaKernels, AreListedAndExplained) {
  EXPECT_FALSE(gpu_backend().kernels().empty());
  const WholeLayer whole;
  const MoeLayer layer = whole.make(&gpu_backend());
  const std::string name = gpu_backend().kernel_name(layer.stack().down().ref, Tuning{});
  EXPECT_NE(name.find("q8_0"), std::string::npos) << name;
  EXPECT_NE(gpu_backend().info().detail.find("Emulated GPU"), std::string::npos);
}

TEST(CudaKernels, OneTokenIsSummedWhereItIsMultiplied) {
  const WholeLayer whole;
  const MoeLayer layer = whole.make(&gpu_backend());
  Tuning tuning = exact();
  tuning.batch_invariant = true;
  Context context = gpu_context(tuning);
  const auto kernel = [&](const std::string& fact, std::int64_t tokens) {
    for (const auto& [name, value] : explain(context, layer, whole.c.top_k, tokens).facts) {
      if (name == fact) return value;
    }
    return std::string();
  };
  EXPECT_EQ(kernel("down kernel", 1), "down_sum_q8_0_mma");
  EXPECT_EQ(kernel("shared down kernel", 1), "down_sum_q8_0_mma");
  EXPECT_EQ(kernel("down kernel", 13), "down_q8_0_mma");
  EXPECT_EQ(kernel("shared down kernel", 13), "down_q8_0_mma");

  // With the bits that the token has among others.
  for (const DType dtype : {DType::F32, DType::BF16}) {
    const Tensor host(dtype, whole.c.tokens, whole.c.hidden,
                      random_values(whole.c.tokens * whole.c.hidden, 5));
    const DeviceTensor in(host);
    const DeviceTensor one(
        Tensor(dtype, 1, whole.c.hidden, row_floats(host.values(), 0, whole.c.hidden)));
    const auto run_of = [&](const DeviceTensor& x) {
      return run_case(context, {.layer = layer, .x = x.view(), .out = dtype}).values();
    };
    EXPECT_EQ(run_of(one), row_floats(run_of(in), 0, whole.c.hidden)) << name_of(dtype);
  }
}

}  // namespace
}  // namespace moesaic::testing

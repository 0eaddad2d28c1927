// Layers with the rarer parts on the emulated CUDA backend: every way against f64, captures, what
// is refused, rows and ids that nobody should meet, and the layers of every architecture.

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <string>

#include "gpu_forward.hpp"
#include "layer_file.hpp"
#include "layer_parts.hpp"
#include "moesaic/error.hpp"
#include "runtime/emulator.hpp"
#include "seeds.hpp"

namespace moesaic::testing {
namespace {

using namespace parts;

/// A batch with its arrays in device memory; x rounded to a type.
struct GpuBatch {
  Batch host;
  DeviceTensor x, separate;
  DeviceArray<std::int32_t> token_ids, topk_ids;

  GpuBatch(const Model& m, std::int64_t tokens, DType dtype = DType::F32)
      : GpuBatch(Batch(m, tokens), dtype) {}
  GpuBatch(Batch batch, DType dtype)
      : host(std::move(batch)),
        x(Tensor(dtype, host.tokens, kHidden, host.x)),
        separate(Tensor(DType::F32, host.tokens, kHidden, host.separate)),
        token_ids(gpu_backend(), host.token_ids),
        topk_ids(gpu_backend(), host.topk_ids) {
    host.x = x.values();
  }

  ForwardIo io(const Model& m, const TensorView& out) {
    ForwardIo io = host.io(m, out);
    io.x = x.view();
    if (io.router_input.data != nullptr) io.router_input = separate.view();
    if (io.token_ids.data != nullptr) {
      io.token_ids = ConstTensorView(token_ids.data(), DType::I32, {host.tokens}, kGpu);
    }
    if (io.routing.topk_ids != nullptr) io.routing.topk_ids = topk_ids.data();
    return io;
  }
};

Tuning exact_poisoned() {
  Tuning tuning = exact();
  tuning.poison = true;
  return tuning;
}

class CudaParts : public ::testing::TestWithParam<Spec> {
 protected:
  void TearDown() override {
    EXPECT_TRUE(EmulatedGpu::get().guards_untouched());
    EXPECT_EQ(EmulatedGpu::get().refused, "");
  }
};
INSTANTIATE_TEST_SUITE_P(Specs, CudaParts, ::testing::ValuesIn(kSpecs),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(CudaParts, EveryWayAgreesWithF64) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer(gpu_backend());
  Context context = gpu_context(exact_poisoned());
  for (const auto& [tokens, dtype] :
       {std::pair{std::int64_t{1}, DType::F32}, {9, DType::F32}, {5, DType::BF16}}) {
    GpuBatch batch(m, tokens, dtype);
    std::vector<Chosen> chosen;
    const Doubles want = batch.host.expected(m, chosen);
    for (const Way& way : kWays) {
      if (dtype != DType::F32 && way.gemm == GemmMode::Aligned) continue;
      SCOPED_TRACE(std::string(way.name) + ", " + std::to_string(tokens) + " tokens of " +
                   name_of(dtype));
      const DeviceTensor y(dtype, tokens, kHidden);
      const DeviceRouting routed(Routing(tokens, kTopK));
      ForwardIo io = batch.io(m, y.view());
      io.routing_out = routed.view();
      run(context, layer, io, kTopK, way);
      EXPECT_LE(rel_l2(y.values(), want), dtype == DType::F32 ? kSingleBound : kSixteenBound);
      const std::vector<std::int32_t> ids = routed.ids.host();
      const Floats weights = routed.weights.host();
      for (std::size_t pair = 0; pair < ids.size(); ++pair) {
        EXPECT_EQ(ids[pair], chosen[pair / kTopK].ids[pair % kTopK]);
        EXPECT_NEAR(static_cast<double>(weights[pair]), chosen[pair / kTopK].weights[pair % kTopK],
                    1e-5);
      }

      // A routing given from outside gives the bits of the layer's own.
      const LayerCase ready{.layer = layer, .x = io.x, .routing = routed.view(), .out = dtype};
      EXPECT_EQ(run_case(context, ready, way).values(), y.values());
    }
  }
}

TEST_P(CudaParts, SchedulesDoNotChangeABit) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer(gpu_backend());
  GpuBatch batch(m, 5);
  std::optional<Floats> first;
  for (const std::uint64_t seed : emulation::seeds()) {
    emulation::options().seed = seed;
    const DeviceTensor y(DType::F32, 5, kHidden);
    Context context = gpu_context(exact_poisoned());
    run(context, layer, batch.io(m, y.view()), kTopK);
    if (!first) first = y.values();
    EXPECT_EQ(y.values(), *first) << seed;
  }
  emulation::options().seed = 0;
}

TEST_P(CudaParts, AreCapturedWithoutACallBeforeAndReplay) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const Model m(GetParam());
  const MoeLayer layer = m.layer(gpu_backend());
  constexpr std::int64_t kTokens = 5;
  GpuBatch batch(m, kTokens);
  const DeviceTensor y(DType::F32, kTokens, kHidden);
  const ForwardIo io = batch.io(m, y.view());
  Context context = gpu_context(exact_poisoned());
  Workspace workspace(workspace_bytes(context, layer, kTopK, kTokens), gpu_backend());

  const EmulatedGpu::Counts before = gpu.counts;
  context.set_stream(EmulatedGpu::capture_stream());
  gpu.begin_capture();
  moe_forward(context, layer, io, workspace);
  const auto graph = gpu.end_capture();
  context.set_stream(nullptr);
  EXPECT_EQ(gpu.counts.allocations, before.allocations);
  EXPECT_EQ(gpu.counts.waits, before.waits);

  for (const std::uint32_t seed : {7U, 8U}) {
    Tensor next(DType::F32, kTokens, kHidden, random_values(kTokens * kHidden, seed));
    gpu_backend().copy(batch.x.bytes.data(), next.bytes.data(), next.bytes.size());
    std::vector<std::int32_t> tokens = batch.host.token_ids;
    std::ranges::rotate(tokens, tokens.begin() + seed % 5);
    gpu_backend().copy(batch.token_ids.data(), tokens.data(), tokens.size() * sizeof tokens[0]);
    moe_forward(context, layer, io, workspace);
    const Floats eager = y.values();
    gpu_backend().fill(context, {.data = y.bytes.data(),
                                 .bytes = static_cast<std::int64_t>(y.bytes.size()),
                                 .value = 0xFF});
    for (const auto& launch : graph) launch();
    EXPECT_EQ(y.values(), eager) << seed;
  }
}

TEST_P(CudaParts, ARowOfNansStaysAlone) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer(gpu_backend());
  Batch batch(m, 6), spoiled = batch;
  std::fill_n(spoiled.x.begin() + 2 * kHidden, kHidden, kPoison);
  std::fill_n(spoiled.separate.begin() + 2 * kHidden, kHidden, kPoison);
  Context context = gpu_context(exact_poisoned());
  const auto forward = [&](const Batch& b) {
    GpuBatch on_gpu(b, DType::F32);
    const DeviceTensor y(DType::F32, b.tokens, kHidden);
    run(context, layer, on_gpu.io(m, y.view()), kTopK);
    return y.values();
  };
  const Floats want = forward(batch), got = forward(spoiled);
  for (std::size_t i = 0; i < want.size(); ++i) {
    const bool nan_row = i / kHidden == 2;
    ASSERT_TRUE(nan_row ? std::isnan(got[i]) : got[i] == want[i]) << i;
  }
}

TEST_P(CudaParts, NoTokens) {
  const Model m(GetParam());
  const MoeLayer layer = m.layer(gpu_backend());
  GpuBatch batch(m, 0);
  const DeviceTensor y(DType::F32, 0, kHidden);
  Context context = gpu_context(exact_poisoned());
  const int launches = EmulatedGpu::get().counts.launches;
  run(context, layer, batch.io(m, y.view()), kTopK);
  EXPECT_EQ(EmulatedGpu::get().counts.launches, launches);
}

/// The call, while its stream records a graph, is refused before anything is launched.
void expect_refused(Context& context, const LayerRef& layer, const ForwardIo& io) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  Workspace workspace(workspace_bytes(context, layer, kTopK, io.x.dim(0)), gpu_backend());
  context.set_stream(EmulatedGpu::capture_stream());
  const int launches = gpu.counts.launches;
  gpu.begin_capture();
  EXPECT_THROW(moe_forward(context, layer, io, workspace), CaptureError);
  gpu.end_capture();
  EXPECT_EQ(gpu.counts.launches, launches);
  EXPECT_EQ(gpu.refused, "");
  context.set_stream(nullptr);
}

TEST(CudaPartsCapture, ValuesThatWereNeverUploadedAreRefused) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  for (const char* name : {"input_norm", "two_norms", "latent_norm", "table"}) {
    SCOPED_TRACE(name);
    Model m(spec_named(name));
    // Values of this test alone, which no other has uploaded.
    for (Floats* values : {&m.router_norm, &m.latent_norm, &m.input_norm}) {
      for (float& v : *values) v *= 1.01F;
    }
    std::ranges::reverse(m.table);
    const MoeLayer pinned = m.layer(gpu_backend());
    const MoeLayer layer = pinned;  // a copy, which has not announced its values
    GpuBatch batch(m, 3);
    const DeviceTensor y(DType::F32, 3, kHidden);
    const ForwardIo io = batch.io(m, y.view());
    Context context = gpu_context(exact_poisoned());  // the poison is launched first
    gpu_backend().before_launches(context, nullptr, {host_values(m.router_weight)}, "test");
    expect_refused(context, layer, io);

    Workspace workspace(workspace_bytes(context, layer, kTopK, 3), gpu_backend());
    moe_forward(context, layer, io, workspace);  // uploads them
    context.set_stream(EmulatedGpu::capture_stream());
    gpu.begin_capture();
    moe_forward(context, layer, io, workspace);
    EXPECT_GT(gpu.end_capture().size(), 3U);
    EXPECT_EQ(gpu.refused, "");
  }
}

TEST(CudaPartsIds, TokensOutsideTheTableGoNowhereAndStrictSaysSo) {
  const Model m(spec_named("table"));
  const MoeLayer layer = m.layer(gpu_backend());
  Batch batch(m, 6);
  batch.token_ids = {0, -1, kVocabulary, 3, 1'000'000'000, -2'000'000'000};
  GpuBatch on_gpu(batch, DType::F32);
  const DeviceTensor y(DType::F32, 6, kHidden);
  const DeviceRouting routed(Routing(6, kTopK));
  ForwardIo io = on_gpu.io(m, y.view());
  io.routing_out = routed.view();
  Context context = gpu_context();
  run(context, layer, io, kTopK);
  const std::vector<std::int32_t> ids = routed.ids.host();
  const Floats weights = routed.weights.host();
  for (std::size_t pair = 0; pair < ids.size(); ++pair) {
    const std::size_t token = pair / kTopK;
    const bool known = token == 0 || token == 3;
    EXPECT_EQ(ids[pair] >= 0, known) << pair;
    EXPECT_EQ(weights[pair] > 0.0F, known) << pair;
  }
  for (const float v : y.values()) EXPECT_TRUE(std::isfinite(v));

  Tuning strict = exact();
  strict.strict = true;
  Context checked = gpu_context(strict);
  try {
    run(checked, layer, io, kTopK);
    FAIL();
  } catch (const ShapeError& error) {
    EXPECT_NE(std::string(error.what()).find("token_ids[1]"), std::string::npos) << error.what();
  }
  expect_refused(checked, layer, io);
}

/// Ids of a ready routing that are no experts and no identity experts count as -1.
TEST(CudaPartsIds, OutOfRangeOnesAreSkipped) {
  for (const char* name : {"identity", "identity_shared_input", "everything"}) {
    const Model m(spec_named(name));
    const std::int32_t all = kExperts + m.spec.identity;
    const MoeLayer layer = m.layer(gpu_backend()), on_host = m.layer();
    const std::int64_t tokens = 7;
    Batch batch(m, tokens);
    Routing wild(tokens, kTopK), skipped(tokens, kTopK);
    for (std::size_t pair = 0; pair < wild.topk_ids().size(); ++pair) {
      const auto id = static_cast<std::int32_t>(pair * 5 % static_cast<std::size_t>(all + 2)) - 1;
      wild.topk_ids()[pair] = id == all ? 1'000'000'000 : id;
      skipped.topk_ids()[pair] = id >= all ? -1 : id;
      wild.topk_weights()[pair] = skipped.topk_weights()[pair] =
          0.1F + static_cast<float>(pair % 4);
    }
    const Floats want = reference_of({on_host, rows_of(batch.x, kHidden), skipped.view()});

    GpuBatch on_gpu(batch, DType::F32);
    const DeviceRouting given(wild);
    Context context = gpu_context(exact_poisoned());
    for (const Way& way : kWays) {
      const LayerCase call{layer, on_gpu.x.view(), given.view()};
      EXPECT_LE(rel_l2(run_case(context, call, way).values(), want), kSingleBound)
          << name << ", " << way.name;
    }
  }
}

TEST(CudaPresets, EveryArchitectureRunsAsOnTheCpu) {
  LoadOptions to_gpu;
  to_gpu.backend = &gpu_backend();
  for (const Preset& preset : presets()) {
    if (!preset.missing.empty()) continue;
    SCOPED_TRACE(preset.architecture);
    test::FileBuilder builder = test::file_of(preset);
    const test::OpenFile open(builder);
    const MoeLayer on_cpu = MoeLayer::from_gguf(open.file, 1);
    const MoeLayer on_gpu = MoeLayer::from_gguf(open.file, 1, to_gpu);
    const MoeConfig& config = on_cpu.config();
    constexpr std::int64_t kTokens = 3;
    Tensor x(DType::F32, kTokens, config.hidden_size,
             random_values(kTokens * config.hidden_size, 3));
    const DeviceTensor in(x);
    LayerCase host{on_cpu, x.view()}, device{on_gpu, in.view()};
    if (config.router_input == RouterInput::Separate) {
      host.router_input = host.x;
      device.router_input = device.x;
    }
    Context context = gpu_context(exact_poisoned());
    EXPECT_LE(rel_l2(run_case(context, device).values(), reference_of(host)), kSingleBound);
  }
}

TEST(CudaPresets, HashLayersFindExpertsByToken) {
  Preset preset = *std::ranges::find(presets(), "deepseek4", &Preset::architecture);
  preset.selection_bias = Use::Optional;
  test::FileBuilder builder = test::file_of(preset).u32("hash_layer_count", 2);
  const std::vector<std::int32_t> table{0, 1, 2, 3, 1, 0};
  builder.writer.tensor("blk.1.ffn_gate_tid2eid.weight", {2, 3},
                        static_cast<std::uint32_t>(QuantType::I32),
                        {reinterpret_cast<const char*>(table.data()), table.size() * 4});
  const test::OpenFile open(builder);
  LoadOptions to_gpu;
  to_gpu.backend = &gpu_backend();
  const MoeLayer on_cpu = MoeLayer::from_gguf(open.file, 1);
  const MoeLayer on_gpu = MoeLayer::from_gguf(open.file, 1, to_gpu);
  constexpr std::int64_t kTokens = 4;
  const std::int64_t hidden = on_cpu.config().hidden_size;
  std::vector<std::int32_t> tokens{2, 0, 1, 1};
  Tensor x(DType::F32, kTokens, hidden, random_values(kTokens * hidden, 3));
  const DeviceTensor in(x);
  const DeviceArray<std::int32_t> token_ids(gpu_backend(), tokens);
  LayerCase host{on_cpu, x.view()}, device{on_gpu, in.view()};
  host.token_ids = ConstTensorView(tokens.data(), DType::I32, {kTokens});
  device.token_ids = ConstTensorView(token_ids.data(), DType::I32, {kTokens}, kGpu);
  Context context = gpu_context(exact_poisoned());
  EXPECT_LE(rel_l2(run_case(context, device).values(), reference_of(host)), kSingleBound);
}

TEST(CudaProfile, ZonesWaitForTheDeviceWhenAsked) {
  EmulatedGpu& gpu = EmulatedGpu::get();
  const Model m(spec_named("everything"));
  const MoeLayer layer = m.layer(gpu_backend());
  GpuBatch batch(m, 5);
  const DeviceTensor y(DType::F32, 5, kHidden);
  const ForwardIo io = batch.io(m, y.view());
  Context context = gpu_context();
  Workspace workspace(workspace_bytes(context, layer, kTopK, 5), gpu_backend());
  const auto zones_of = [](const Profiler& profiler) {
    std::int64_t calls = 0;
    for (int z = 0; z < static_cast<int>(Zone::Count); ++z) {
      calls += profiler.zone(static_cast<Zone>(z)).calls;
    }
    return calls;
  };

  Profiler events(true), waiting(true, true), captured(true, true);
  int waits = gpu.counts.waits;
  context.attach(&events);
  moe_forward(context, layer, io, workspace);
  EXPECT_EQ(gpu.counts.waits, waits);
  EXPECT_GE(zones_of(events), 5);

  context.attach(&waiting);
  moe_forward(context, layer, io, workspace);
  EXPECT_EQ(gpu.counts.waits - waits, zones_of(waiting));
  EXPECT_EQ(zones_of(waiting), zones_of(events) + 1);
  EXPECT_EQ(waiting.zone(Zone::Sync).calls, 1);
  for (const Zone zone : {Zone::Router, Zone::Route, Zone::GateUp, Zone::Down, Zone::Shared}) {
    EXPECT_GE(waiting.zone(zone).calls, 1) << name_of(zone);
  }
  EXPECT_EQ(waiting.counter(Counter::Tokens), 5);

  waits = gpu.counts.waits;
  context.attach(&captured);
  context.set_stream(EmulatedGpu::capture_stream());
  gpu.begin_capture();
  moe_forward(context, layer, io, workspace);
  gpu.end_capture();
  EXPECT_EQ(gpu.refused, "");
  EXPECT_EQ(gpu.counts.waits, waits);
  EXPECT_EQ(zones_of(captured), zones_of(waiting));
}

}  // namespace
}  // namespace moesaic::testing

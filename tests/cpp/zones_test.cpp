// What a profile shows is so: every zone is opened by some call, counters count once. And the knob
// `route`, whose copies have zones of their own.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>

#include "fake_backend.hpp"
#include "layers.hpp"
#include "moesaic/error.hpp"
#include "moesaic/offload.hpp"
#include "offload_file.hpp"

namespace moesaic::testing {
namespace {

/// A device whose memory the test can read.
class FakeGpu : public FakeBackend {
 public:
  bool recording = false;
  mutable int waits = 0;

  DeviceType device_type() const override { return DeviceType::Metal; }
  bool capturing(const Context&) const override { return recording; }
  Support supports_part(LayerPart) const override { return {}; }
  void synchronize(Context&) const override { ++waits; }
  void prepare(ExpertStack::Parts& parts, const LoadOptions&) const override {
    parts.device = device();
  }
};

/// A layer with a router and a shared expert, and one batch for it.
struct Batch {
  Case shape{"zones", 6, 64, 96, 5, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  TestLayer layer{shape}, shared_layer{shared_shape(shape), 31};
  RouterConfig router;
  Floats router_weight = random_values(shape.experts * shape.hidden, 41);
  Floats x = random_values(shape.tokens * shape.hidden, 3);

  Batch() {
    router.num_experts = shape.experts;
    router.top_k = shape.top_k;
  }
  static Case shared_shape(Case c) {
    c.experts = c.top_k = 1;
    return c;
  }

  /// The output; `change` sees the call before it runs.
  Floats run(Context& context, const std::function<void(ForwardIo&)>& change = {}) {
    const Backend& backend = context.backend();
    const ExpertStack stack = layer.stack(&backend);
    const SharedExperts shared{shared_layer.stack(&backend), {}};
    LayerRef ref;
    ref.stack = &stack;
    ref.router = &router;
    ref.router_weight = &router_weight;
    ref.activation = layer.activation;
    ref.shared = &shared;
    Tensor in(DType::F32, shape.tokens, shape.hidden, x),
        out(DType::F32, shape.tokens, shape.hidden);
    ForwardIo io;
    io.x = in.view();
    io.out = out.view();
    io.x.device = io.out.device = backend.device();
    if (change) change(io);
    Workspace workspace(workspace_bytes(context, ref, shape.top_k, shape.tokens), backend);
    moe_forward(context, ref, io, workspace);
    return out.values();
  }
};

Context context_of(const Backend& backend, RouteMode route = RouteMode::Auto) {
  Tuning tuning;
  tuning.route = route;
  tuning.gemm = GemmMode::Aligned;
  tuning.row_space = RowSpaceMode::PackedRows;
  return {backend, tuning, ThreadPool::shared(1)};
}

using Zones = std::set<Zone>;

Zones opened(const Profiler& profiler) {
  Zones zones;
  for (std::size_t z = 0; z < static_cast<std::size_t>(Zone::Count); ++z) {
    if (profiler.zone(static_cast<Zone>(z)).calls > 0) zones.insert(static_cast<Zone>(z));
  }
  return zones;
}

std::string names_of(const Zones& zones) {
  std::string names;
  for (const Zone zone : zones) names += std::string(name_of(zone)) + " ";
  return names;
}

Zones zones_of_a_whole_layer() {
  const FakeBackend backend;
  Context context = context_of(backend);
  Profiler profiler(false, true);
  context.attach(&profiler);
  Batch().run(context);
  return opened(profiler);
}

Zones zones_of_a_host_route() {
  const FakeGpu gpu;
  Context context = context_of(gpu, RouteMode::Host);
  Profiler profiler;
  context.attach(&profiler);
  Batch().run(context);
  return opened(profiler);
}

Zones zones_of_staged_experts() {
  const OffloadSpec spec{"zones", QuantType::Q8_0, QuantType::Q8_0};
  const OffloadFile file(spec);
  ExpertPoolConfig config;
  config.num_experts = spec.experts;
  config.budget = 2;
  LoadOptions options;
  options.backend = &backend_for(Device{});
  const auto store = MoeExpertStore::from_gguf(file.open());
  const MoeLayer layer =
      store->make_layer(0, std::make_shared<ExpertPool>(config), OnMiss::Stage, options);
  Context context(*options.backend, Tuning{}, ThreadPool::shared(1));
  Profiler profiler;
  context.attach(&profiler);
  Tensor in(DType::F32, 4, spec.hidden, random_values(4 * spec.hidden, 3));
  Tensor out(DType::F32, 4, spec.hidden);
  ForwardIo io;
  io.x = in.view();
  io.out = out.view();
  Workspace workspace(workspace_bytes(context, layer, spec.top_k, 4));
  moe_forward(context, layer, io, workspace);
  return opened(profiler);
}

TEST(Zones, EachIsOpenedByACall) {
  struct Opener {
    const char* call;
    Zones (*run)();
    Zones expected;
  };
  const Opener openers[] = {
      {"a whole layer",
       zones_of_a_whole_layer,
       {Zone::Sync, Zone::Router, Zone::Route, Zone::Plan, Zone::Align, Zone::Gather, Zone::GateUp,
        Zone::Activate, Zone::Down, Zone::Combine, Zone::Shared}},
      {"a host route", zones_of_a_host_route, {Zone::Download, Zone::Route, Zone::Upload}},
      {"staged experts", zones_of_staged_experts, {Zone::Upload}},
  };
  Zones expected;
  for (const Opener& opener : openers) {
    const Zones zones = opener.run();
    for (const Zone zone : opener.expected) {
      EXPECT_TRUE(zones.contains(zone)) << opener.call << " opens " << names_of(zones);
      expected.insert(zone);
    }
  }
  for (std::size_t z = 0; z < static_cast<std::size_t>(Zone::Count); ++z) {
    const auto zone = static_cast<Zone>(z);
    EXPECT_TRUE(expected.contains(zone)) << "no call above opens " << name_of(zone);
  }
}

TEST(Counters, CountTheExpertsOfAForwardOnce) {
  const Backend& cpu = backend_for(Device{});
  const FakeBackend fake;
  for (const Backend* backend : {&cpu, static_cast<const Backend*>(&fake)}) {
    Batch batch;
    Routing routing(batch.shape.tokens, batch.shape.top_k);
    for (std::size_t pair = 0; pair < routing.topk_ids().size(); ++pair) {
      routing.topk_ids()[pair] = pair % 2 == 0 ? 1 : 4;
      routing.topk_weights()[pair] = 0.5F;
    }
    const std::int64_t routed = batch.layer.stack(backend).bytes_per_expert();
    const std::int64_t shared = batch.shared_layer.stack(backend).nbytes();
    for (const GemmMode gemm : {GemmMode::Auto, GemmMode::Aligned}) {
      Tuning tuning;
      tuning.gemm = gemm;
      Context context(*backend, tuning, ThreadPool::shared(1));
      Profiler profiler;
      context.attach(&profiler);
      batch.run(context, [&](ForwardIo& io) { io.routing = routing.view(); });
      EXPECT_EQ(profiler.counter(Counter::ExpertsTouched), 2) << backend->info().name;
      EXPECT_EQ(profiler.counter(Counter::WeightBytes), 2 * routed + shared)
          << backend->info().name;
    }
  }
}

TEST(RouteModes, HostAndDeviceAgreeBitForBit) {
  const FakeGpu gpu;
  Batch batch;
  const Case& c = batch.shape;
  const std::int64_t stride = c.experts + 3;
  Floats logits = random_values(c.tokens * stride, 17);
  logits[static_cast<std::size_t>(stride)] = std::numeric_limits<float>::infinity();
  for (const bool own_logits : {true, false}) {
    Floats outputs[2];
    Routing routings[2] = {{c.tokens, c.top_k}, {c.tokens, c.top_k}};
    for (const bool host : {false, true}) {
      Context context = context_of(gpu, host ? RouteMode::Host : RouteMode::Device);
      Profiler profiler;
      context.attach(&profiler);
      const int waits = gpu.waits;
      outputs[host] = batch.run(context, [&](ForwardIo& io) {
        io.routing_out = routings[host].view();
        if (own_logits) return;
        io.logits = ConstTensorView(logits.data(), DType::F32, {c.tokens, c.experts}, gpu.device());
        io.logits.strides[0] = stride;
      });
      EXPECT_EQ(gpu.waits - waits, host ? 2 : 0);
      EXPECT_EQ(profiler.zone(Zone::Download).calls, host);
      EXPECT_EQ(profiler.zone(Zone::Route).calls, 1);
      EXPECT_EQ(profiler.counter(Counter::NonfiniteRows), own_logits ? 0 : 1);
    }
    EXPECT_EQ(outputs[0], outputs[1]);
    EXPECT_TRUE(std::ranges::equal(routings[0].topk_ids(), routings[1].topk_ids()));
    EXPECT_TRUE(std::ranges::equal(routings[0].topk_weights(), routings[1].topk_weights()));
  }
}

TEST(RouteModes, TheHostWeighsIdsThatWereGiven) {
  const FakeGpu gpu;
  Batch batch;
  batch.router.select_on = SelectOn::Given;
  const Routing given = make_routing(batch.shape);
  Floats outputs[2];
  for (const bool host : {false, true}) {
    Context context = context_of(gpu, host ? RouteMode::Host : RouteMode::Auto);
    Routing ids = given;
    outputs[host] = batch.run(context, [&](ForwardIo& io) {
      io.routing = ids.view();
      io.routing.topk_weights = nullptr;
    });
  }
  EXPECT_EQ(outputs[0], outputs[1]);
}

TEST(RouteModes, WhatCannotBeHadIsAnError) {
  Batch batch;
  Context on_cpu = context_of(backend_for(Device{}), RouteMode::Device);
  EXPECT_THROW(batch.run(on_cpu), ConfigError);
  Routing routing = make_routing(batch.shape);
  EXPECT_NO_THROW(batch.run(on_cpu, [&](ForwardIo& io) { io.routing = routing.view(); }))
      << "nothing is routed";

  FakeGpu gpu;
  gpu.recording = true;
  Context context = context_of(gpu, RouteMode::Host);
  EXPECT_THROW(batch.run(context), CaptureError);
  EXPECT_NO_THROW(batch.run(context, [&](ForwardIo& io) { io.routing = routing.view(); }));
}

}  // namespace
}  // namespace moesaic::testing

// The whole Metal way, host and kernels: decode, batched decode and prefill of every format against
// f64, how commands are recorded, and what the driver's errors become.

#include <gtest/gtest.h>

#include <string>

#include "gguf_writer.hpp"
#include "metal_fixture.hpp"
#include "moesaic/forward.hpp"

namespace moesaic::testing {
namespace {

/// Sums in f32, in another order than f64.
constexpr double kF32Bound = 1e-5;
/// Inputs and weights rounded to half tiles (10 bits), sums in f32.
constexpr double kHalfBound = 2e-3;

constexpr QuantType kFormats[] = {QuantType::Q4_K, QuantType::Q5_K, QuantType::Q6_K,
                                  QuantType::Q8_0, QuantType::Q4_0, QuantType::MXFP4,
                                  QuantType::F16};

Case case_of(QuantType type, std::int64_t tokens) {
  Case c{"metal", tokens, 256, 256, 4, 2, type, type, type};
  if (traits(type).block_elems == 32) c.hidden = 96, c.intermediate = 160;
  if (traits(type).block_elems == 1) c.hidden = 37, c.intermediate = 71;
  return c;
}

class MetalForward : public MetalTest {
 protected:
  struct Result {
    Floats y;
    std::vector<std::int32_t> ids;
  };

  /// From logits to output, waiting at the end.
  Result forward(const TestLayer& layer, const ExpertStack& stack, const RouterConfig& router,
                 const Floats& x, const Floats& logits, const Tuning& tuning) {
    Context context = this->context(tuning);
    const std::int64_t tokens = static_cast<std::int64_t>(x.size()) / layer.shape.hidden;
    LayerRef ref;
    ref.stack = &stack;
    ref.router = &router;
    ref.activation = layer.activation;
    const auto bytes = workspace_bytes(context, ref, router.top_k, tokens);
    const auto memory = poisoned<std::byte>(static_cast<std::int64_t>(bytes));
    Workspace workspace(memory.data(), bytes);
    const auto in = array(x), scores = array(logits);
    const auto y = poisoned<float>(tokens * layer.shape.hidden);
    const auto ids = poisoned<std::int32_t>(tokens * router.top_k);
    const auto weights = poisoned<float>(tokens * router.top_k);
    ForwardIo io;
    io.x = ConstTensorView(in.data(), DType::F32, {tokens, layer.shape.hidden}, device());
    io.logits = ConstTensorView(scores.data(), DType::F32, {tokens, layer.shape.experts}, device());
    io.out = TensorView(y.data(), DType::F32, {tokens, layer.shape.hidden}, device());
    io.routing_out = {ids.data(), weights.data(), tokens, router.top_k};
    moe_forward(context, ref, io, workspace);
    backend().synchronize(context);
    return {y.host(), ids.host()};
  }

  static RouterConfig router_of(const Case& c) {
    RouterConfig router;
    router.num_experts = c.experts;
    router.top_k = c.top_k;
    return router;
  }
  static Routing route_on_host(const Case& c, const Floats& logits) {
    Routing routing;
    route(ConstTensorView(logits.data(), DType::F32, {c.tokens, c.experts}), router_of(c), routing);
    return routing;
  }
  static double bound(Precision precision) {
    return precision == Precision::Fast ? kHalfBound : kF32Bound;
  }
};

TEST_F(MetalForward, EveryFormatAndPathAgreesWithF64) {
  struct Way {
    std::int64_t tokens;
    GemmMode gemm;
    RowSpaceMode row_space;
    Precision precision;
  };
  // Decode, batched decode (GEMV over buckets), prefill (indirect grid, f32 and half), aligned.
  const Way ways[] = {
      {1, GemmMode::Auto, RowSpaceMode::Auto, Precision::Exact},
      {4, GemmMode::Auto, RowSpaceMode::Auto, Precision::Exact},
      {17, GemmMode::Auto, RowSpaceMode::Auto, Precision::Exact},
      {17, GemmMode::Auto, RowSpaceMode::PackedRows, Precision::Fast},
      {5, GemmMode::Aligned, RowSpaceMode::TokenPairs, Precision::Exact},
      {5, GemmMode::Aligned, RowSpaceMode::PackedRows, Precision::Fast},
  };
  for (const QuantType type : kFormats) {
    const TestLayer layer(case_of(type, 1));
    const ExpertStack stack = layer.stack(&backend());
    for (const Way& way : ways) {
      SCOPED_TRACE(std::string(traits(type).name) + ", " + std::to_string(way.tokens) + " tokens");
      Case c = layer.shape;
      c.tokens = way.tokens;
      const Floats x = random_values(c.tokens * c.hidden, 3);
      const Floats logits = random_values(c.tokens * c.experts, 4);
      const Routing routing = route_on_host(c, logits);
      Tuning tuning;
      tuning.gemm = way.gemm;
      tuning.row_space = way.row_space;
      tuning.precision = way.precision;
      const Result got = forward(layer, stack, router_of(c), x, logits, tuning);
      EXPECT_TRUE(std::ranges::equal(got.ids, routing.topk_ids()));
      EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, routing)), bound(way.precision));
    }
  }
}

// Top-k, buckets, tiles and grid are all made on the device and compared with the host's, for
// routings that leave experts empty or overfull (64 tokens: two full tiles), and must be the same
// in every order in which threads may run.
TEST_F(MetalForward, DevicePrefillIsTheHostsPrefill) {
  for (const int shape : {0, 1, 2, 3}) {
    Case c{"prefill", 64, 64, 96, 6, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
    const TestLayer layer(c);
    const ExpertStack stack = layer.stack(&backend());
    const Floats x = random_values(c.tokens * c.hidden, 3);
    Floats logits = random_values(c.tokens * c.experts, 5);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const std::size_t e = i % static_cast<std::size_t>(c.experts);
      if (shape == 1 && e == 5) logits[i] += 100.0F;           // all to one
      if (shape == 2 && e >= 2) logits[i] -= 100.0F;           // most experts empty
      if (shape == 3) logits[i] = static_cast<float>(e == 1);  // ties
    }
    const Routing routing = route_on_host(c, logits);
    const Doubles want = forward_f64(layer, x, routing);
    Floats first;
    for (const std::uint64_t seed : emulation::seeds()) {
      SCOPED_TRACE("shape " + std::to_string(shape) + ", seed " + std::to_string(seed));
      emulation::options().seed = seed;
      const long indirect = fake_metal::counters().indirect;
      Tuning tuning;
      tuning.precision = Precision::Exact;
      const Result got = forward(layer, stack, router_of(c), x, logits, tuning);
      EXPECT_EQ(fake_metal::counters().indirect - indirect, 3) << "gate, up and down";
      EXPECT_TRUE(std::ranges::equal(got.ids, routing.topk_ids()));
      EXPECT_LE(rel_l2(got.y, want), kF32Bound);
      if (first.empty()) first = got.y;
      EXPECT_EQ(got.y, first) << "the result depends on the order of threads";
    }
  }
}

TEST_F(MetalForward, UnfusedAndUngatedLayersWithEpilogue) {
  Case mixed{"mixed", 2, 96, 64, 5, 2, QuantType::F16, QuantType::Q8_0, QuantType::Q4_0};
  Case biased{"biased", 11, 96, 64, 5, 3, QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4};
  biased.activation = ActivationKind::SwiGluOai;
  biased.epilogue = true;
  Case ungated{"ungated", 3, 64, 96, 5, 2, QuantType::F16, QuantType::Q8_0, QuantType::Q8_0};
  ungated.activation = ActivationKind::ReluSquared;
  ungated.epilogue = true;
  for (const Case& c : {mixed, biased, ungated}) {
    for (const std::int64_t tokens : {std::int64_t{1}, c.tokens, std::int64_t{30}}) {
      SCOPED_TRACE(std::string(c.name) + ", " + std::to_string(tokens) + " tokens");
      Case sized = c;
      sized.tokens = tokens;
      const TestLayer layer(sized);
      const ExpertStack stack = layer.stack(&backend());
      const Floats x = random_values(tokens * c.hidden, 3);
      const Floats logits = random_values(tokens * c.experts, 4);
      Tuning tuning;
      tuning.precision = Precision::Exact;
      const Result got = forward(layer, stack, router_of(sized), x, logits, tuning);
      EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, route_on_host(sized, logits))), kF32Bound);
    }
  }
}

// One row for all slots, a row per slot, tokens with slots, and views with strides: one operation.
TEST_F(MetalForward, NamedGemvsFollowTheirStrides) {
  Case c{"gemv", 3, 64, 96, 5, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const ExpertStack stack = layer.stack(&backend());
  Context context = this->context();
  const std::vector<std::int32_t> chosen{4, 1, -1, 0, 2, 2};
  const auto ids = array(chosen);
  const Floats values = random_values(6 * 80, 3);
  const auto memory = array(values);
  struct Form {
    std::int64_t tokens, outer, inner;  // strides of x [tokens, 2, H] in elements
  };
  for (const Form& form : {Form{1, 0, 0}, Form{1, 0, 80}, Form{3, 160, 80}, Form{3, 70, 0}}) {
    const std::int64_t pairs = form.tokens * 2;
    ConstTensorView x(memory.data(), DType::F32, {form.tokens, 2, c.hidden}, device());
    x.strides = {form.outer, form.inner, 1, 0};
    const ConstTensorView slots(ids.data(), DType::I32, {form.tokens, 2}, device());
    const auto up = poisoned<float>(pairs * c.intermediate);
    const auto hidden = poisoned<float>(pairs * c.intermediate);
    const auto view = [&](const DeviceArray<float>& out) {
      return TensorView(out.data(), DType::F32, {form.tokens, 2, c.intermediate}, device());
    };
    expert_gemv(context, stack, Role::Up, x, slots, view(up));
    expert_gemv_gate_up(context, stack, layer.activation, x, slots, view(hidden));
    backend().synchronize(context);
    Doubles want_up, want_hidden;
    for (std::int64_t p = 0; p < pairs; ++p) {
      const float* row = values.data() + p / 2 * form.outer + p % 2 * form.inner;
      const Doubles in(row, row + c.hidden);
      const std::int32_t e = chosen[static_cast<std::size_t>(p)];
      const Doubles zeros(static_cast<std::size_t>(c.intermediate));
      const Doubles u = e < 0 ? zeros : apply_f64(layer.up, e, in.data());
      const Doubles h = e < 0 ? zeros : hidden_f64(layer, e, in.data());
      want_up.insert(want_up.end(), u.begin(), u.end());
      want_hidden.insert(want_hidden.end(), h.begin(), h.end());
    }
    EXPECT_LE(rel_l2(up.host(), want_up), kF32Bound) << form.outer << " " << form.inner;
    EXPECT_LE(rel_l2(hidden.host(), want_hidden), kF32Bound) << form.outer << " " << form.inner;
  }
}

TEST_F(MetalForward, OneCommandBufferThatRunsWhenWaitedFor) {
  const TestLayer layer(case_of(QuantType::Q8_0, 3));
  const ExpertStack stack = layer.stack(&backend());
  const Case& c = layer.shape;
  const RouterConfig router = router_of(c);
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Floats logits = random_values(c.tokens * c.experts, 4);
  forward(layer, stack, router, x, logits, {});
  const long buffers = fake_metal::counters().command_buffers;
  const long pipelines = fake_metal::counters().pipelines;
  forward(layer, stack, router, x, logits, {});
  EXPECT_EQ(fake_metal::counters().command_buffers - buffers, 1);
  EXPECT_EQ(fake_metal::counters().pipelines, pipelines) << "kernels are compiled once";
  EXPECT_EQ(fake_metal::counters().libraries, 1);
}

TEST_F(MetalForward, StrictAndProfiledCallsCountNonfiniteRows) {
  const TestLayer layer(case_of(QuantType::Q8_0, 3));
  const ExpertStack stack = layer.stack(&backend());
  const Case& c = layer.shape;
  const Floats x = random_values(c.tokens * c.hidden, 3);
  Floats logits = random_values(c.tokens * c.experts, 4);
  logits[1] = kPoison;
  Tuning strict;
  strict.strict = true;
  EXPECT_THROW(forward(layer, stack, router_of(c), x, logits, strict), Error);
  const Result got = forward(layer, stack, router_of(c), x, logits, {});
  EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, route_on_host(c, logits))), kF32Bound);
}

TEST_F(MetalForward, WeightsOfAMappedFileAreNotCopied) {
  Case c{"file", 2, 64, 96, 3, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  test::GgufWriter writer;
  const auto add = [&](const char* name, const TestRole& role) {
    const WeightRef& ref = role.weights.ref;
    writer.tensor(name, {ref.cols, ref.rows, ref.num_experts}, static_cast<std::uint32_t>(ref.type),
                  {reinterpret_cast<const char*>(role.bytes->data()), role.bytes->size()});
  };
  add("blk.0.ffn_gate_exps.weight", layer.gate);
  add("blk.0.ffn_up_exps.weight", layer.up);
  add("blk.0.ffn_down_exps.weight", layer.down);
  const test::TempDir folder;
  const auto path = folder.write("experts.gguf", writer.bytes());
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Floats logits = random_values(c.tokens * c.experts, 4);
  const Doubles want = forward_f64(layer, x, route_on_host(c, logits));

  for (const bool refuses : {false, true}) {
    fake_metal::faults().no_mapping = refuses;
    const long mapped = fake_metal::counters().mapped_bytes;
    LoadOptions options;
    options.backend = &backend();
    const ExpertStack stack = ExpertStack::open_and_load(path, 0, options);
    EXPECT_EQ(fake_metal::counters().mapped_bytes > mapped, !refuses);
    for (const RoleReport& role : stack.report().roles) {
      EXPECT_EQ(role.decision, refuses ? "copied" : "mapped");
    }
    EXPECT_EQ(stack.device().type, DeviceType::Metal);
    EXPECT_LE(rel_l2(forward(layer, stack, router_of(c), x, logits, {}).y, want), kF32Bound);
  }
}

using MetalErrors = MetalForward;

TEST_F(MetalErrors, AnAbsentDeviceSaysWhy) {
  fake_metal::faults().no_device = true;
  EXPECT_EQ(metal::create_backend()->info().reason, "this machine has no Metal device");
  fake_metal::faults() = {};
  fake_metal::faults().no_default_device = true;
  EXPECT_TRUE(metal::create_backend()->info().available) << "one without a window is as good";
  fake_metal::faults() = {};
  fake_metal::faults().old_device = true;
  const BackendInfo old = metal::create_backend()->info();
  EXPECT_FALSE(old.available);
  EXPECT_NE(old.reason.find("Fake GPU"), std::string::npos) << old.reason;
}

TEST_F(MetalErrors, TypesWithoutKernelsAreNamed) {
  const TestLayer layer(
      {"q3", 1, 256, 256, 2, 1, QuantType::Q4_K, QuantType::Q3_K, QuantType::F16});
  try {
    layer.stack(&backend());
    FAIL() << "Q3_K has no Metal kernel";
  } catch (const UnsupportedError& error) {
    const std::string text = error.what();
    for (const char* part : {"Q3_K", "up weights", "Q4_K", "dequantize"}) {
      EXPECT_NE(text.find(part), std::string::npos) << text;
    }
  }
  const ExpertStack elsewhere = TestLayer(case_of(QuantType::Q8_0, 1)).stack();
  EXPECT_FALSE(backend().supports(elsewhere.up().ref).ok) << "memory of the host";
}

/// Whatever happens, the call after it works.
class MetalFailure : public MetalForward {
 protected:
  MetalFailure()
      : layer_(case_of(QuantType::Q8_0, 2)),
        x_(random_values(2 * layer_.shape.hidden, 3)),
        logits_(random_values(2 * layer_.shape.experts, 4)) {}
  Floats run() {
    return forward(layer_, layer_.stack(&backend()), router_of(layer_.shape), x_, logits_, {}).y;
  }
  void expect_recovery() {
    fake_metal::faults() = {};
    EXPECT_LE(rel_l2(run(), forward_f64(layer_, x_, route_on_host(layer_.shape, logits_))),
              kF32Bound);
  }
  TestLayer layer_;
  Floats x_, logits_;
};

TEST_F(MetalFailure, SourceThatDoesNotCompile) {
  fake_metal::faults().does_not_compile = true;
  try {
    run();
    FAIL();
  } catch (const DeviceError& error) {
    EXPECT_NE(std::string(error.what()).find("program_source:1:1"), std::string::npos)
        << error.what();
  }
  EXPECT_EQ(fake_metal::counters().dispatches, 0) << "half a call was left behind";
  expect_recovery();
}

TEST_F(MetalFailure, AnOlderSystemIsNoFailure) {
  fake_metal::faults().old_system = true;
  EXPECT_NO_THROW(run());
  EXPECT_EQ(fake_metal::counters().libraries, 1);
}

TEST_F(MetalFailure, NoMemory) {
  fake_metal::faults().no_memory = true;
  EXPECT_THROW(run(), OutOfMemoryError);
  EXPECT_THROW(backend().allocate(100), OutOfMemoryError);
  expect_recovery();
}

TEST_F(MetalFailure, CommandBuffersThatFail) {
  run();
  fake_metal::faults().command_error = 8;  // MTLCommandBufferErrorOutOfMemory
  EXPECT_THROW(run(), OutOfMemoryError);
  fake_metal::faults().command_error = 11;  // MTLCommandBufferErrorDeviceRemoved
  EXPECT_THROW(run(), DeviceError);
  for (const long killed : {2, 14}) {  // by the watchdog: a timeout, and a screen that had to wait
    fake_metal::faults().command_error = killed;
    try {
      run();
      FAIL();
    } catch (const DeviceError& error) {
      EXPECT_NE(std::string(error.what()).find("smaller batch"), std::string::npos) << error.what();
    }
  }
  expect_recovery();
}

TEST_F(MetalFailure, MemoryOfTheHost) {
  Context context = this->context();
  std::vector<std::int32_t> ids(4);
  Floats weights(4);
  const auto logits = poisoned<float>(4);
  EXPECT_THROW(backend().shared_routing(
                   context, {.logits = logits.data(), .out = {ids.data(), weights.data(), 4, 1}}),
               DeviceError);
  expect_recovery();
}

}  // namespace
}  // namespace moesaic::testing

// What the host code asks of the driver: how commands are recorded, where weights lie, and what the
// driver's errors become. The fake runtime is told to fail.

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>

#include "gguf_writer.hpp"
#include "metal_forward.hpp"

namespace moesaic::testing {
namespace {

using MetalCommands = MetalForward;
using MetalErrors = MetalForward;

TEST_F(MetalCommands, OneCommandBufferThatRunsWhenWaitedFor) {
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

TEST_F(MetalCommands, PrefillTakesItsGridFromTheDevice) {
  Case c{"prefill", 64, 64, 96, 6, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const ExpertStack stack = layer.stack(&backend());
  forward(layer, stack, router_of(c), random_values(c.tokens * c.hidden, 3),
          random_values(c.tokens * c.experts, 5), {});
  EXPECT_EQ(fake_metal::counters().indirect, 3) << "gate, up and down";
}

TEST_F(MetalCommands, WeightsOfAMappedFileAreNotCopied) {
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
      EXPECT_EQ(role.reason.find("refused a buffer") != std::string::npos, refuses) << role.reason;
    }
    EXPECT_EQ(stack.device().type, DeviceType::Metal);
    EXPECT_LE(rel_l2(forward(layer, stack, router_of(c), x, logits, {}).y, want), kF32Bound);
  }
}

TEST_F(MetalErrors, TheDeviceSaysHowMuchItHolds) {
  EXPECT_EQ(backend().info().detail, "Fake GPU, working set 3.0 GiB, buffers of up to 4.0 GiB");
}

TEST_F(MetalCommands, WeightsStayResident) {
  const TestLayer layer(case_of(QuantType::Q8_0, 1));
  const Case& c = layer.shape;
  const Floats x = random_values(c.hidden, 3), logits = random_values(c.experts, 4);
  const fake_metal::Counters& counters = fake_metal::counters();
  {
    const ExpertStack stack = layer.stack(&backend());
    EXPECT_EQ(counters.residency_requests, 3) << "gate, up and down";
    const auto begin = std::chrono::steady_clock::now();
    forward(layer, stack, router_of(c), x, logits, {});
    const long asked = counters.residency_requests;
    EXPECT_EQ(asked, 6) << "once more by the first call";
    forward(layer, stack, router_of(c), x, logits, {});
    if (std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(500)) {
      EXPECT_EQ(counters.residency_requests, asked) << "not by each call";
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(600));
    forward(layer, stack, router_of(c), x, logits, {});
    EXPECT_GE(counters.residency_requests, asked + 3) << "but after a while";
    EXPECT_EQ(counters.residency_ends, 0);
  }
  EXPECT_EQ(counters.residency_ends, 3);
  const long before = counters.residency_requests;
  fake_metal::faults().old_system = true;
  layer.stack(&backend());
  EXPECT_EQ(counters.residency_requests, before) << "macOS 14 has none";
}

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
      {"iq2", 1, 256, 256, 2, 1, QuantType::Q4_K, QuantType::IQ2_S, QuantType::F16});
  try {
    layer.stack(&backend());
    FAIL() << "IQ2_S has no Metal kernel";
  } catch (const UnsupportedError& error) {
    const std::string text = error.what();
    for (const char* part : {"IQ2_S", "up weights", "Q4_K", "dequantize"}) {
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

TEST_F(MetalFailure, WeightsThatNoBufferHolds) {
  fake_metal::faults().max_buffer = 1024;
  try {
    layer_.stack(&backend());
    FAIL();
  } catch (const OutOfMemoryError& error) {
    const std::string text = error.what();
    for (const char* part : {"gate weights", "1024 bytes", "one buffer"}) {
      EXPECT_NE(text.find(part), std::string::npos) << text;
    }
  }
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

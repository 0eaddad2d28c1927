// What the host code asks of the driver: how commands are recorded, where weights lie, and what the
// driver's errors become. The fake runtime is told to fail.

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>

#include "gguf_writer.hpp"
#include "metal_forward.hpp"
#include "moesaic/gguf.hpp"

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

/// The experts of a layer as a GGUF file.
std::string file_of(const TestLayer& layer) {
  test::GgufWriter writer;
  const auto add = [&](const char* name, const TestRole& role) {
    const WeightRef& ref = role.weights.ref;
    writer.tensor(name, {ref.cols, ref.rows, ref.num_experts}, static_cast<std::uint32_t>(ref.type),
                  {reinterpret_cast<const char*>(role.bytes->data()), role.bytes->size()});
  };
  add("blk.0.ffn_gate_exps.weight", layer.gate);
  add("blk.0.ffn_up_exps.weight", layer.up);
  add("blk.0.ffn_down_exps.weight", layer.down);
  return writer.bytes();
}

TEST_F(MetalCommands, WeightsOfAMappedFileAreNotCopied) {
  Case c{"file", 2, 64, 96, 3, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const test::TempDir folder;
  const auto path = folder.write("experts.gguf", file_of(layer));
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

// Stacks and calls may use the same pages at once; each is there while its user is.
TEST_F(MetalCommands, SharedPagesStayForWhoeverIsLeft) {
  Case c{"file", 2, 64, 96, 3, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const test::TempDir folder;
  const auto path = folder.write("experts.gguf", file_of(layer));
  const auto file = GgufFile::open(path);
  LoadOptions options;
  options.backend = &backend();
  auto first = std::make_unique<ExpertStack>(ExpertStack::load_from_gguf(file, 0, options));
  const ExpertStack second = ExpertStack::load_from_gguf(file, 0, options);
  first.reset();
  const Floats x = random_values(c.tokens * c.hidden, 3);
  const Floats logits = random_values(c.tokens * c.experts, 4);
  EXPECT_LE(rel_l2(forward(layer, second, router_of(c), x, logits, {}).y,
                   forward_f64(layer, x, route_on_host(c, logits))),
            kF32Bound);

  const std::size_t bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::unique_ptr<void, decltype(&std::free)> pages(std::aligned_alloc(bytes, bytes),
                                                          &std::free);
  auto one = backend().share(pages.get(), bytes), other = backend().share(pages.get(), bytes);
  ASSERT_NE(other, nullptr);
  one.reset();
  const auto ids = array(std::vector<std::int32_t>{-1});
  const op::ZeroSkipped call{ids.data(), 1, static_cast<float*>(pages.get()), 1, 4};
  Context context = this->context();
  EXPECT_NO_THROW(backend().zero_skipped(context, call));
  backend().synchronize(context);
  other.reset();
  EXPECT_THROW(backend().zero_skipped(context, call), DeviceError);
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
  const TestLayer layer(case_of(QuantType::Q4_K, 1));
  ExpertStack::Parts other = layer.parts(), packed = layer.parts();
  other.up.ref.type = QuantType::F64;
  packed.down.ref.layout = WeightLayout::Panels;
  const std::vector<const char*> of_type{"up weights", "Q4_K", "IQ2_S", "got F64", "dequantize"};
  const std::vector<const char*> of_layout{"down weights", "packed for another backend"};
  for (auto& [parts, words] : {std::pair{&other, of_type}, std::pair{&packed, of_layout}}) {
    try {
      backend().prepare(*parts, {});
      FAIL() << words.front();
    } catch (const UnsupportedError& error) {
      const std::string text = error.what();
      for (const char* word : words) EXPECT_NE(text.find(word), std::string::npos) << text;
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

// A kernel takes a role as one buffer; which role does not fit is said before any memory is taken.
TEST_F(MetalFailure, WeightsThatNoBufferHolds) {
  const TestLayer wide({"wide", 2, 64, 64, 4, 2, QuantType::Q8_0, QuantType::F16, QuantType::Q8_0});
  const auto bytes = static_cast<unsigned long>(wide.up.bytes->size());
  const long before = fake_metal::live_objects();
  fake_metal::faults().max_buffer = bytes - 1;
  try {
    wide.stack(&backend());
    FAIL();
  } catch (const OutOfMemoryError& error) {
    const std::string text = error.what();
    for (const std::string& part : {std::string("up weights"), std::to_string(bytes - 1) + " bytes",
                                    std::string("largest buffer"), std::to_string(bytes)}) {
      EXPECT_NE(text.find(part), std::string::npos) << text;
    }
  }
  EXPECT_EQ(fake_metal::live_objects(), before);
  fake_metal::faults().max_buffer = bytes;
  EXPECT_NO_THROW(wide.stack(&backend()));
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

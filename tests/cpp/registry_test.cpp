#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "backend/builtin.hpp"
#include "cpu/isa.hpp"
#include "moesaic/config.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

/// The CPU backend with only the operations that a backend must have: phases are the default ones,
/// and the product is a plain loop over f32 weights.
class PlainBackend : public Backend {
 public:
  explicit PlainBackend(std::string name) : name_(std::move(name)) {}

  BackendInfo info() const override {
    return {.name = name_, .available = true, .reason = "", .devices = {Device{}}, .detail = ""};
  }
  std::string kernel_name(const WeightRef&, const Tuning&) const override { return "plain"; }
  Support supports(const WeightRef&) const override { return {}; }
  void* allocate(std::size_t bytes) const override { return cpu().allocate(bytes); }
  void deallocate(void* memory, std::size_t bytes) const noexcept override {
    cpu().deallocate(memory, bytes);
  }
  void copy(void* to, const void* from, std::size_t bytes) const override {
    cpu().copy(to, from, bytes);
  }
  void synchronize(Context&) const override {}
  void prepare(ExpertStack::Parts&, const LoadOptions&) const override {}
  std::size_t scratch_bytes(const ScratchQuery&) const override { return 0; }
  void gather(Context& context, const op::Gather& call) const override {
    cpu().gather(context, call);
  }
  void expert_gemm(Context&, const op::Gemm& call) const override {
    const WeightRef& ref = call.weight.ref;
    for (std::int32_t s = 0; s < call.map.num_segments; ++s) {
      const std::int32_t e = call.map.expert_of(s);
      if (e < 0) continue;
      const auto* weight = reinterpret_cast<const float*>(ref.expert(e));
      for (std::int32_t i = call.map.begin(s); i < call.map.begin(s) + call.map.count(s); ++i) {
        const float* x =
            static_cast<const float*>(call.in.data) + call.in.element_offset(call.map.source_of(i));
        float* out = static_cast<float*>(call.out) + call.map.destination_of(i) * ref.rows;
        for (std::int64_t r = 0; r < ref.rows; ++r) {
          out[r] = 0.0F;
          for (std::int64_t k = 0; k < ref.cols; ++k) out[r] += weight[r * ref.cols + k] * x[k];
        }
      }
    }
  }
  void activate(Context& context, const op::Activate& call) const override {
    cpu().activate(context, call);
  }
  void combine(Context& context, const op::Combine& call) const override {
    cpu().combine(context, call);
  }

 private:
  static const Backend& cpu() { return *backends().front(); }
  std::string name_;
};

TEST(Registry, ListsCpuFirstAndAbsentOnesWithReasons) {
  const auto all = backends();
  ASSERT_GE(all.size(), 3U);
  EXPECT_EQ(all[0]->info().name, "cpu");
  EXPECT_TRUE(all[0]->info().available);
  EXPECT_FALSE(all[0]->info().detail.empty());
  std::set<std::string> names, devices;
  for (const auto& backend : all) {
    const BackendInfo info = backend->info();
    names.insert(info.name);
    // One for each device; one for a kind without any.
    const std::string which = info.devices.empty() ? info.name : to_string(info.devices.front());
    EXPECT_TRUE(devices.insert(which).second) << which;
    EXPECT_EQ(info.available, info.reason.empty()) << info.name;
  }
  EXPECT_TRUE(names.contains("cuda"));
  EXPECT_TRUE(names.contains("metal"));
}

std::string absent_reason(Device device) {
  for (const auto& backend : backends()) {
    if (backend->device_type() == device.type) return backend->info().reason;
  }
  return "no backend";
}

TEST(Registry, AbsentDevicesSayWhy) {
  EXPECT_EQ(&backend_for(Device{}), backends().front().get());
  for (const Device device : {Device{DeviceType::Cuda, 0}, Device{DeviceType::Metal, 0}}) {
    if (absent_reason(device).empty()) continue;  // a machine with this GPU
    try {
      backend_for(device);
      FAIL() << to_string(device);
    } catch (const DeviceError& error) {
      EXPECT_NE(std::string(error.what()).find(absent_reason(device)), std::string::npos)
          << error.what();
    }
    EXPECT_THROW(Context{device}, DeviceError);
  }
  EXPECT_THROW(backend_for(Device{DeviceType::Cpu, 1}), DeviceError);
}

TEST(Registry, AbsentOperationsThrow) {
  const auto absent = absent_backend(DeviceType::Cuda, "absent", "a reason");
  EXPECT_THROW(absent->allocate(1), DeviceError);
  EXPECT_THROW(absent->scratch_bytes({}), DeviceError);
  EXPECT_EQ(absent->supports({}).reason, "a reason");
  Context context;
  EXPECT_THROW(absent->combine(context, {}), DeviceError);
  EXPECT_THROW(absent->gather(context, {}), DeviceError);
  try {
    absent->synchronize(context);
    FAIL();
  } catch (const DeviceError& error) {
    EXPECT_STREQ(error.what(), "absent: backend: got a reason");
  }
}

TEST(Registry, AddsAndRemoves) {
  const std::size_t before = backends().size();
  const auto plain = std::make_shared<PlainBackend>("plain");
  {
    const auto handle = register_backend(plain);
    EXPECT_NE(handle, nullptr);
    EXPECT_EQ(backends().size(), before + 1);
    EXPECT_EQ(&backend_for(Device{}), plain.get());  // the latest wins
    Tuning tuning;
    tuning.backend = "plain";
    EXPECT_EQ(&Context(Device{}, tuning).backend(), plain.get());
    tuning.backend = "cpu";
    EXPECT_EQ(&Context(Device{}, tuning).backend(), backends().front().get());
    tuning.backend = "nothing";
    EXPECT_THROW(Context(Device{}, tuning), DeviceError);
    for (const DeviceType type : {DeviceType::Cuda, DeviceType::Metal}) {
      if (absent_reason({type, 0}).empty()) continue;
      tuning.backend = type == DeviceType::Cuda ? "cuda" : "metal";
      EXPECT_THROW(Context(Device{}, tuning), DeviceError);
    }
  }
  EXPECT_EQ(backends().size(), before);
  EXPECT_EQ(&backend_for(Device{}), backends().front().get());
  EXPECT_THROW(register_backend(nullptr), ConfigError);
}

TEST(Context, TakesThreadsFromTuning) {
  Tuning tuning;
  tuning.threads = 3;
  const Context context(Device{}, tuning);
  EXPECT_EQ(context.pool().threads(), 3);
  EXPECT_EQ(&context.pool(), ThreadPool::shared(3).get());
  tuning.threads = -1;
  EXPECT_THROW(Context(Device{}, tuning), ConfigError);
}

TEST(CpuBackend, AllocatesAlignedMemory) {
  const Backend& cpu = *backends().front();
  EXPECT_EQ(cpu.device_type(), DeviceType::Cpu);
  void* const memory = cpu.allocate(1000);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 64, 0U);
  const char text[] = "copied";
  cpu.copy(memory, text, sizeof(text));
  EXPECT_STREQ(static_cast<const char*>(memory), text);
  cpu.deallocate(memory, 1000);
  EXPECT_THROW(cpu.allocate(std::size_t{1} << 60), OutOfMemoryError);
}

TEST(CpuBackend, DetailNamesTheIsaThatRuns) {
  const std::string detail = backends().front()->info().detail;
  EXPECT_TRUE(detail.starts_with(name_of(cpu::active_isa(Tuning::process())))) << detail;
}

TEST(InputRowsOf, Ranks) {
  float data[64] = {};
  const InputRows one = input_rows(ConstTensorView(data, DType::F32, {7}));
  EXPECT_EQ(one.num_rows, 1);
  EXPECT_EQ(one.cols, 7);
  EXPECT_EQ(one.element_offset(0), 0);

  ConstTensorView two(data, DType::F16, {3, 5});
  two.strides[0] = 9;
  const InputRows rows = input_rows(two);
  EXPECT_EQ(rows.num_rows, 3);
  EXPECT_EQ(rows.cols, 5);
  EXPECT_EQ(rows.dtype, DType::F16);
  EXPECT_EQ(rows.element_offset(2), 18);

  ConstTensorView three(data, DType::BF16, {2, 3, 4});
  three.strides = {20, 6, 1, 0};
  const InputRows slots = input_rows(three);
  EXPECT_EQ(slots.num_rows, 6);
  EXPECT_EQ(slots.element_offset(4), 20 + 6);
  three.strides[1] = 0;  // one row for all slots
  EXPECT_EQ(input_rows(three).element_offset(5), 20);

  ConstTensorView narrow(data, DType::F32, {4, 1});
  narrow.strides = {3, 3, 0, 0};
  EXPECT_EQ(input_rows(narrow).element_offset(3), 9);
  EXPECT_EQ(input_rows(ConstTensorView(data, DType::F32, {2, 0, 4})).num_rows, 0);
}

TEST(DefaultOperations, AreRefusedByName) {
  const PlainBackend plain("plain");
  Context context(plain, Tuning{}, ThreadPool::shared(1));
  try {
    plain.rms_norm(context, {});
    FAIL();
  } catch (const UnsupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("rms_norm"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("plain"), std::string::npos) << error.what();
  }
  EXPECT_THROW(plain.route(context, {}), UnsupportedError);
}

/// Two experts of H 3, I 2 with small whole numbers.
ExpertStack small_stack(bool gated) {
  std::vector<float> gate(2 * 2 * 3);
  std::vector<float> up(gate.size());
  std::vector<float> down(2 * 3 * 2);
  for (std::size_t i = 0; i < gate.size(); ++i) {
    gate[i] = static_cast<float>(i % 5) - 2.0F;
    up[i] = static_cast<float>(i % 7) - 3.0F;
    down[i] = static_cast<float>(i % 4) - 1.0F;
  }
  const ConstTensorView gates(gated ? gate.data() : nullptr, DType::F32, {2, 2, 3});
  return ExpertStack::from_dense_stacks(gated ? gates : ConstTensorView{},
                                        ConstTensorView(up.data(), DType::F32, {2, 2, 3}),
                                        ConstTensorView(down.data(), DType::F32, {2, 3, 2}));
}

TEST(DefaultPhases, ComposeTheSmallOperations) {
  const PlainBackend plain("plain");
  Context context(plain, Tuning{}, ThreadPool::shared(2));
  for (const bool gated : {true, false}) {
    const ExpertStack stack = small_stack(gated);
    const float x[2 * 3] = {1.0F, -2.0F, 0.5F, 3.0F, 0.25F, -1.0F};
    std::int32_t ids[4] = {0, 1, 1, -1};
    float weights[4] = {0.75F, 0.25F, 0.5F, 0.5F};

    RowMap rows{.num_segments = 4, .expert = ids, .source_divisor = 2, .limit = 4};
    op::GateUp gate_up;
    gate_up.gate = stack.gate().view();
    gate_up.up = stack.up().view();
    gate_up.activation.kind = gated ? ActivationKind::SwiGlu : ActivationKind::ReluSquared;
    gate_up.map = rows;
    gate_up.in = input_rows(ConstTensorView(x, DType::F32, {2, 3}));
    std::vector<float> hidden(4 * 2, kPoison);
    std::vector<float> buffer(2 * 4 * 2, kPoison);
    gate_up.hidden = hidden.data();
    gate_up.gate_up = buffer.data();
    plain.gate_up(context, gate_up);

    rows.source_divisor = 1;
    op::Down down;
    down.weight = stack.down().view();
    down.map = rows;
    down.in = dense_rows(hidden.data(), DType::F32, 4, 2);
    std::vector<float> down_rows(4 * 3, kPoison);
    down.rows = down_rows.data();
    down.combine.rows = down_rows.data();
    down.combine.routing = {ids, weights, 2, 2};
    std::vector<float> out(2 * 3, kPoison);
    down.combine.out = {.data = out.data(), .dtype = DType::F32, .cols = 3, .stride = 3};
    plain.down(context, down);

    std::vector<float> row(3);
    for (int t = 0; t < 2; ++t) {
      double expected[3] = {};
      for (int slot = 0; slot < 2; ++slot) {
        const std::int32_t e = ids[t * 2 + slot];
        if (e < 0) continue;
        const auto dot = [&](const RoleWeights& role, int r) {
          dequantize_expert_row(role.ref, e, r, row.data());
          float sum = 0.0F;
          for (int k = 0; k < 3; ++k) sum += row[k] * x[t * 3 + k];
          return sum;
        };
        float h[2];
        for (int i = 0; i < 2; ++i) {
          h[i] =
              activate(gate_up.activation, gated ? dot(stack.gate(), i) : 0.0F, dot(stack.up(), i));
        }
        for (int r = 0; r < 3; ++r) {
          dequantize_expert_row(stack.down().ref, e, r, row.data());
          expected[r] += weights[t * 2 + slot] * (row[0] * h[0] + row[1] * h[1]);
        }
      }
      for (int r = 0; r < 3; ++r) EXPECT_NEAR(out[t * 3 + r], expected[r], 1e-4) << gated << t << r;
    }
  }
}

}  // namespace
}  // namespace moesaic

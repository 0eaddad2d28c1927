// The named operations against f64, and their checks.

#include <gtest/gtest.h>

#include <string>

#include "fake_backend.hpp"
#include "layers.hpp"

namespace moesaic::testing {
namespace {

constexpr double kExactBound = 2e-3;

constexpr Case kShape{
    "operations",         6, 64, 96, 5, 3, QuantType::Q8_0, QuantType::Q4_0, QuantType::Q5_0,
    RoutingShape::Skipped};

std::vector<const Backend*> test_backends() {
  static FakeBackend fake;
  return {&backend_for(Device{}), &fake};
}

class Operations : public ::testing::Test {
 protected:
  TestLayer layer{kShape};
  Routing routing = make_routing(kShape);
  BucketPlan plan = BucketPlan::build(routing, kShape.experts);
  std::int64_t pairs = kShape.tokens * kShape.top_k;
  Floats x = random_values(kShape.tokens * kShape.hidden, 3);

  const TestRole& role_of(Role role) const {
    return role == Role::Gate ? layer.gate : role == Role::Up ? layer.up : layer.down;
  }
  /// Rows in pair order; `row_of` gives the input of a pair, zeros where nothing is routed.
  template <class RowOf>
  Doubles expected(Role role, RowOf&& row_of) const {
    Doubles all;
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      const std::int32_t expert = routing.topk_ids()[static_cast<std::size_t>(pair)];
      Doubles y(static_cast<std::size_t>(role_of(role).weights.ref.rows));
      if (expert >= 0) {
        const float* row = row_of(pair);
        const Doubles in(row, row + role_of(role).weights.ref.cols);
        y = apply_f64(role_of(role), expert, in.data());
      }
      all.insert(all.end(), y.begin(), y.end());
    }
    return all;
  }
  ConstTensorView ids() {
    return {routing.topk_ids().data(), DType::I32, {kShape.tokens, kShape.top_k}};
  }
  Floats poisoned(std::int64_t count) const {
    return Floats(static_cast<std::size_t>(count), kPoison);
  }
};

TEST_F(Operations, GemvReadsOneRowPerTokenOrPerSlot) {
  const Floats slots = random_values(pairs * kShape.intermediate, 5);
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = layer.stack(backend);
    Context context(*backend, Tuning{}, ThreadPool::shared(2));
    for (const Role role : {Role::Gate, Role::Up}) {
      Floats out = poisoned(pairs * kShape.intermediate);
      expert_gemv(context, stack, role, {x.data(), DType::F32, {kShape.tokens, kShape.hidden}},
                  ids(),
                  {out.data(), DType::F32, {kShape.tokens, kShape.top_k, kShape.intermediate}},
                  Precision::Exact);
      const Doubles want = expected(
          role, [&](std::int64_t pair) { return x.data() + pair / kShape.top_k * kShape.hidden; });
      EXPECT_LE(rel_l2(out, want), kExactBound) << backend->info().name << name_of(role);
      // Token 0 has nothing but -1.
      EXPECT_TRUE(std::all_of(out.begin(), out.begin() + kShape.top_k * kShape.intermediate,
                              [](float v) { return v == 0.0F; }));
    }
    Floats out = poisoned(pairs * kShape.hidden);
    expert_gemv(context, stack, Role::Down,
                {slots.data(), DType::F32, {kShape.tokens, kShape.top_k, kShape.intermediate}},
                ids(), {out.data(), DType::F32, {kShape.tokens, kShape.top_k, kShape.hidden}},
                Precision::Exact);
    const Doubles want = expected(
        Role::Down, [&](std::int64_t pair) { return slots.data() + pair * kShape.intermediate; });
    EXPECT_LE(rel_l2(out, want), kExactBound) << backend->info().name;
  }
}

TEST_F(Operations, GemvOfOneToken) {
  const std::int64_t k = kShape.top_k;
  const std::int32_t one[] = {4, -1, 0};
  const Floats slots = random_values(k * kShape.intermediate, 5);
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = layer.stack(backend);
    Context context(*backend, Tuning{}, ThreadPool::shared(2));
    const ConstTensorView ids(one, DType::I32, {k});
    Floats out = poisoned(k * kShape.intermediate);
    expert_gemv(context, stack, Role::Up, {x.data(), DType::F32, {kShape.hidden}}, ids,
                {out.data(), DType::F32, {k, kShape.intermediate}});
    Floats down = poisoned(k * kShape.hidden);
    expert_gemv(context, stack, Role::Down, {slots.data(), DType::F32, {k, kShape.intermediate}},
                ids, {down.data(), DType::F32, {k, kShape.hidden}});
    const Doubles row(x.begin(), x.begin() + kShape.hidden);
    Doubles want, want_down;
    for (std::int64_t s = 0; s < k; ++s) {
      const bool skip = one[s] < 0;
      const Doubles h(slots.begin() + s * kShape.intermediate,
                      slots.begin() + (s + 1) * kShape.intermediate);
      const Doubles y = skip ? Doubles(static_cast<std::size_t>(kShape.intermediate))
                             : apply_f64(layer.up, one[s], row.data());
      const Doubles d = skip ? Doubles(static_cast<std::size_t>(kShape.hidden))
                             : apply_f64(layer.down, one[s], h.data());
      want.insert(want.end(), y.begin(), y.end());
      want_down.insert(want_down.end(), d.begin(), d.end());
    }
    EXPECT_LE(rel_l2(out, want), kExactBound) << backend->info().name;
    EXPECT_LE(rel_l2(down, want_down), kExactBound) << backend->info().name;
  }
}

TEST_F(Operations, GemvGateUp) {
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = layer.stack(backend);
    Context context(*backend, Tuning{}, ThreadPool::shared(2));
    Floats out = poisoned(pairs * kShape.intermediate);
    expert_gemv_gate_up(
        context, stack, Activation{}, {x.data(), DType::F32, {kShape.tokens, kShape.hidden}}, ids(),
        {out.data(), DType::F32, {kShape.tokens, kShape.top_k, kShape.intermediate}},
        Precision::Exact);
    const auto row = [&](std::int64_t pair) {
      return x.data() + pair / kShape.top_k * kShape.hidden;
    };
    const Doubles gate = expected(Role::Gate, row);
    Doubles want = expected(Role::Up, row);
    for (std::size_t i = 0; i < want.size(); ++i) want[i] *= gate[i] / (1.0 + std::exp(-gate[i]));
    EXPECT_LE(rel_l2(out, want), kExactBound) << backend->info().name;
  }
}

TEST_F(Operations, GemmOverAPlanIsInPairOrder) {
  const Floats h = random_values(pairs * kShape.intermediate, 5);
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = layer.stack(backend);
    Context context(*backend, Tuning{}, ThreadPool::shared(2));
    Floats up = poisoned(pairs * kShape.intermediate), down = poisoned(pairs * kShape.hidden);
    expert_gemm(context, stack, Role::Up, {x.data(), DType::F32, {kShape.tokens, kShape.hidden}},
                plan, {up.data(), DType::F32, {pairs, kShape.intermediate}}, Precision::Exact);
    expert_gemm(context, stack, Role::Down, {h.data(), DType::F32, {pairs, kShape.intermediate}},
                plan, {down.data(), DType::F32, {pairs, kShape.hidden}}, Precision::Exact);
    EXPECT_LE(rel_l2(up, expected(Role::Up,
                                  [&](std::int64_t pair) {
                                    return x.data() + pair / kShape.top_k * kShape.hidden;
                                  })),
              kExactBound)
        << backend->info().name;
    EXPECT_LE(
        rel_l2(down, expected(Role::Down,
                              [&](std::int64_t p) { return h.data() + p * kShape.intermediate; })),
        kExactBound)
        << backend->info().name;
  }
}

TEST_F(Operations, GatherCombineAndWeightedSum) {
  const std::int64_t hidden = kShape.hidden;
  const Floats by_pair = random_values(pairs * hidden, 9);
  for (const Backend* backend : test_backends()) {
    Context context(*backend, Tuning{}, ThreadPool::shared(2));
    Floats packed = poisoned(pairs * hidden);
    gather_rows(context, {x.data(), DType::F32, {kShape.tokens, hidden}}, plan,
                {packed.data(), DType::F32, {pairs, hidden}});
    for (std::int64_t r = 0; r < pairs; ++r) {
      for (std::int64_t i = 0; i < hidden; ++i) {
        const float want = r < plan.num_rows()
                               ? x[static_cast<std::size_t>(
                                     plan.row_token()[static_cast<std::size_t>(r)] * hidden + i)]
                               : 0.0F;
        ASSERT_EQ(packed[static_cast<std::size_t>(r * hidden + i)], want) << r << " " << i;
      }
    }
    Floats rows = poisoned(pairs * hidden);
    for (std::int64_t r = 0; r < plan.num_rows(); ++r) {
      std::copy_n(by_pair.begin() + plan.row_pair()[static_cast<std::size_t>(r)] * hidden, hidden,
                  rows.begin() + r * hidden);
    }
    Doubles want(static_cast<std::size_t>(kShape.tokens * hidden));
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      if (routing.topk_ids()[static_cast<std::size_t>(pair)] < 0) continue;
      for (std::int64_t i = 0; i < hidden; ++i) {
        want[static_cast<std::size_t>(pair / kShape.top_k * hidden + i)] +=
            static_cast<double>(routing.topk_weights()[static_cast<std::size_t>(pair)]) *
            static_cast<double>(by_pair[static_cast<std::size_t>(pair * hidden + i)]);
      }
    }
    Floats a = poisoned(kShape.tokens * hidden), b = poisoned(kShape.tokens * hidden);
    const TensorView out_a(a.data(), DType::F32, {kShape.tokens, hidden});
    const TensorView out_b(b.data(), DType::F32, {kShape.tokens, hidden});
    combine(context, {rows.data(), DType::F32, {pairs, hidden}}, plan, routing, out_a);
    weighted_sum(context, {by_pair.data(), DType::F32, {kShape.tokens, kShape.top_k, hidden}},
                 routing, out_b);
    EXPECT_LE(rel_l2(a, want), 1e-6) << backend->info().name;
    EXPECT_EQ(a, b) << backend->info().name;
    weighted_sum(context, {by_pair.data(), DType::F32, {pairs, hidden}}, routing, out_b, true);
    for (double& v : want) v *= 2.0;
    EXPECT_LE(rel_l2(b, want), 1e-6) << backend->info().name;
  }
}

TEST_F(Operations, SiluMul) {
  const Floats gate_up = random_values(7 * 2 * 33, 4, 3.0F);
  for (const Backend* backend : test_backends()) {
    Context context(*backend, Tuning{}, ThreadPool::shared(2));
    Floats out = poisoned(7 * 33);
    silu_mul(context, {gate_up.data(), DType::F32, {7, 66}}, {out.data(), DType::F32, {7, 33}});
    Doubles want;
    for (std::size_t r = 0; r < 7; ++r) {
      for (std::size_t i = 0; i < 33; ++i) {
        const auto g = static_cast<double>(gate_up[r * 66 + i]);
        want.push_back(g / (1.0 + std::exp(-g)) * static_cast<double>(gate_up[r * 66 + 33 + i]));
      }
    }
    EXPECT_LE(rel_l2(out, want), 1e-5) << backend->info().name;
  }
}

TEST_F(Operations, ScratchIsGivenBack) {
  FakeBackend fake;
  const ExpertStack stack = layer.stack();
  Context context(fake, Tuning{}, ThreadPool::shared(1));
  Floats out = poisoned(pairs * kShape.intermediate);
  expert_gemv_gate_up(context, stack, Activation{},
                      {x.data(), DType::F32, {kShape.tokens, kShape.hidden}}, ids(),
                      {out.data(), DType::F32, {kShape.tokens, kShape.top_k, kShape.intermediate}});
  EXPECT_EQ(fake.live_bytes, 0);
}

TEST_F(Operations, Errors) {
  FakeBackend fake;
  const ExpertStack stack = layer.stack();
  Context context(fake, Tuning{}, ThreadPool::shared(1));
  Floats out = poisoned(pairs * kShape.intermediate);
  const ConstTensorView in(x.data(), DType::F32, {kShape.tokens, kShape.hidden});
  const TensorView y(out.data(), DType::F32, {kShape.tokens, kShape.top_k, kShape.intermediate});
  EXPECT_THROW(expert_gemv(context, stack, Role::Down, in, ids(), y), ShapeError);
  EXPECT_THROW(
      expert_gemv(context, stack, Role::Up, in,
                  {routing.topk_ids().data(), DType::I64, {kShape.tokens, kShape.top_k}}, y),
      DTypeError);
  EXPECT_THROW(expert_gemv(context, stack, Role::Up,
                           {x.data(), DType::F32, {kShape.tokens - 1, kShape.hidden}}, ids(), y),
               ShapeError);
  EXPECT_THROW(expert_gemv_gate_up(context, stack, Activation{.kind = ActivationKind::ReluSquared},
                                   in, ids(), y),
               ShapeError);
  EXPECT_THROW(expert_gemm(context, stack, Role::Up, in, BucketPlan::build(routing, 6),
                           {out.data(), DType::F32, {pairs, kShape.intermediate}}),
               ShapeError);
  ConstTensorView columns = in;
  columns.strides = {1, kShape.tokens, 0, 0};
  EXPECT_THROW(expert_gemv(context, stack, Role::Up, columns, ids(), y), ShapeError);
  const ConstTensorView head(out.data(), DType::F32, {4});
  EXPECT_FALSE(overlap(head, {out.data() + 4, DType::F32, {4}}));
  EXPECT_TRUE(overlap(head, {out.data() + 3, DType::F32, {4}}));
  EXPECT_THROW(expert_gemv(context, stack, Role::Up,
                           {out.data(), DType::F32, {kShape.tokens, kShape.hidden}}, ids(), y),
               ShapeError);
  routing.topk_ids()[3] = kShape.experts;
  EXPECT_THROW(expert_gemv(context, stack, Role::Up, in, ids(), y), ShapeError);
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float v) { return std::isnan(v); }));
}

/// A device that fails behind the launches.
class FailingBackend : public FakeBackend {
 public:
  void synchronize(Context&) const override {
    if (fails) throw DeviceError("the device failed");
  }
  void submit(Context& context) const override { synchronize(context); }
  /// So that the operations take copies of what the host has, which they wait for.
  DeviceType device_type() const override { return DeviceType::Cuda; }
  Device device() const override { return Device{}; }
  bool fails = true;
};

// What a device reports when a call waits for it is the error of that call, also where the wait is
// one that ends the memory of the call, or the zone of a profiler.
TEST_F(Operations, ErrorsOfTheDeviceReachTheCaller) {
  FailingBackend device;
  Context context(device, {}, ThreadPool::shared(1));
  const std::int64_t hidden = kShape.hidden, intermediate = kShape.intermediate;
  Floats rows = random_values(pairs * hidden, 7), out = poisoned(kShape.tokens * hidden);
  Floats wide = random_values(pairs * 2 * intermediate, 8), half = poisoned(pairs * intermediate);
  const auto gather = [&] {
    gather_rows(context, rows_of(x, hidden), plan, rows_of(rows, hidden));
  };
  const auto sum = [&] {
    combine(context, rows_of(std::as_const(rows), hidden), plan, routing, rows_of(out, hidden));
  };
  const auto weighted = [&] {
    weighted_sum(context, rows_of(std::as_const(rows), hidden), routing, rows_of(out, hidden));
  };
  const auto activate = [&] {
    silu_mul(context, rows_of(std::as_const(wide), 2 * intermediate), rows_of(half, intermediate));
  };
  for (const bool measured : {false, true}) {
    Profiler profiler(false, true);
    context.attach(measured ? &profiler : nullptr);
    device.fails = true;
    EXPECT_THROW(gather(), DeviceError);
    EXPECT_THROW(sum(), DeviceError);
    EXPECT_THROW(weighted(), DeviceError);
    EXPECT_THROW(activate(), DeviceError);
    device.fails = false;
    EXPECT_NO_THROW(gather());
    EXPECT_NO_THROW(sum());
    EXPECT_NO_THROW(weighted());
    EXPECT_NO_THROW(activate());
  }
  EXPECT_EQ(device.live_bytes.load(), 0);
}

TEST_F(Operations, AnErrorThatAZoneSawIsThatOfItsCall) {
  FailingBackend device;
  device.fails = false;
  Context context(device, {}, ThreadPool::shared(1));
  Profiler profiler(false, true);
  context.attach(&profiler);
  device.fails = true;
  {
    const ScopedZone zone(context, Zone::Route);
  }
  device.fails = false;
  EXPECT_THROW(context.throw_kept_error(), DeviceError);
  EXPECT_NO_THROW(context.throw_kept_error());
}

}  // namespace
}  // namespace moesaic::testing

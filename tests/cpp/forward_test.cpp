// What the forward computes, on the CPU backend and on the fake one, beside f64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "forward_problem.hpp"

namespace moesaic::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(Cases, ForwardCase, ::testing::ValuesIn(cases::kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(ForwardCase, ReferenceAgreesWithF64) {
  Problem p(GetParam());
  const ExpertStack stack = p.layer.stack();
  EXPECT_LE(run_reference(p.on(stack)).error(p.want()), kReferenceBound);
}

TEST_P(ForwardCase, EveryWayAgreesWithF64) {
  Problem p(GetParam());
  const Doubles want = p.want();
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    for (const Precision precision : {Precision::Exact, Precision::Fast}) {
      Context context = poisoned_context(*backend, precision);
      for (const Way& way : kWays) {
        EXPECT_LE(run_case(context, p.on(stack), way).error(want),
                  precision == Precision::Exact ? kExactBound : kFastBound)
            << backend->info().name << " " << way.name << " precision "
            << static_cast<int>(precision);
      }
    }
  }
}

TEST_P(ForwardCase, EveryDtypeAndAccumulateAgreesWithF64) {
  Problem p(GetParam());
  const Floats old = random_values(static_cast<std::int64_t>(p.values.size()), 11);
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context = poisoned_context(*backend, Precision::Exact);
    for (const DType in : {DType::F32, DType::F16, DType::BF16}) {
      Tensor x(in, p.x.rows, p.x.cols, p.values);
      const Doubles want = forward_f64(p.layer, x.values(), p.routing);
      for (const DType out : {DType::F32, DType::F16, DType::BF16}) {
        for (const Floats* added_to : {static_cast<const Floats*>(nullptr), &old}) {
          LayerCase c = p.on(stack);
          c.x = x.view();
          c.out = out;
          c.added_to = added_to;
          EXPECT_LE(run_case(context, c).error(want), out == DType::BF16 ? 5e-3 : kExactBound)
              << backend->info().name << " " << name_of(in) << " -> " << name_of(out)
              << " accumulate " << (added_to != nullptr);
        }
      }
    }
  }
}

TEST(Forward, OwnRouterAndSharedExpertsAgreeWithF64) {
  for (const char* name : {"one_token", "odd_sizes", "all_to_one"}) {
    const Case c = case_named(name);
    const Floats values = random_values(c.tokens * c.hidden, 3);
    const Floats old = random_values(c.tokens * c.hidden, 5);
    Tensor x(DType::F32, c.tokens, c.hidden, values);
    for (const bool sigmoid : {false, true}) {
      const FullLayer stored(c, nullptr, sigmoid);
      for (const Backend* backend : test_backends()) {
        const FullLayer prepared(c, backend, sigmoid);
        Context context = poisoned_context(*backend, Precision::Exact);
        for (const DType dtype : {DType::F32, DType::F16}) {
          for (const Floats* added_to : {static_cast<const Floats*>(nullptr), &old}) {
            SCOPED_TRACE(backend->info().name + " " + name + " sigmoid " + std::to_string(sigmoid));
            LayerCase call{
                .layer = stored.ref(), .x = x.view(), .out = dtype, .added_to = added_to};
            const Outcome reference = run_reference(call);
            call.layer = prepared.ref();
            const Outcome got = run_case(context, call);
            const Doubles want = stored.want(values, got.routing);
            EXPECT_LE(reference.error(want), dtype == DType::F16 ? 1e-3 : kReferenceBound);
            EXPECT_LE(got.error(want), kExactBound);
            EXPECT_TRUE(std::ranges::equal(got.routing.topk_ids(), reference.routing.topk_ids()));
          }
        }
      }
    }
  }
}

TEST(Forward, StridedLogitsAreRoutedAsThoseOfADenseArray) {
  const Case c = case_named("odd_sizes");
  Problem p(c);
  const Backend& backend = backend_for(Device{});
  const ExpertStack stack = p.layer.stack(&backend);
  const RouterConfig router = plain_router(c);
  const Floats logits = random_values(c.tokens * (c.experts + 2), 9);
  ConstTensorView view = rows_of(logits, c.experts + 2);
  view.shape[1] = c.experts;
  Routing routing;
  route(view, router, routing);
  Context context = poisoned_context(backend, Precision::Exact);
  LayerCase call{.layer = p.ref(stack), .x = p.x.view(), .logits = view};
  call.layer.router = &router;
  const Outcome got = run_case(context, call);
  EXPECT_TRUE(std::ranges::equal(got.routing.topk_ids(), routing.topk_ids()));
  EXPECT_LE(got.error(forward_f64(p.layer, p.values, routing)), kExactBound);
}

TEST(Forward, StrictRefusesNonfiniteLogits) {
  const Case c = case_named("odd_sizes");
  Problem p(c);
  const FakeBackend backend;
  const ExpertStack stack = p.layer.stack();
  const RouterConfig router = plain_router(c);
  Floats logits = random_values(c.tokens * c.experts, 9);
  logits[2] = kPoison;
  LayerCase call{.layer = p.ref(stack), .x = p.x.view(), .logits = rows_of(logits, c.experts)};
  call.layer.router = &router;

  Tuning tuning;
  tuning.strict = true;
  Context strict(backend, tuning, ThreadPool::shared(1));
  Tensor y(DType::F32, c.tokens, c.hidden);
  const std::vector<std::byte> untouched = y.bytes;
  Workspace workspace(workspace_bytes(strict, call.layer, c.top_k, c.tokens));
  EXPECT_THROW(forward(strict, call.layer, call.io(y.view()), workspace), ConfigError);
  EXPECT_EQ(y.bytes, untouched);

  Context lenient = poisoned_context(backend);
  Profiler profiler;
  lenient.attach(&profiler);
  for (const float v : run_case(lenient, call).values()) ASSERT_TRUE(std::isfinite(v));
  EXPECT_EQ(profiler.counter(Counter::NonfiniteRows), 1);
}

}  // namespace
}  // namespace moesaic::testing
